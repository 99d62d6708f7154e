"""The errors moka raises. Each message says what is wrong, what it got, what it expected and the fix."""


class MokaError(Exception):
    """Base of every error of this package."""


class ConfigError(MokaError, ValueError):
    """A configuration value is unknown, of the wrong type, or impossible for this model."""


class InjectionError(MokaError, ValueError):
    """The configuration does not fit the model: nothing matched, or a layer type is unsupported."""


class MergeError(MokaError, ValueError):
    """The update cannot be merged into the base weight without losing it."""


class DataError(MokaError, ValueError):
    """A data file does not parse or holds nothing to train on; names the file and the line."""


class DownloadError(MokaError, OSError):
    """The embedded model or data could not be obtained, or are not the expected files."""


class CheckpointFormatError(MokaError, ValueError):
    """An adapter file is malformed, truncated or corrupt."""


class CheckpointMismatchError(MokaError, ValueError):
    """A well-formed adapter does not fit the model; names the tensors."""


class BaseMismatchError(MokaError, ValueError):
    """The adapter was trained on another base model or another quantization of it."""


class UnsafeFileError(MokaError, ValueError):
    """A file is of a kind that moka refuses to open, such as a pickle or a link out of the directory."""


class StateError(MokaError, RuntimeError):
    """The call does not fit the present state, such as unmerging what is not merged."""


class NonFiniteError(MokaError, ArithmeticError):
    """A loss, a gradient or a tensor is NaN or infinite."""


class NativeError(MokaError, ImportError):
    """The compiled extension is missing or was built for another torch."""

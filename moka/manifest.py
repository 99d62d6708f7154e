"""The manifest: everything an adapter file says about itself, as one JSON text in the safetensors metadata.

    {"config": {...}, "base": {...}, "shapes": [[component, ...], ...], "layers": {path: index into shapes},
     "checksums": [one per tensor, in the order of their names], "adapter_config": checksum of that file,
     "quantize": "int8" or "int4", in no other file, "digest": of all that}

It comes from an untrusted file, so nothing in it is run, imported or matched as a regular expression.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import FORMAT_VERSION, MokaConfig
from .errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, UnsafeFileError
from .safefile import strict_json
from .shapes import KronShape

BASE_FIELDS = ("model_type", "name_or_path", "task_type", "quantization", "digest")
FIELDS = tuple(field.name for field in fields(MokaConfig))
#: What peft keeps beside the fields of a method.
PEFT_FIELDS = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
#: How factors may be stored besides in floating point (`moka/packed.py`); another way gets another name.
SCHEMES = ("int8", "int4")
#: The `format_version` in `adapter_config.json` then, which readers of floating-point tensors alone refuse.
PACKED_VERSION = 2
LITERAL = re.compile(r"[\w.-]+")  # matches itself alone, and costs nothing to match


@dataclass(frozen=True)
class Manifest:
    """What an adapter file says about itself.

    Attributes:
        config: free of regular expressions, see `portable`.
        base: `BASE_FIELDS`, see `moka.fingerprint`.
        shapes: path of each adapted layer -> its components.
        checksums: one per tensor, in the order of their names.
        adapter_config: checksum of the `adapter_config.json` that was written with it.
        quantize: one of `SCHEMES`, or None for factors in floating point.
    """

    config: MokaConfig
    base: dict[str, str]
    shapes: dict[str, tuple[KronShape, ...]]
    checksums: tuple[str, ...]
    adapter_config: str
    quantize: str | None = None

    def to_text(self) -> str:
        """The manifest as JSON; equal manifests give equal text."""
        kinds = list(dict.fromkeys(self.shapes.values()))
        body = {
            "config": self.config.to_dict(),
            "base": self.base,
            "shapes": [[shape.fields for shape in kind] for kind in kinds],
            "layers": {path: kinds.index(shapes) for path, shapes in self.shapes.items()},
            "checksums": self.checksums,
            "adapter_config": self.adapter_config,
            **({"quantize": self.quantize} if self.quantize else {}),
        }
        return _dumps({**body, "digest": _digest(body)})

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            CheckpointFormatError: damaged, or not a manifest.
            UnsafeFileError: the configuration names code or holds a regular expression.
            ConfigError: a value is out of range, or the format is newer than this moka.
        """
        body = strict_json(text, where)
        expected = {"config", "base", "shapes", "layers", "checksums", "adapter_config", "digest"}
        if not isinstance(body, dict) or body.keys() - {"quantize"} != expected:
            raise CheckpointFormatError(f"{where}: the manifest must have the fields {sorted(expected)}")
        if body.pop("digest") != _digest(body):
            raise CheckpointFormatError(f"{where}: the manifest is corrupt, its digest does not match")
        if "quantize" in body and body["quantize"] not in SCHEMES:
            raise ConfigError(
                f"{where}: the factors are stored as {str(body['quantize'])[:40]!r}, this moka reads "
                f"{SCHEMES}; install a newer moka"
            )
        base, kinds, layers = body["base"], body["shapes"], body["layers"]
        checksums, adapter_config = body["checksums"], body["adapter_config"]
        if (
            not isinstance(base, dict)
            or base.keys() != set(BASE_FIELDS)
            or not all(
                isinstance(value, str) for value in (*base.values(), *_list(checksums), adapter_config)
            )
            or not all(_is_shape(shape) for kind in _list(kinds) for shape in _list(kind))
            or not isinstance(layers, dict)
            or not all(type(i) is int and 0 <= i < len(_list(kinds)) for i in layers.values())
            or not isinstance(checksums, list)
        ):
            raise CheckpointFormatError(f"{where}: the manifest has a field of the wrong type")
        shapes = {path: tuple(KronShape(*shape) for shape in kinds[index]) for path, index in layers.items()}
        config = _read_config(body["config"], where)
        return cls(config, base, shapes, tuple(checksums), adapter_config, body.get("quantize"))


def adapter_config_text(config: MokaConfig, base: Mapping[str, str], quantize: str | None = None) -> str:
    """The text of `adapter_config.json`, with the fields that peft and model hubs look for."""
    packed = {"format_version": PACKED_VERSION, "quantize": quantize} if quantize else {}
    hub = {
        "peft_type": "MOKA",
        "task_type": base["task_type"] or None,
        "base_model_name_or_path": base["name_or_path"],
        "inference_mode": True,
    }
    return json.dumps({**hub, **config.to_dict(), **packed}, indent=2) + "\n"


def portable(config: MokaConfig, paths: list[str]) -> MokaConfig:
    """The configuration with every regular expression replaced by the paths it selected.

    Args:
        config: as given to `inject`.
        paths: of the layers it adapted.
    """
    changes: dict[str, Any] = {}
    targets, exclude = config.target_modules, config.exclude_modules
    if isinstance(exclude, str) or (isinstance(targets, str) and targets != "all-linear"):
        changes |= {"target_modules": tuple(paths), "exclude_modules": ()}
    # the first key that matches the end of a path counts, so the longest path comes first
    longest_first = sorted(paths, key=len, reverse=True)
    if not _is_literal(config.r_pattern):
        changes["r_pattern"] = {path: config.r_for(path) for path in longest_first}
    if isinstance(config.shapes, Mapping) and not _is_literal(config.shapes):
        changes["shapes"] = {path: config.shapes_for(path) for path in longest_first}
    return replace(config, **changes)


def from_peft(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of moka's configuration out of one for peft, in which None may stand for the default."""
    own = {name: values[name] for name in ("format_version", *FIELDS) if name in values}
    optional = ("target_modules", "exclude_modules", "modules_to_save")
    return {name: value for name, value in own.items() if value is not None or name not in optional}


def read_peft_config(text: str, where: str) -> MokaConfig:
    """The configuration in an `adapter_config.json` that peft saved, under the same rules as a manifest.

    What peft adds is checked for its type and not used: it names a base model, a library and a class.

    Raises:
        CheckpointFormatError: damaged, or not the configuration of a MoKA adapter.
        CheckpointMismatchError: the adapter trains tokens, which peft alone can load.
        UnsafeFileError, ConfigError: as for a manifest.
    """
    values = strict_json(text, where)
    if not isinstance(values, dict) or "format_version" not in values or values.get("peft_type") != "MOKA":
        got = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointFormatError(f"{where}: got peft_type {str(got)[:40]!r}, expected an adapter of MOKA")
    for name in PEFT_FIELDS:
        value = values.pop(name, None)
        parts = value.values() if name == "auto_mapping" and isinstance(value, dict) else [value]
        if not all(part is None or isinstance(part, (str, bool)) for part in parts):
            raise CheckpointFormatError(f"{where}: field {name!r} is of the wrong type")
    if values.pop("trainable_token_indices", None) is not None:
        raise CheckpointMismatchError(
            f"{where}: the adapter trains tokens (trainable_token_indices); use peft"
        )
    unknown = sorted(values.keys() - {"format_version", *FIELDS})
    return _read_config({**from_peft(values), **{name: values[name] for name in unknown}}, where)


def _read_config(values: Any, where: str) -> MokaConfig:
    if not isinstance(values, dict):
        raise CheckpointFormatError(f"{where}: the configuration is not a table")
    known = {"format_version", *FIELDS}
    if values.get("format_version") == FORMAT_VERSION and (unknown := sorted(values.keys() - known)):
        raise UnsafeFileError(
            f"{where}: configuration field {unknown[0]!r} is unknown; moka follows no other name in a file"
        )
    try:
        config = MokaConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    for name, literal in (
        (
            "target_modules",
            config.target_modules == "all-linear" or not isinstance(config.target_modules, str),
        ),
        ("exclude_modules", not isinstance(config.exclude_modules, str)),
        ("r_pattern", _is_literal(config.r_pattern)),
        ("shapes", not isinstance(config.shapes, Mapping) or _is_literal(config.shapes)),
    ):
        if not literal:
            raise UnsafeFileError(
                f"{where}: configuration field {name!r} is a regular expression, expected module names; "
                f"matching one from an untrusted file can take forever"
            )
    return config


def _is_literal(patterns: Mapping[str, Any]) -> bool:
    return all(LITERAL.fullmatch(key) for key in patterns)


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (5, 7):
        return False
    return all(type(size) is int for size in value[:5]) and all(type(kind) is str for kind in value[5:])


def _list(value: Any) -> list:
    """The list itself, or one that fails every check of its items."""
    return value if isinstance(value, list) else [None]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_dumps(body).encode()).hexdigest()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

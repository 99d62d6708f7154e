"""Reads untrusted safetensors files and replaces files atomically.

An adapter file comes from anywhere, so every byte that decides something is checked before `safetensors` sees
it, on one open descriptor: the bytes that were checked are the bytes that are loaded.

    file = header length (8 bytes, little endian) | header (JSON) | tensor data, without holes
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointFormatError, UnsafeFileError

MAX_TENSORS = 4096
HEADER_BYTES_PER_TENSOR = 256
MAX_HEADER_BYTES = MAX_TENSORS * HEADER_BYTES_PER_TENSOR  # 1 MiB
MAX_DEPTH = 8
MAX_DIGITS = 19  # an int64
MAX_DIMS = 4
#: Bytes per entry; an adapter holds floating-point tensors alone, unless its factors are in 8 or 4 bits.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PACKED_BYTES = {**DTYPE_BYTES, "I8": 1, "U8": 1}

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class TensorEntry(NamedTuple):
    """What the header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """A checked safetensors header; `raw` is the file up to the tensor data."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    raw: bytes


def strict_json(text: str, where: str) -> Any:
    """`json.loads` without what Python adds to JSON, and bounded.

    Refuses duplicate keys, NaN, infinities (also as 1e400), integers of more than `MAX_DIGITS` digits,
    escaped surrogates and nesting deeper than `MAX_DEPTH`.

    Raises:
        CheckpointFormatError: naming `where` and the reason.
    """

    def fail(reason: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{where}: {reason}; the file is damaged or was not written by moka")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise fail(f"duplicate key {key[:100]!r}")
            keys[key] = value
        return keys

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS or digits == "-0":
            raise fail(f"got the integer {digits[:24]}, expected at most {MAX_DIGITS} digits")
        return int(digits)

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise fail(f"got the number {digits[:24]}, expected a finite one")
        return value

    def constant(name: str) -> float:
        raise fail(f"got {name}, expected a finite number")

    if _SURROGATE.search(text):
        raise fail("escaped surrogates are not accepted in strings")
    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=integer, parse_float=number, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        raise fail(f"not JSON ({error})") from error
    except RecursionError:
        raise fail(f"nested too deeply, expected at most {MAX_DEPTH} levels") from None
    if not _nested_within(value, MAX_DEPTH):
        raise fail(f"nested too deeply, expected at most {MAX_DEPTH} levels")
    return value


def _nested_within(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return children is None or (levels > 0 and all(_nested_within(child, levels - 1) for child in children))


@contextmanager
def open_untrusted(directory: str | Path, name: str) -> Iterator[int]:
    """A read-only descriptor of the regular file `directory/name`; never blocks, never leaves the directory.

    Raises:
        UnsafeFileError: a link that leads out of the directory, a FIFO, a device or a directory.
        FileNotFoundError, NotADirectoryError: no such file.
    """
    path = Path(directory) / name
    real = Path(os.path.realpath(path))
    if real.parent != Path(os.path.realpath(directory)):
        raise UnsafeFileError(f"{path}: leads to {real}, outside its directory; copy the file itself there")
    try:
        status = os.lstat(real)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise type(error)(
            f"{path}: cannot be read ({error}); expected the folder of a saved adapter"
        ) from None
    _require_regular(status, path)
    # a link or a FIFO that takes the place of the file after the check makes open fail, or is seen below
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(descriptor), path)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"{path}: expected a regular file, got {stat.filemode(status.st_mode)}")


def read_header(
    descriptor: int,
    where: str,
    max_tensors: int = MAX_TENSORS,
    dtypes: Mapping[str, int] = DTYPE_BYTES,
) -> Header:
    """Reads and checks the header of an open safetensors file; the tensor data are not touched.

    Args:
        descriptor: of `open_untrusted`.
        where: the path, for messages.
        max_tensors: the most tensors accepted; the header may have `HEADER_BYTES_PER_TENSOR` bytes for each.
        dtypes: those accepted, with the bytes of an entry.

    Raises:
        CheckpointFormatError: naming the path and what is wrong.
    """

    def fail(reason: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{where}: {reason}; the file is damaged, fetch or save it again")

    file_size = os.fstat(descriptor).st_size
    cap = max_tensors * HEADER_BYTES_PER_TENSOR
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if file_size < 8 or not 2 <= length <= min(cap, file_size - 8):
        raise fail(f"header of {length} bytes, expected 2 to {cap} within the file's {file_size}")
    raw = os.pread(descriptor, 8 + length, 0)
    try:
        text = raw[8:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"header is not UTF-8 ({error.reason} at byte {error.start})") from error
    if len(raw) != 8 + length or not text.startswith("{"):
        raise fail("the header does not begin with '{'")
    entries = strict_json(text, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("__metadata__ is not a table of strings")
    if len(entries) > max_tensors:
        raise fail(f"{len(entries)} tensors, expected at most {max_tensors}")

    tensors = {name: _tensor_entry(name, entry, dtypes, fail) for name, entry in entries.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != position:
            raise fail(f"tensor {name!r} begins at byte {entry.start} of the data, expected {position}")
        position = entry.end
    if 8 + length + position != file_size:
        raise fail(f"{8 + length + position} bytes are described, the file has {file_size}")
    return Header(tensors, metadata, raw)


def _tensor_entry(name: str, entry: Any, dtypes: Mapping[str, int], fail: Any) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail(f"tensor {name!r}: expected the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise fail(f"tensor {name!r}: dtype {str(dtype)[:40]!r}, expected one of {sorted(dtypes)}")
    if not _is_size_list(shape) or len(shape) > MAX_DIMS or 0 in shape:
        raise fail(f"tensor {name!r}: shape {str(shape)[:80]}, expected at most {MAX_DIMS} positive sizes")
    if not _is_size_list(offsets) or len(offsets) != 2:
        raise fail(f"tensor {name!r}: data_offsets {str(offsets)[:80]}, expected two positions")
    nbytes = math.prod(shape) * dtypes[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise fail(f"tensor {name!r}: {nbytes} bytes by its shape, {offsets[1] - offsets[0]} by its offsets")
    return TensorEntry(dtype, tuple(shape), *offsets)


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_all(descriptor: int, where: str, header: Header) -> bytes:
    """The whole file as bytes, read once and beginning with the checked header.

    Raises:
        CheckpointFormatError: the file was changed since its header was read.
    """
    size = os.fstat(descriptor).st_size
    data = bytearray()
    while len(data) < size and (chunk := os.pread(descriptor, min(size - len(data), 1 << 26), len(data))):
        data += chunk
    described = len(header.raw) + max((entry.end for entry in header.tensors.values()), default=0)
    if len(data) != described or not data.startswith(header.raw):
        raise CheckpointFormatError(f"{where}: the file was changed while it was read; load it again")
    return bytes(data)


def read_text(descriptor: int, where: str) -> str:
    """The text of an open file of at most `MAX_HEADER_BYTES`.

    Raises:
        CheckpointFormatError: it is longer, or not UTF-8.
    """
    data = os.pread(descriptor, MAX_HEADER_BYTES + 1, 0)
    if len(data) > MAX_HEADER_BYTES:
        raise CheckpointFormatError(f"{where}: more than {MAX_HEADER_BYTES} bytes; no adapter needs as many")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointFormatError(
            f"{where}: is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`; a crash at any point leaves the old or the new file, whole and durable.

    The bytes go to a hidden file beside it (`.<name>.<random>.tmp`), are flushed, and the file is renamed. A
    process that is killed in between leaves that file behind; it can be deleted.

    Raises:
        OSError: with the path; the old file is intact and the hidden file is gone.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable: it is an entry of the directory, which has its own cache."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

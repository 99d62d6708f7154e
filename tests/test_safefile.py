"""The strict reader of untrusted files, and atomic replacement."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka import safefile
from moka.errors import CheckpointFormatError, UnsafeFileError

TENSORS = {
    "a.moka_A": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
}
FILE = safetensors.torch.save(TENSORS, {"moka": "{}"})


def forge(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(directory: Path, data: bytes, max_tensors: int = safefile.MAX_TENSORS) -> safefile.Header:
    (directory / "f").write_bytes(data)
    with safefile.open_untrusted(directory, "f") as descriptor:
        header = safefile.read_header(descriptor, "f", max_tensors)
        assert safefile.read_all(descriptor, "f", header) == data
        return header


def assert_agrees(header: safefile.Header, data: bytes) -> None:
    """What the strict reader accepts, safetensors reads with the same names, shapes and dtypes."""
    loaded = dict(safetensors.deserialize(data))
    assert loaded.keys() == header.tensors.keys()
    for name, e in header.tensors.items():
        assert (loaded[name]["dtype"], loaded[name]["shape"]) == (e.dtype, list(e.shape))
        assert bytes(loaded[name]["data"]) == data[len(header.raw) :][e.start : e.end]


def test_reads_what_safetensors_writes(tmp_path):
    header = read(tmp_path, FILE)
    assert header.metadata == {"moka": "{}"}
    assert header.tensors["a.moka_A"][:2] == ("F32", (2, 3))
    assert_agrees(header, FILE)


DEEP = b'{"a":' * 9 + b"0" + b"}" * 9
FORGED = {
    "empty": b"",
    "seven bytes": b"\1" * 7,
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "header over the cap": (1 << 40).to_bytes(8, "little") + b"{}" * 40,
    "header of 2^64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": forge(b"{]"),
    "not UTF-8": forge(b'{"\xff":1}'),
    "leading space": forge(b" {}"),
    "a list": forge([]),
    "duplicate tensor": forge(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "deep": forge(DEEP),
    "very deep": forge(b'{"a":' + b"[" * 100_000),
    "NaN": forge(b'{"a":NaN}'),
    "infinite float": forge(b'{"a":1e400}'),
    "5000 digits": forge(b'{"a":' + b"1" * 5000 + b"}"),
    "minus zero": forge(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)),
    "lone surrogate": forge(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata is a list": forge({"__metadata__": []}),
    "metadata holds a number": forge({"__metadata__": {"moka": 1}}),
    "entry is a number": forge({"a": 1}),
    "extra field": forge({"a": entry([1], [0, 4]) | {"x": 1}}, bytes(4)),
    "missing field": forge({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "unknown dtype": forge({"a": entry([1], [0, 4], "I32")}, bytes(4)),
    "dtype is a list": forge({"a": entry([1], [0, 4], [])}, bytes(4)),
    "zero size": forge({"a": entry([0], [0, 0])}),
    "negative size": forge({"a": entry([-1], [0, -4])}),
    "size is a bool": forge({"a": entry([True], [0, 4])}, bytes(4)),
    "size is a float": forge({"a": entry([1.0], [0, 4])}, bytes(4)),
    "product overflows 64 bits": forge({"a": entry([2**62, 4], [0, 0])}),
    "rank 5": forge({"a": entry([1] * 5, [0, 4])}, bytes(4)),
    "offsets do not match the shape": forge({"a": entry([2], [0, 4])}, bytes(4)),
    "offset of 2^63 - 1": forge({"a": entry([1], [0, 2**63 - 1])}, bytes(4)),
    "three offsets": forge({"a": entry([1], [0, 4, 4])}, bytes(4)),
    "overlap": forge({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, bytes(8)),
    "hole": forge({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, bytes(12)),
    "trailing byte": FILE + b"\0",
    "too many tensors": forge({str(i): entry([1], [4 * i, 4 * i + 4]) for i in range(9)}, bytes(36)),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused(tmp_path, name):
    with pytest.raises(CheckpointFormatError, match=r"^f: "):
        read(tmp_path, FORGED[name], max_tensors=8)


def test_duplicate_key_is_named(tmp_path):
    with pytest.raises(CheckpointFormatError, match="duplicate key 'a'"):
        read(tmp_path, FORGED["duplicate tensor"])


def test_the_header_cap_is_one_mebibyte_and_checked_before_reading(tmp_path):
    (tmp_path / "f").write_bytes((1 << 21).to_bytes(8, "little"))
    os.truncate(tmp_path / "f", 1 << 40)  # sparse: a terabyte that must not be read
    start = time.perf_counter()
    with (
        safefile.open_untrusted(tmp_path, "f") as descriptor,
        pytest.raises(CheckpointFormatError, match=str(1 << 20)),
    ):
        safefile.read_header(descriptor, "f")
    assert time.perf_counter() - start < 0.1


def test_truncation_at_every_byte(tmp_path):
    for length in range(len(FILE)):
        with pytest.raises(CheckpointFormatError):
            read(tmp_path, FILE[:length])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_changed_bytes_are_refused_or_read_as_safetensors_reads_them(tmp_path_factory, data):
    changed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(FILE) - 1))] = data.draw(
            st.sampled_from(list(b'{}[]",:0123456789\\ \n')) | st.integers(0, 255)
        )
    try:
        header = read(tmp_path_factory.getbasetemp(), bytes(changed))
    except CheckpointFormatError:
        return
    assert_agrees(header, bytes(changed))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=4),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=4), child, max_size=3),
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=5) | JSON,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | JSON,
    }
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=3), st.integers(0, 16))
def test_hostile_headers(tmp_path_factory, header, size):
    data = forge(header, bytes(size))
    try:
        checked = read(tmp_path_factory.getbasetemp(), data)
    except CheckpointFormatError:
        return
    assert_agrees(checked, data)


def test_json_depth_counts_containers():
    assert safefile.strict_json('{"a":' * 8 + "0" + "}" * 8, "f")
    with pytest.raises(CheckpointFormatError, match="deep"):
        safefile.strict_json(DEEP.decode(), "f")
    assert safefile.strict_json('["' + "[{" * 50 + '"]', "f")  # brackets in a string are no nesting


def test_links_and_special_files(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "outside"
    inside.mkdir()
    outside.write_bytes(FILE)
    (inside / "real").write_bytes(FILE)
    (inside / "near").symlink_to("real")
    with safefile.open_untrusted(inside, "near") as descriptor:
        assert os.read(descriptor, len(FILE)) == FILE
    (inside / "far").symlink_to(outside)
    (inside / "up").symlink_to("../outside")
    (inside / "loop").symlink_to("loop")
    (inside / "null").symlink_to("/dev/null")
    (inside / "folder").mkdir()
    os.mkfifo(inside / "fifo")
    for name in ("far", "up", "loop", "null", "folder", "fifo"):
        with pytest.raises(UnsafeFileError, match=name), safefile.open_untrusted(inside, name):
            pass
    (tmp_path / "alias").symlink_to(inside)  # the directory itself may be a link
    with safefile.open_untrusted(tmp_path / "alias", "real"):
        pass


def test_a_swap_after_the_check_is_refused(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(FILE)
    monkeypatch.setattr(safefile, "_require_regular", lambda status, path: swap())

    def swap():
        monkeypatch.undo()
        (tmp_path / "f").unlink()
        os.mkfifo(tmp_path / "f")

    with pytest.raises(UnsafeFileError), safefile.open_untrusted(tmp_path, "f"):
        pass


@pytest.mark.parametrize("change", ["header", "shorter", "longer"])
def test_a_change_between_check_and_read_is_noticed(tmp_path, change):
    (tmp_path / "f").write_bytes(FILE)
    with safefile.open_untrusted(tmp_path, "f") as descriptor:
        header = safefile.read_header(descriptor, "f")
        with open(tmp_path / "f", "r+b") as file:
            if change == "header":
                file.write(FILE[:8] + FILE[8:].replace(b"F32", b"U32"))
            else:
                file.truncate(len(FILE) + (1 if change == "longer" else -1))
        with pytest.raises(CheckpointFormatError, match="changed while it was read"):
            safefile.read_all(descriptor, "f", header)


def test_write_atomic_replaces_and_keeps_an_open_mapping(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with open(path, "rb") as old:
        safefile.write_atomic(path, b"new" * 1000)
        assert (old.read(), path.read_bytes()) == (b"old", b"new" * 1000)
    assert os.listdir(tmp_path) == ["f"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    written = []

    def fail(*args, **kwargs):
        if call == "write" and not written:  # a disk fills up after some bytes
            written.append(1)
            return real(args[0], bytes(args[1][:2]))
        raise OSError(error, os.strerror(error))

    real = getattr(os, call)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as caught:
        safefile.write_atomic(path, b"new content")
    monkeypatch.undo()
    assert caught.value.errno == error
    assert caught.value.filename == str(path)
    assert (os.listdir(tmp_path), path.read_bytes()) == (["f"], b"old")


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        safefile.write_atomic(path, b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["f"], b"old")

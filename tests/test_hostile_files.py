"""Adapter files that are damaged or forged: a MokaError and an unchanged model, or an exact load."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from adapter_files import adapted, assert_refused, base, randomize, rewrite, same, state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moka
from moka import checkpoint
from moka.checkpoint import CONFIG, WEIGHTS
from moka.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    MokaError,
    NonFiniteError,
    UnsafeFileError,
)

_saved: dict[str, Path] = {}


def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small adapter, written once."""
    if "small" not in _saved:
        _saved["small"] = tmp_path_factory.mktemp("saved")
        model = adapted(model=nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], r=1)
        moka.save_adapter(model, _saved["small"])
    return _saved["small"]


@pytest.fixture
def damage(tmp_path_factory, tmp_path):
    """A function that loads changed bytes: True if they load exactly, False for MokaError and no change."""
    data = (saved(tmp_path_factory) / WEIGHTS).read_bytes()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4))
    moka.load_adapter(model, saved(tmp_path_factory), allow_base_mismatch=True)
    good = state(model)

    def load(changed: bytes) -> bool:
        (tmp_path / WEIGHTS).write_bytes(changed)
        randomize(model, 3)
        before = state(model)
        try:
            moka.load_adapter(model, tmp_path, allow_base_mismatch=True)
        except MokaError as error:
            assert str(tmp_path) in str(error)
            assert same(model, before)
            return False
        assert same(model, good)
        return True

    load.data = data  # pyright: ignore
    return load


def test_truncation_at_every_byte(damage):
    assert damage(damage.data)
    assert not any(damage(damage.data[:length]) for length in range(len(damage.data)))


def test_every_byte_changed(damage):
    data = damage.data
    for at in range(len(data)):
        damage(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
    payload = range(8 + int.from_bytes(data[:8], "little"), len(data))
    for at in payload:
        assert not damage(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


def test_a_changed_manifest_is_noticed(tmp_path):
    """Also where the change gives another valid configuration, which would load without a word."""
    moka.save_adapter(adapted(), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    assert data.count(rb"\"dropout\":0.0") == 1
    (tmp_path / WEIGHTS).write_bytes(data.replace(rb"\"dropout\":0.0", rb"\"dropout\":0.5"))
    assert_refused(base(), tmp_path, CheckpointFormatError, "manifest is corrupt")


def test_a_corrupt_tensor_is_named(tmp_path):
    moka.save_adapter(adapted(), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    assert_refused(
        base(), tmp_path, CheckpointFormatError, r"tensor base_model.model.1.v.moka_gate is corrupt"
    )


JUNK = st.recursive(
    st.sampled_from([None, True, -1, 0, 2**62, 1.5, "", "x", "a" * 99, "(a+)+$", "all-linear"]),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.sampled_from("qab0*"), child, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_hostile_manifests_with_valid_digests(tmp_path_factory, data):
    """Any part of the manifest replaced by something else, and the digests made right."""
    directory = tmp_path_factory.mktemp("hostile")
    for file in (WEIGHTS, CONFIG):
        (directory / file).write_bytes((saved(tmp_path_factory) / file).read_bytes())

    def edit(tensors: dict, body: dict) -> None:
        part: Any = body
        while isinstance(part, (dict, list)) and part:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = data.draw(st.sampled_from(keys))
            child = part[key]
            if not isinstance(child, (dict, list)) or not child or data.draw(st.booleans()):
                part[key] = data.draw(JUNK)
                return
            part = child

    rewrite(directory, edit)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4))
    before = state(model)
    try:
        moka.load_adapter(model, directory)
    except MokaError:
        assert same(model, before) and not getattr(model, "moka_config", {})


@pytest.mark.parametrize(
    "field, value",
    [
        ("auto_mapping", {"base_model_class": "os.system"}),
        ("target_modules", "(a+)+$"),
        ("exclude_modules", "(a+)+$"),
        ("r_pattern", {"(a+)+$": 1}),
        ("shapes", {"(a+)+$": "identity"}),
    ],
)
def test_a_configuration_with_more_than_data(tmp_path, field, value):
    moka.save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, lambda tensors, body: body["config"].update({field: value}))
    assert_refused(base(), tmp_path, UnsafeFileError, f"'{field}'")


def test_a_newer_format_names_both_versions(tmp_path):
    moka.save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, lambda tensors, body: body["config"].update(format_version=99, new_field=1))
    with pytest.raises(ConfigError, match=r"99.* 1;"):
        moka.load_adapter(base(), tmp_path)


def test_a_huge_configuration_allocates_nothing(tmp_path):
    moka.save_adapter(adapted(target_modules=["q"]), tmp_path)
    rewrite(tmp_path, lambda tensors, body: body["config"].update(shapes=[[16, 16, 1, 1]] * 1024))
    assert_refused(base(), tmp_path, CheckpointMismatchError, r"expected F32 \[262144\]")


def test_a_file_of_another_library(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    assert_refused(base(), tmp_path, CheckpointFormatError, "no manifest")


def test_too_many_tensors(tmp_path):
    safetensors.torch.save_file({str(i): torch.ones(1) for i in range(4097)}, tmp_path / WEIGHTS)
    assert_refused(base(), tmp_path, CheckpointFormatError, "4097 tensors, expected at most 4096")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(tmp_path, value):
    model = adapted()
    moka.save_adapter(model, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    model[0].q.moka_B["default"].data[0] = value
    with pytest.raises(NonFiniteError, match=r"0\.q\.moka_B"):
        moka.save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before

    def poison(tensors, body):
        tensors["base_model.model.0.q.moka_B"][0] = value

    rewrite(tmp_path, poison)
    assert_refused(base(), tmp_path, NonFiniteError, r"0\.q\.moka_B.*allow_nonfinite")
    loaded = moka.load_adapter(base(), tmp_path, allow_nonfinite=True)
    assert not loaded[0].q.moka_B["default"].isfinite().all()


_unpickled: list[str] = []
sys.addaudithook(lambda event, args: _unpickled.append(event) if event == "pickle.find_class" else None)


@pytest.mark.parametrize("suffix", checkpoint.PICKLES)
def test_pickles_are_not_opened(tmp_path, suffix):
    torch.save({"a": torch.ones(1)}, tmp_path / f"adapter_model{suffix}")
    _unpickled.clear()
    for path in (tmp_path, tmp_path / f"adapter_model{suffix}"):
        with pytest.raises(UnsafeFileError, match=rf"adapter_model{re.escape(suffix)}: .*pickle"):
            moka.load_adapter(base(), path)
    (tmp_path / f"adapter_model{suffix}").rename(tmp_path / WEIGHTS)
    assert_refused(base(), tmp_path, CheckpointFormatError, "header")
    assert _unpickled == []


def test_links_and_fifos(tmp_path):
    moka.save_adapter(adapted(), tmp_path / "real")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / WEIGHTS).symlink_to(tmp_path / "real" / WEIGHTS)
    assert_refused(base(), tmp_path / "link", UnsafeFileError, "outside its directory")
    for file in (CONFIG, WEIGHTS):
        (tmp_path / "real" / file).unlink()
        os.mkfifo(tmp_path / "real" / file)
        assert_refused(base(), tmp_path / "real", UnsafeFileError, f"{file}.*regular file")

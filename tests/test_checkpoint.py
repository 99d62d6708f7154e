"""Adapter files: round trips, files that do not fit, hostile files, and crashes while saving."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moka
from moka import checkpoint, manifest, safefile
from moka.checkpoint import CONFIG, WEIGHTS
from moka.errors import (
    BaseMismatchError,
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    MokaError,
    NonFiniteError,
    StateError,
    UnsafeFileError,
)

DEFAULTS: dict[str, Any] = {"target_modules": ["q", "v"], "r": 3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)


def base(seed: int = 0, blocks: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def adapted(seed: int = 1, model: nn.Module | None = None, **config: Any) -> nn.Module:
    """A model with an adapter "default" whose every tensor is random."""
    model = moka.inject(model or base(), moka.MokaConfig(**{**DEFAULTS, **config}))
    return randomize(model, seed)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Edits tensors and manifest of a file and makes its digests right again, as an attacker would."""
    data = (directory / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors, body = safetensors.torch.load(data), json.loads(header["__metadata__"]["moka"])
    del body["digest"]
    before = body["checksums"]
    edit(tensors, body)
    if body.get("checksums") == before:
        body["checksums"] = checkpoint._checksums(tensors)
    text = json.dumps({**body, "digest": manifest._digest(body)}, separators=(",", ":"), ensure_ascii=False)
    (directory / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"moka": text}))
    (directory / CONFIG).unlink()


CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no gate": {"gate": "none"},
    "linear gate": {"gate": "linear", "scale": 2.5},
    "bf16 factors": {"adapter_dtype": "bfloat16"},
    "MoKA_s": {"shapes": "identity", "r": 2},
    "identities on one side": {"shapes": {"q": [[4, 4, 4, 4, 1]], "v": "balanced"}},
    "all-linear": {"target_modules": "all-linear", "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.(q|v)", "r_pattern": {r"0\.[vw]": 2}, "shapes": {"(q)": "identity"}},
    "regex excludes": {"exclude_modules": r"0\.q"},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "not strict": {"strict": False, "dropout": 0.1, "path": "factored"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact_and_byte_identical(tmp_path, name):
    model, x = adapted(**CONFIGS[name]).eval(), torch.randn(5, 16)
    moka.save_adapter(model, tmp_path / "a")
    fresh = moka.load_adapter(base(), tmp_path / "a").eval()
    assert same(fresh, state(model))
    assert torch.equal(fresh[1].norm(fresh[1].v(fresh[1].q(x))), model[1].norm(model[1].v(model[1].q(x))))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    moka.save_adapter(fresh, tmp_path / "b")
    randomize(fresh, 7)
    moka.load_adapter(fresh, tmp_path / "b")  # into the adapter that is there
    assert same(fresh, state(model))
    moka.save_adapter(fresh, tmp_path / "c")
    for file in (WEIGHTS, CONFIG):
        assert len({(tmp_path / d / file).read_bytes() for d in "abc"}) == 1


def test_keys_and_configuration_are_what_peft_looks_for(tmp_path):
    moka.save_adapter(adapted(modules_to_save=["norm"]), tmp_path)
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        keys = set(file.keys())
        assert list(file.metadata()) == ["moka"]
    assert {
        f"base_model.model.{i}.{m}" for i in "01" for m in ("q.moka_A", "v.moka_gate", "norm.weight")
    } < keys
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "MOKA" and config["target_modules"] == ["q", "v"]
    assert moka.MokaConfig.from_dict({k: v for k, v in config.items() if k in {"format_version", "r"}}).r == 3


def test_an_adapter_survives_a_cast_of_the_model(tmp_path):
    model = adapted()
    moka.save_adapter(model.bfloat16(), tmp_path)
    assert moka.load_adapter(base(), tmp_path)[0].q.moka_gate["default"].dtype == torch.float32


def test_a_second_adapter_beside_the_first(tmp_path):
    moka.save_adapter(adapted(2), tmp_path)
    model = adapted(1, r=2)
    before = state(model)
    with pytest.raises(CheckpointMismatchError, match=r"r 3 \(in the model 2\).*another name"):
        moka.load_adapter(model, tmp_path)
    assert same(model, before)
    moka.load_adapter(model, tmp_path, "second")
    assert torch.equal(model[0].q.moka_A["second"], adapted(2)[0].q.moka_A["default"])
    assert moka.active_adapters(model) == ["second"]
    moka.save_adapter(model, tmp_path / "again", "second")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


# Files that do not fit the model


def assert_refused(
    model: nn.Module, directory: Path, error: type[Exception], match: str, **flags: bool
) -> None:
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        moka.load_adapter(model, directory, **flags)
    assert str(directory) in str(caught.value)
    assert same(model, before) and not getattr(model, "moka_config", {})


def test_another_model_is_named(tmp_path):
    moka.save_adapter(adapted(), tmp_path)
    assert_refused(
        base(blocks=7),
        tmp_path,
        CheckpointMismatchError,
        r"30 missing: base_model.model.2.q.moka_A(, [^,]*){9}, \.\.\.",
    )
    assert_refused(
        base(blocks=1), tmp_path, CheckpointMismatchError, r"6 unexpected: 'base_model.model.1.q.moka_A'"
    )
    wide = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(16, 32), "v": nn.Linear(16, 8)}) for _ in "ab"))
    assert_refused(
        wide, tmp_path, CheckpointMismatchError, r"shape or dtype: .*0.q.moka_A F32 \[48\] \(expected F32 \["
    )
    assert_refused(
        nn.Sequential(nn.Linear(16, 16)), tmp_path, CheckpointMismatchError, "'q' matches no module"
    )


def test_other_components_of_equal_size(tmp_path):
    moka.save_adapter(adapted(shapes=[[4, 4, 4, 4]], target_modules=["q"]), tmp_path)

    def swap(tensors, body):
        body["config"]["shapes"] = [[2, 8, 8, 2]]

    rewrite(tmp_path, swap)
    assert_refused(
        base(), tmp_path, CheckpointMismatchError, r"0\.q has the components \['4x4\*4x4'\], .*'2x8\*8x2'"
    )


def test_other_weights_of_the_same_shape(tmp_path):
    moka.save_adapter(adapted(), tmp_path)
    assert_refused(
        base(seed=5),
        tmp_path,
        BaseMismatchError,
        r"Sequential.*\(.{16}\).*Sequential.*\(.{16}\).*allow_base_mismatch",
    )
    model = moka.load_adapter(base(seed=5), tmp_path, allow_base_mismatch=True)
    assert torch.equal(model[0].q.moka_B["default"], adapted()[0].q.moka_B["default"])


def test_the_dtype_of_a_dense_base_does_not_matter(tmp_path):
    moka.save_adapter(adapted(), tmp_path)
    moka.load_adapter(base().bfloat16(), tmp_path)


@pytest.mark.parametrize("blocksize, double_quant", [(64, False), (128, True)])
def test_another_quantization(tmp_path, blocksize, double_quant):
    moka.save_adapter(adapted(model=moka.quantize(base())), tmp_path)
    ours = "'nf4, blocksize 64, double quantization'"
    assert_refused(base(), tmp_path, BaseMismatchError, f"{ours}, the model has 'none'.*allow_base_mismatch")
    other = f"nf4, blocksize {blocksize}{', double quantization' if double_quant else ''}"
    model = moka.quantize(base(), blocksize, double_quant)
    assert_refused(model, tmp_path, BaseMismatchError, f"{ours}, the model has '{other}'")
    moka.load_adapter(moka.quantize(base()), tmp_path)
    moka.load_adapter(base(), tmp_path, allow_base_mismatch=True)


def test_bitsandbytes_and_our_quantization_share_adapters(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = base()
    for block in theirs:
        for name, bias in (("q", True), ("v", False)):
            old = getattr(block, name)
            new = bnb.nn.Linear4bit(16, old.out_features, bias, quant_type="nf4", compress_statistics=True)
            new.load_state_dict(old.state_dict())
            setattr(block, name, new)
    moka.save_adapter(adapted(model=theirs.to("cpu")), tmp_path / "bnb")
    moka.save_adapter(moka.load_adapter(moka.quantize(base()), tmp_path / "bnb"), tmp_path / "moka")
    assert (tmp_path / "bnb" / WEIGHTS).read_bytes() == (tmp_path / "moka" / WEIGHTS).read_bytes()


# States and names


def test_states_that_do_not_fit(tmp_path):
    model = adapted()
    with pytest.raises(StateError, match=r"'other'.*'default'"):
        moka.save_adapter(model, tmp_path, "other")
    moka.save_adapter(model, tmp_path)
    moka.merge(model)
    for call in (moka.save_adapter, moka.load_adapter):
        with pytest.raises(StateError, match="unmerge"):
            call(model, tmp_path)
    with torch.device("meta"):
        model = base()
    with pytest.raises(StateError, match="meta"):
        moka.load_adapter(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        moka.load_adapter(base(), tmp_path / "nothing-here")


def test_a_regular_expression_without_an_equivalent_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    moka.inject(model, moka.MokaConfig(target_modules="0", r=1))  # the name "0" would select 1.0 too
    with pytest.raises(ConfigError, match="inject with names"):
        moka.save_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/abs", "a\0b", "", "a" * 300, "a.b", "‮x", "-a", "a\n"])
def test_hostile_adapter_names(tmp_path, name):
    for call in (moka.save_adapter, moka.load_adapter):
        with pytest.raises(ConfigError, match=re.escape("[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")):
            call(adapted(), tmp_path / "x", name)
    assert not (tmp_path / "x").exists()


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=70))
def test_any_other_name_is_refused_before_a_file_is_made(tmp_path_factory, name):
    directory = tmp_path_factory.getbasetemp() / "named"
    valid = re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name)
    with pytest.raises(StateError if valid else ConfigError):
        moka.save_adapter(base(), directory, name)
    assert not directory.exists()


# Damaged and hostile files

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


@pytest.mark.parametrize("adapters", [[], ["first"], ["default"]])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_load_changes_nothing(tmp_path, monkeypatch, adapters, at):
    moka.save_adapter(adapted(), tmp_path)
    model, calls, real = base(), [], torch.Tensor.copy_
    for name in adapters:
        randomize(moka.inject(model, moka.MokaConfig(**DEFAULTS), name), 5)
    before = state(model)

    def copy_(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        moka.load_adapter(model, tmp_path)
    monkeypatch.undo()
    assert same(model, before)
    assert list(getattr(model, "moka_config", {})) == moka.active_adapters(model) == adapters
    moka.load_adapter(model, tmp_path)  # and once more, without the interrupt
    assert torch.equal(model[0].q.moka_A["default"], adapted()[0].q.moka_A["default"])


# Crashes while saving

KILLED = """
import os, signal, sys
import torch
sys.path[:0] = [{tests!r}]
from test_checkpoint import adapted
import moka
torch.set_num_threads(1)
model, old = adapted(2), adapted(1)

def save_and_die(directory, at):
    calls = 0
    def wrap(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in ("open", "write", "fsync", "close", "replace"):
        wrap(name)
    moka.save_adapter(model, directory)
    os._exit(0)

for at in range(1, 100):
    directory = os.path.join(sys.argv[1], str(at))
    moka.save_adapter(old, directory)
    child = os.fork()
    if child == 0:
        save_and_die(directory, at)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_killed_save_leaves_the_old_or_the_new_adapter(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    old, new, outcomes = state(adapted(1)), state(adapted(2)), []
    for directory in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        model = base()
        config = json.loads((directory / CONFIG).read_text())  # whole, old or new
        assert config["r"] == 3
        moka.load_adapter(model, directory)
        assert same(model, old) or same(model, new)
        outcomes.append(same(model, new))
    # two files, each: open, write, sync, close, replace, then open, sync, close of the directory
    assert len(outcomes) == 17
    assert outcomes == [False] * 5 + [True] * 12
    assert not list((tmp_path / "17").glob(".*"))


def test_killed_between_the_two_files(tmp_path, monkeypatch):
    """The new adapter beside the old adapter_config.json loads whole, and the next save repairs the copy."""
    moka.save_adapter(adapted(1), tmp_path)
    old_config, new = (tmp_path / CONFIG).read_bytes(), adapted(2, r=5)
    moka.save_adapter(new, tmp_path)
    (tmp_path / CONFIG).write_bytes(old_config)
    with pytest.warns(UserWarning, match=rf"{CONFIG} differs.*{WEIGHTS}"):
        model = moka.load_adapter(base(), tmp_path)
    assert same(model, state(new)) and model.moka_config["default"].r == 5
    moka.save_adapter(model, tmp_path)
    moka.load_adapter(base(), tmp_path)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_full_disk(tmp_path, monkeypatch, file):
    moka.save_adapter(adapted(1), tmp_path)
    before = (tmp_path / file).read_bytes()
    real = safefile.write_atomic

    def write_atomic(path: Path, data: bytes) -> None:
        def full(descriptor, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if path.name == file:
                patch.setattr(os, "write", full)
            real(path, data)

    monkeypatch.setattr(safefile, "write_atomic", write_atomic)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{file}'"):
        moka.save_adapter(adapted(2, r=5), tmp_path)
    assert (tmp_path / file).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_saving_over_a_mapped_file(tmp_path):
    old, new = adapted(1), adapted(2)
    moka.save_adapter(old, tmp_path)
    key = "base_model.model.0.q.moka_A"
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as mapped:
        moka.save_adapter(new, tmp_path)
        assert torch.equal(mapped.get_tensor(key), old[0].q.moka_A["default"])
    assert same(moka.load_adapter(base(), tmp_path), state(new))


@pytest.mark.filterwarnings("ignore:.*differs from the configuration")
def test_two_writers_leave_one_whole_winner(tmp_path):
    models = [adapted(1), adapted(2, r=5)]
    failures: list[BaseException] = []

    def write(model: nn.Module) -> None:
        try:
            for _ in range(20):
                moka.save_adapter(model, tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for _ in range(20):
        if (tmp_path / WEIGHTS).exists():
            loaded = moka.load_adapter(base(), tmp_path)
            assert any(same(loaded, state(model)) for model in models), "a mixture of two adapters"
    for thread in threads:
        thread.join()
    assert failures == []
    loaded = moka.load_adapter(base(), tmp_path)
    assert any(same(loaded, state(model)) for model in models), "a mixture of two adapters in the end"
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_adapters_of_earlier_releases_load():
    for directory in sorted((Path(__file__).parent / "data").glob("adapter_*")):
        model = moka.load_adapter(release_base(), directory)
        for i, block in enumerate(model):
            for j, table in enumerate((block.q.moka_A, block.q.moka_B, block.q.moka_gate)):
                n = table["default"].numel()
                assert torch.equal(table["default"], torch.arange(1.0, n + 1) / (n * (1 + i + j)))
        gate = (torch.tensor([1.0, 2.0, 3.0]) / 9).softmax(0)
        assert torch.allclose(model[0].q.alpha("default"), 3 * gate)


def release_base() -> nn.Module:
    """The base of the committed adapters; small integers, since random numbers depend on torch's version."""
    model = base()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = (torch.arange(parameter.numel()).view(parameter.shape) * (i + 1) % 7 - 3).float()
    return model

"""Adapter files: round trips, and files that do not fit the model."""

import json
import re
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
from moka.checkpoint import CONFIG, WEIGHTS
from moka.errors import (
    BaseMismatchError,
    CheckpointMismatchError,
    ConfigError,
    StateError,
)
from moka.inject import holds_adapters_of_peft


def one_process(model):
    """DistributedDataParallel, as far as names go, without a group of processes."""
    wrapper = type("DistributedDataParallel", (nn.Module,), {})()
    wrapper.module = model
    return wrapper


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


@pytest.mark.parametrize("wrap", [torch.compile, one_process], ids=["compiled", "DistributedDataParallel"])
def test_names_in_the_file_are_those_of_the_model_inside(tmp_path, wrap):
    model = adapted()
    moka.save_adapter(model, tmp_path / "a")
    wrapped = wrap(model)
    moka.save_adapter(wrapped, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    expected = state(model)
    randomize(model, 7)
    assert moka.load_adapter(wrapped, tmp_path / "a") is wrapped
    assert same(model, expected)
    moka.set_adapter(wrapped, "default")
    assert not holds_adapters_of_peft(wrapped)
    with pytest.raises(StateError, match=r"wrapped already .*; call moka\.load_adapter first"):
        moka.load_adapter(wrapped, tmp_path / "a", "another")


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


def test_components_that_a_rule_chose_otherwise_when_the_file_was_saved(tmp_path):
    model = adapted(shapes=[[2, 8, 8, 2], [4, 4, 4, 4]], target_modules=["q"])
    moka.save_adapter(model, tmp_path)

    def by_rule(tensors, body):
        body["config"].update(shapes="balanced", r=2)

    rewrite(tmp_path, by_rule)
    loaded = moka.load_adapter(base(), tmp_path)
    assert same(loaded, state(model)) and loaded[1].q.shapes == model[1].q.shapes
    moka.save_adapter(loaded, tmp_path / "again")
    moka.load_adapter(loaded, tmp_path)  # into the adapter that is there
    assert same(moka.load_adapter(base(), tmp_path / "again"), state(model))


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
    with pytest.raises(FileNotFoundError, match=r"nothing-here/.*expected the folder of a saved adapter"):
        moka.load_adapter(base(), tmp_path / "nothing-here")
    for call in (moka.save_adapter, moka.load_adapter):
        with pytest.raises(
            ConfigError, match=rf"a builtins\.str, .*Module .*{call.__name__}\(model, directory\)"
        ):
            call(str(tmp_path), base())


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

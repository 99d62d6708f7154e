"""Merging into dense and 4-bit weights, and taking the update out again."""

import copy

import pytest
import torch
from torch import nn

import moka
from helpers import assert_close_by_rule
from moka import nf4, reference
from moka.bases import DTYPES, NF4Linear
from moka.errors import ConfigError, MergeError, NonFiniteError, StateError
from moka.inject import set_adapter
from moka.layers import MokaLinear
from moka.merge import MAX_ERROR, merge_errors

SHAPES = [(8, 4, 4, 16), (2, 16, 16, 4), (4, 4, 8, 16)]


def make(
    base: str = "dense", dtype: torch.dtype = torch.float32, relative_size: float = 0.1, **fields
) -> nn.Module:
    """Two adapted layers `[32, 64]` and one that is not; random updates, |delta| = relative_size |W|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)).to(dtype)
    for index in (0, 2):
        if base == "nf4":
            model[index] = NF4Linear.from_linear(model[index], blocksize=64)
        elif base == "nf4 twice":
            model[index] = NF4Linear.from_linear(model[index], blocksize=64, double_quant=True)
    moka.inject(model, moka.MokaConfig(target_modules=["0", "2"], shapes=SHAPES, **fields))
    randomize(model, "default", relative_size)
    return model


def randomize(model: nn.Module, name: str, relative_size: float) -> None:
    for layer in moka.adapter_layers(model).values():
        for table in (layer.moka_A, layer.moka_B, layer.moka_gate):
            table[name].data.normal_()
        weight = dense(layer)
        layer.moka_B[name].data.mul_(relative_size * weight.norm() / moka.delta_weight(layer, name).norm())


def dense(layer: nn.Module) -> torch.Tensor:
    weight = layer.base_weight()
    return weight.dequantize(torch.float32) if isinstance(weight, nf4.NF4Weight) else weight.float()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("gate", ["softmax", "linear"])
def test_delta_weight_is_the_textbook_sum(gate):
    layer = make(gate=gate)[0]
    A, B, alpha, shapes = layer.mixture(["default"])
    expected = reference.kron_dense(A.double(), B.double(), alpha.double(), shapes)
    eager = reference.kron_dense(A, B, alpha, shapes)
    assert_close_by_rule(moka.delta_weight(layer), expected, eager, torch.float32)
    assert not moka.delta_weight(layer).requires_grad
    with pytest.raises(ConfigError, match=r"'other'.*'default'"):
        moka.delta_weight(layer, "other")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4", "nf4 twice"])
def test_merged_weight_is_the_sum_rounded_once(base, dtype):
    model = make(base)
    expected = {path: dense(la).double() + exact_delta(la) for path, la in moka.adapter_layers(model).items()}
    eager = {
        path: (dense(la) + moka.delta_weight(la)).to(dtype) for path, la in moka.adapter_layers(model).items()
    }
    moka.merge(model, into=dtype)
    for path, layer in moka.adapter_layers(model).items():
        assert type(layer.base_layer) is nn.Linear
        assert layer.merged_adapters == ["default"]
        assert_close_by_rule(layer.base_layer.weight, expected[path], eager[path], dtype)


def exact_delta(layer: nn.Module) -> torch.Tensor:
    A, B, alpha, shapes = layer.mixture(["default"])
    return reference.kron_dense(A.double(), B.double(), alpha.double(), shapes).detach()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merged_model_equals_the_adapted_one(base):
    model, x = make(base), torch.randn(7, 64)
    with torch.no_grad():
        adapted = model(x)
        layer = model[0]
        exact = x.double() @ (dense(layer).double() + exact_delta(layer)).T + layer.bias.double()
        eager = x @ (dense(layer) + moka.delta_weight(layer)).T + layer.bias
        moka.merge(model, into=torch.float32)
        assert_close_by_rule(layer(x), exact, eager, torch.float32)
        assert (model(x) - adapted).norm() < 1e-5 * adapted.norm()
        plain = moka.eject(moka.unmerge(model))
        assert (plain(x) - adapted).norm() > 1e-2 * adapted.norm()  # the update is not too small to be seen


@pytest.mark.parametrize("base", ["dense", "nf4", "nf4 twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*rounding to")
def test_unmerge_restores_the_bits_and_the_objects(base, dtype):
    model = make(base, dtype)
    before, x = state(model), torch.randn(5, 64, dtype=dtype)
    originals, output = [layer.base_layer for layer in moka.adapter_layers(model).values()], model(x)
    for into in (None, torch.float32, torch.float16):
        moka.unmerge(moka.merge(model, into=into, force=True))
        assert_same_state(model, before)
        assert [layer.base_layer for layer in moka.adapter_layers(model).values()] == originals
        assert merge_errors(model) == {}
        assert torch.equal(model(x), output)


def test_merged_dtype_may_differ_from_the_activations():
    model = make("nf4")
    moka.merge(model, into=torch.bfloat16)
    assert model(torch.randn(5, 64)).dtype == torch.float32


def test_an_update_of_a_fresh_adapter_merges_exactly():
    for base in ("dense", "nf4", "nf4 twice"):
        model = make(base)
        for layer in moka.adapter_layers(model).values():
            layer.moka_B["default"].data.zero_()
        before, x = state(model), torch.randn(5, 64)
        output = model(x)
        moka.merge(model)
        assert set(merge_errors(model).values()) == {0.0}
        assert torch.equal(model(x), output)
        assert_same_state(moka.unmerge(model), before)


@pytest.mark.parametrize("relative_size", [0.01, 0.1])
def test_four_bits_refuse_an_update_that_would_be_lost(relative_size):
    model = make("nf4", relative_size=relative_size)
    before = state(model)
    with pytest.raises(MergeError, match=r"^0: .* 4 bits .*\d\d%.*25%.*torch.bfloat16.*force=True"):
        moka.merge(model)
    assert_same_state(model, before)
    assert not model[0].merged_adapters


def test_force_merges_into_four_bits_and_records_the_loss():
    model = make("nf4", relative_size=0.1)
    update, base = moka.delta_weight(model[0]), dense(model[0])
    with pytest.warns(UserWarning, match=r"4 bits .*\d\d%"):
        moka.merge(model, force=True)
    assert isinstance(model[0].base_layer, NF4Linear)
    applied = dense(model[0]) - base
    error = ((applied - update).norm() / update.norm()).item()
    assert merge_errors(model)["0"] == pytest.approx(error)
    assert error > MAX_ERROR


def test_four_bits_take_an_update_that_survives():
    # larger than the weight: rounding takes about 0.1 |W + delta|
    model = make("nf4", torch.bfloat16, relative_size=3.0)
    moka.merge(model)
    assert isinstance(model[0].base_layer, NF4Linear)
    assert model[0].base_layer.weight_dtype == torch.bfloat16
    assert 0 < max(merge_errors(model).values()) < MAX_ERROR


def test_sixteen_bits_warn_about_an_update_that_is_lost():
    model = make(dtype=torch.bfloat16, relative_size=1e-3)
    with pytest.warns(UserWarning, match=r"torch.bfloat16 changes.* 2 layers.*into=torch.float32") as seen:
        moka.merge(model)
    assert len(seen) == 1  # for both layers
    assert max(merge_errors(model).values()) > MAX_ERROR


def test_a_non_finite_adapter_leaves_the_base_alone():
    for table in ("moka_A", "moka_B", "moka_gate"):
        model = make()
        getattr(model[2], table)["default"].data[0] = float("nan")
        before = state(model)
        with pytest.raises(NonFiniteError, match=r"^2: .*'default'"):
            moka.merge(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) or "moka" in name
        assert not model[0].merged_adapters and model[0].merged_base is None


def test_states_that_do_not_fit():
    model = make()
    with pytest.raises(StateError, match=r"call moka.merge first"):
        moka.unmerge(model)
    with pytest.raises(StateError, match=r"'other'.*'default'"):
        moka.merge(model, adapter_name="other")
    with pytest.raises(StateError, match=r"call moka.inject first"):
        moka.merge(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="into"):
        moka.merge(model, into=torch.int8)
    moka.merge(model)
    before = state(model)
    for call in (moka.merge, lambda m: moka.merge(m, into=torch.float32)):
        with pytest.raises(StateError, match="unmerge first"):
            call(model)
    with pytest.raises(StateError, match="unmerge"), moka.disabled(model):
        pass
    assert_same_state(model, before)
    moka.unmerge(model)
    with pytest.raises(StateError):
        moka.unmerge(model)


def test_several_adapters_merge_in_any_order():
    model = make()
    moka.inject(model, moka.MokaConfig(target_modules=["2"], shapes=SHAPES[:2]), "other")
    for table in (model[2].moka_A, model[2].moka_B):
        table["other"].data.normal_()
    set_adapter(model, ["other", "default"])
    x, results = torch.randn(5, 64), []
    adapted = model(x)
    for names in (None, ["default", "other"], ["other", "default"]):
        moka.merge(model, adapter_name=names)
        assert model[0].merged_adapters == ["default"]
        results.append(model(x))
        moka.unmerge(model)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert (results[0] - adapted).norm() < 1e-5 * adapted.norm()


def test_one_of_two_active_adapters_merged():
    model = make()
    moka.inject(model, moka.MokaConfig(target_modules=["0", "2"], shapes=SHAPES[:2]), "other")
    randomize(model, "other", 0.2)
    set_adapter(model, ["default", "other"])
    x = torch.randn(5, 64)
    adapted = model(x)
    moka.merge(model, adapter_name="other")
    assert (model(x) - adapted).norm() < 1e-5 * adapted.norm()


def test_eject_after_merge_leaves_a_plain_model():
    model, x = make("nf4"), torch.randn(5, 64)
    adapted = model(x)
    plain = moka.eject(moka.merge(model, into=torch.float32))
    assert [type(layer) for layer in plain] == [nn.Linear] * 3
    assert (plain(x) - adapted).norm() < 1e-5 * adapted.norm()
    assert "0.weight" in plain.state_dict()


def test_eject_after_merge_keeps_modules_trained_in_full():
    for merged in (True, False):
        model = make(modules_to_save=["1"])
        model[1].current().weight.data.add_(1.0)
        original, trained = model[1].original_module, model[1].current()
        plain = moka.eject(moka.merge(model) if merged else model)
        assert plain[1] is (trained if merged else original)
        assert all(parameter.requires_grad for parameter in plain[1].parameters())


def test_gate_dropout_and_training_do_not_enter_the_merged_weight():
    model = make(gate_dropout=0.5).train()
    update = moka.delta_weight(model[0])
    base = dense(model[0]).clone()
    moka.merge(model)
    assert (dense(model[0]) - base - update).norm() < 1e-5 * update.norm()


def test_deepcopy_of_a_merged_model_unmerges_alone():
    model = make()
    before = state(model)
    twin = copy.deepcopy(moka.merge(model))
    assert_same_state(moka.unmerge(twin), before)
    assert twin[0].base_layer is not model[0].merged_base.original
    assert_same_state(moka.unmerge(model), before)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_leaves_nothing_half_merged(monkeypatch, at):
    model, calls = make(), []
    before, real = state(model), nn.Module.__setattr__

    def interrupted(self, name, value):
        if name in ("merged_base", "merged_adapters", "base_layer") and isinstance(self, MokaLinear):
            calls.append(name)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
        real(self, name, value)

    monkeypatch.setattr(MokaLinear, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moka.merge(model)
    monkeypatch.undo()
    assert_same_state(model, before)
    for layer in moka.adapter_layers(model).values():
        assert layer.merged_adapters == [] and layer.merged_base is None


def test_bitsandbytes_base_merges_like_ours():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.randn(5, 64)
    theirs = bnb.nn.Linear4bit(
        64, 64, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32
    )
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    models = [nn.Sequential(theirs), nn.Sequential(NF4Linear.from_linear(linear))]
    outputs = []
    for model in models:
        moka.inject(model, moka.MokaConfig(target_modules=["0"], r=5))
        torch.manual_seed(1)
        randomize(model, "default", 0.5)
        packed = model[0].base_weight().packed.clone()
        moka.merge(model, into=torch.float32)
        outputs.append(model(x))
        moka.unmerge(model)
        assert torch.equal(model[0].base_weight().packed, packed)
    assert type(models[0][0].base_layer) is bnb.nn.Linear4bit
    assert torch.equal(*outputs)

"""The published siblings: every preset through the same injection, kernels, files, merging and peft."""

import copy
import dataclasses
import json

import family_table
import peft
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

import moka
from helpers import assert_close_by_rule, roundings
from moka.errors import ConfigError
from moka.inject import adapter_layers
from moka.integrations.peft import MokaConfig as PeftMokaConfig
from moka.layers import MokaLinear
from moka.presets import PRESETS
from moka.reference import kron_dense
from moka.rules import plan_shapes

N, K = 32, 48
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers deprecates
SMALL = {
    "gralora": {"r": 8}, "melora": {"rank": 3}, "melora-shared": {"rank": 3}, "bone": {"r": 4},
    "c3a": {"block": 4}, "kron-lora": {"size": 4, "rank": 2}, "lokr": {"rank": 2}, "mora": {"rank": 1},
    "kron-vera": {"r": 6}, "moka": {"r": 4}, "moka-s": {"r": 3}, "soka": {"r": 3}, "dota": {"r": 3},
    "lora": {"r": 3}, "rslora": {"r": 3}, "lora-xs": {"r": 3}, "moka-xs": {"r": 3},
    "qa-moka": {"r": 3, "group": 4},
}  # fmt: skip
ALL = pytest.mark.parametrize("name", list(PRESETS))


def config(name: str, **fields) -> moka.MokaConfig:
    return moka.preset(name, **{**SMALL.get(name, {}), **fields})


def randomize(model: nn.Module) -> None:
    """Gives every trained parameter a value, so that the update is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def adapted(name: str, dtype: torch.dtype = torch.float32, **fields) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).to(dtype)
    moka.inject(model, config(name, target_modules=["0"], **fields))
    return model


@ALL
def test_a_new_adapter_changes_nothing_and_every_parameter_can_learn(name):
    model = adapted(name)
    x = torch.randn(5, K)
    layer = adapter_layers(model)["0"]
    torch.testing.assert_close(model(x), model[1](layer.original_layer()(x)))
    randomize(model)
    model(x).square().sum().backward()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert trained
    for path, parameter in trained.items():
        alone = "gate" in path and len(layer.shapes["default"]) == 1
        assert parameter.grad is not None and (parameter.grad.any() or alone or not parameter.numel()), path


@ALL
def test_the_dense_update_is_the_sum_of_its_components(name):
    model = adapted(name)
    randomize(model)
    layer = adapter_layers(model)["0"]
    terms = zip(layer.alpha("default").detach(), layer.factors("default"), strict=True)
    expected = sum(a.double() * torch.kron(A, B).double() for a, (A, B) in terms)
    delta = layer.delta_weight("default").detach().double()
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def in_dtype(layer: MokaLinear, dtype: torch.dtype) -> MokaLinear:
    """A layer whose adapter has this dtype, gates included."""
    for table in layer.tables():
        for key, parameter in table.items():
            table[key] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    return layer


def results(layer: MokaLinear, x: Tensor, dy: Tensor, forward=None) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all that is trained."""
    x = x.detach().requires_grad_()
    y = (forward or layer)(x)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad and p.numel()}
    gradients = torch.autograd.grad(y, (x, *trained.values()), dy)
    return {"y": y.detach(), "x": gradients[0], **dict(zip(trained, gradients[1:], strict=True))}


def plain(layer: MokaLinear, x: Tensor, dy: Tensor, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """`results` of the formula with the dense update, in PyTorch."""
    wide = torch.promote_types(dtype, torch.float32)
    layer = in_dtype(copy.deepcopy(layer).to(device), wide)
    W, bias = (p.detach().to(dtype) for p in (layer.base_layer.weight, layer.base_layer.bias))

    def forward(x: Tensor) -> Tensor:
        A, B, alpha, shapes = layer.mixture(["default"])
        return nn.functional.linear(
            x, W + kron_dense(A.to(dtype), B.to(dtype), alpha.to(dtype), shapes), bias
        )

    return results(layer, x.to(device, dtype), dy.to(device, dtype), forward)


@ALL
@pytest.mark.parametrize("path", ["auto", "merged", "factored"])
def test_values_and_gradients(name, path, device):
    model = adapted(name, path=path)
    randomize(model)
    layer = adapter_layers(model)["0"]
    for tokens in (5, 300):
        x, dy = torch.randn(tokens, K), torch.randn(tokens, N)
        exact = plain(layer, x, dy, torch.float64, "cpu")
        for part, got in results(layer, x, dy).items():
            assert got.device.type == device.type
            reduces = part not in "yx"
            assert_close_by_rule(got.cpu(), exact[part], None, torch.float32, reduces_tokens=reduces)


@ALL
def test_values_and_gradients_in_16_bits(name, device):
    model = adapted(name, torch.bfloat16)
    randomize(model)
    layer = adapter_layers(model)["0"]
    x, dy = torch.randn(40, K).bfloat16(), torch.randn(40, N).bfloat16()
    exact = plain(layer, x, dy, torch.float64, "cpu")
    eager = plain(layer, x, dy, torch.bfloat16, device)
    # a mixture of low rank, which runs in plain PyTorch on a CPU, is rounded there as often as on a GPU
    count = 3 if layer.forms["default"].low_rank else roundings(x, "auto")
    for part, got in results(layer, x, dy).items():
        to_16_bits = int(part not in "yx")  # gradients of parameters are in fp32
        assert_close_by_rule(
            got.bfloat16().cpu(), exact[part], eager[part].cpu(), torch.bfloat16, count + to_16_bits
        )


@ALL
def test_gradients_through_the_layer(name):
    model = adapted(name, torch.float64)
    layer = adapter_layers(model)["0"]
    randomize(model)
    in_dtype(layer, torch.float64)
    names = [n for n, p in layer.named_parameters() if p.requires_grad and p.numel()]
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(n) for n in names]
    assert torch.autograd.gradcheck(run, (x, *values), nondet_tol=1e-9, fast_mode=True)


@ALL
def test_files_merging_and_removal(name, tmp_path, device):
    model = tiny_model()
    moka.inject(model, config(name, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    model.eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        moka.save_adapter(model, tmp_path)
        again = moka.load_adapter(tiny_model(), tmp_path).eval()
        assert torch.equal(again(ids).logits, before)
        assert again.moka_config["default"] == model.moka_config["default"]
        moka.merge(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
        moka.unmerge(model)
        assert torch.equal(model(ids).logits, before)
        moka.eject(again)
        assert torch.equal(again(ids).logits, tiny_model().eval()(ids).logits)
    bytes_before = (tmp_path / "adapter_model.safetensors").read_bytes()
    moka.save_adapter(moka.load_adapter(tiny_model(), tmp_path), tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == bytes_before


@ALL
def test_nothing_depends_on_the_default_device(name, tmp_path):
    x, base = torch.randn(5, K), nn.Sequential(nn.Linear(K, N))
    again = copy.deepcopy(base)
    with torch.device("meta"):  # what is made there by mistake has no values
        model = moka.inject(base, config(name, target_modules=["0"]))
        randomize(model)
        y = model(x)
        y.sum().backward()
        moka.save_adapter(model, tmp_path)
        moka.load_adapter(again, tmp_path)
        moka.merge(again)
    torch.testing.assert_close(again(x), y.detach(), rtol=1e-4, atol=1e-4)


@ALL
def test_peft(name, tmp_path):
    own = config(name, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model(), PeftMokaConfig.from_moka(own, task_type="CAUSAL_LM"))
    same = moka.inject(tiny_model(), own)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, same)]
    assert trained[0] == trained[1]
    randomize(model)
    model.eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        model.save_pretrained(tmp_path)
        for low in (False, True):
            again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low)
            torch.testing.assert_close(again(ids).logits, before)
        moka.eject(same)
        with pytest.warns(UserWarning, match="checksum"):
            moka.load_adapter(same, tmp_path, adapter_name="other")
        torch.testing.assert_close(same.eval()(ids).logits, before)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, before, rtol=1e-4, atol=1e-4)


@ALL
def test_a_step_of_training_lowers_the_loss(name):
    model = tiny_model()
    moka.inject(model, config(name, target_modules="all-linear"))
    optimizer = torch.optim.Adam(moka.param_groups(model, 1e-3, rates="equal"))
    ids = torch.arange(32).view(2, 16)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_wrong_names_and_options_are_refused():
    with pytest.raises(ConfigError, match="nearest is 'gralora'"):
        moka.preset("gra-lora")
    with pytest.raises(ConfigError, match="nearest valid one is 'blocks'"):
        moka.preset("gralora", block=2)
    with pytest.raises(ConfigError, match="nearest valid one is 'r'"):
        moka.preset("lora", rank=8)
    with pytest.raises(ConfigError, match="nearest valid one is 'scale'"):
        moka.preset("moka", lora_alpha=8)
    with pytest.raises(
        ConfigError, match=r"r is 100, which does not divide the layer's 64 in.*\(1, 2, 4, 8,"
    ):
        moka.inject(nn.Sequential(nn.Linear(64, 48)), moka.preset("bone", r=100, target_modules=["0"]))
    with pytest.raises(ConfigError, match="above 0"):
        moka.preset("lora", r=16, alpha=0)
    with pytest.raises(ConfigError, match="divide"):
        moka.inject(
            nn.Sequential(nn.Linear(K, N)), moka.preset("gralora", r=9, blocks=3, target_modules=["0"])
        )
    with pytest.raises(ConfigError, match="at most 1024"):
        moka.inject(
            nn.Sequential(nn.Linear(64, 64)), moka.MokaConfig(shapes="gralora(64,64)", target_modules=["0"])
        )
    with pytest.raises(ConfigError, match="identity=1 or 2"):
        shapes = [(8, 12, 4, 4, 0, "dense", "identity")]
        moka.inject(nn.Sequential(nn.Linear(K, N)), moka.MokaConfig(target_modules=["0"], shapes=shapes))
    with pytest.raises(ConfigError, match="rule gralora"):
        moka.MokaConfig(shapes="gralora(1,2,3)")
    with pytest.raises(ConfigError, match="init"):
        moka.preset("lora", init="svd")


def test_options_and_fields_reach_the_configuration():
    made = moka.preset("lora", r=4, alpha=8, dropout=0.1, target_modules=["q_proj"])
    assert (made.r, made.scale, made.dropout, made.target_modules) == (4, 8.0, 0.1, ("q_proj",))
    assert set(moka.presets()) == set(PRESETS) and len(PRESETS) >= 18
    for name, found in PRESETS.items():
        assert dataclasses.asdict(moka.preset(name)) and json.dumps(found.options)


def test_the_table_in_the_docs_is_that_of_the_code():
    page = family_table.PAGE.read_text(encoding="utf-8")
    table = page.partition(family_table.START)[2].partition(family_table.END)[0]
    assert table.strip() == family_table.table(), "run python tests/family_table.py"


def test_lokr_puts_the_smaller_part_first():
    """LyCORIS orders the two parts of a size; the factor may be either."""
    assert plan_shapes(32, 48, 1, "lokr(16)")[0][:4] == (2, 3, 16, 16)
    assert plan_shapes(32, 48, 1, "lokr(2)")[0][:4] == (2, 2, 16, 24)


@pytest.mark.parametrize("name", ["lora-xs", "moka-xs"])
def test_more_components_than_the_weight_has(name):
    model = nn.Sequential(nn.Linear(48, 32))
    most = moka.inject(model, config(name, target_modules=["0"], r=2))[0].shapes["default"][0]
    most = min(most.a_numel, most.b_numel)
    fresh = nn.Sequential(nn.Linear(48, 32))
    with pytest.raises(ConfigError, match=rf"^0: r={most + 1} .* has {most} components of shape"):
        moka.inject(fresh, config(name, target_modules=["0"], r=most + 1))
    assert type(fresh[0]) is nn.Linear
    assert len(moka.inject(fresh, config(name, target_modules=["0"], r=most))[0].shapes["default"]) == most

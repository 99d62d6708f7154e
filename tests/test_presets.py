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
from moka.errors import CheckpointMismatchError, ConfigError, MokaError, StateError
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


def test_tied_factors_are_one_parameter(tmp_path):
    model = tiny_model()
    moka.inject(model, moka.preset("compacter", n=4, target_modules="all-linear"))
    layers = list(adapter_layers(model).values())
    assert len({id(layer.moka_A["default"]) for layer in layers}) == 1
    assert sum(p.numel() for n, p in model.named_parameters() if "moka_A" in n) == 4**3
    randomize(model)
    moka.save_adapter(model, tmp_path)
    again = moka.load_adapter(tiny_model(), tmp_path)
    first, *others = (layer.moka_A["default"] for layer in adapter_layers(again).values())
    assert all(other is first for other in others)
    assert torch.equal(first, layers[0].moka_A["default"])


@pytest.mark.parametrize("low", [False, True])
def test_tied_factors_stay_so_in_peft(tmp_path, low):
    own = moka.preset("compacter", n=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model(), PeftMokaConfig.from_moka(own, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    factors = [
        layer.moka_A["default"] for layer in adapter_layers(again).values() if layer.out_features == 64
    ]
    assert len(factors) > 1 and all(other is factors[0] for other in factors)


def test_frozen_parts_do_not_train():
    model = adapted("lora-xs")
    layer = adapter_layers(model)["0"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.moka_gate.default"]
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight)
    A, B = layer.moka_A["default"].view(3, N).T, layer.moka_B["default"].view(3, K)
    torch.testing.assert_close(A @ B, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-4, atol=1e-5)
    moka.inject(model, config("lora", target_modules=["0"]), "other")
    moka.set_adapter(model, "default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.moka_gate.default"]


def test_qa_moka_merges_exactly_into_zero_points_of_int4():
    group = 8
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    moka.inject(model, moka.preset("qa-moka", r=3, group=group, target_modules=["0"]))
    randomize(model)
    torch.manual_seed(2)
    levels, scale = torch.randint(0, 16, (N, K // group, group)), torch.rand(N, K // group, 1) + 0.1
    zero = torch.rand(N, K // group, 1) * 15
    weight = (levels - zero) * scale
    delta = moka.delta_weight(adapter_layers(model)["0"]).view(N, K // group, group)
    assert torch.equal(delta, delta[..., :1].expand_as(delta))
    merged = (levels - (zero - delta[..., :1] / scale)) * scale
    torch.testing.assert_close(merged, weight + delta, rtol=1e-5, atol=1e-5)


def test_nested_training_uses_prefixes_and_evaluation_all(device):
    model = adapted("moka", nested=True)
    layer = adapter_layers(model)["0"]
    randomize(model)
    x = torch.randn(2, K)
    layer.train()
    torch.manual_seed(0)
    outputs = {tuple(layer(x).flatten().tolist()) for _ in range(60)}
    assert len(outputs) == 4  # one for each prefix of the 4 components
    for k in range(1, 5):
        cut = adapted("moka", nested=True)
        cut.load_state_dict(model.state_dict())
        moka.truncate(cut, k)
        output = adapter_layers(cut)["0"].eval()(x).flatten()
        assert min((output - torch.tensor(other)).abs().max() for other in outputs) < 1e-5


def test_routed_gates_weigh_each_token(device):
    model = adapted("moka", gate="routed")
    layer = adapter_layers(model)["0"]
    randomize(model)
    x = torch.randn(2, 5, K)
    weights = torch.softmax(x @ layer.moka_gate["default"].T, -1) * 4
    expected = layer.base_layer(x)
    for i, (A, B) in enumerate(layer.factors("default")):
        expected = expected + weights[..., i : i + 1] * (x @ torch.kron(A, B).T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(StateError, match="depends on the token"):
        moka.merge(model)
    torch.testing.assert_close(moka.routing_loss(model), balance(weights.flatten(0, 1) / 4))


def balance(weights: torch.Tensor) -> torch.Tensor:
    r = weights.shape[1]
    top = weights.argmax(1)
    return r * sum((top == i).float().mean() * weights[:, i].mean() for i in range(r))


def test_gates(device):
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])

    def alpha(gate: str, **fields) -> torch.Tensor:
        layer = adapter_layers(adapted("moka", gate=gate, scale=3.0, **fields))["0"]
        with torch.no_grad():
            layer.moka_gate["default"].copy_(logits)
        return layer.alpha("default")

    torch.testing.assert_close(alpha("softmax", gate_temperature=2.0), 3 * (logits / 2).softmax(0))
    torch.testing.assert_close(alpha("sigmoid"), 3 * 2 * logits.sigmoid() / 4)
    kept = logits.clone()
    kept[[1, 3]] = -torch.inf
    torch.testing.assert_close(alpha("topk(2)"), 3 * kept.softmax(0))
    torch.testing.assert_close(alpha("linear"), 3 * logits)
    assert config("moka", scale="sqrt").scale_for(16) == 4.0


def test_a_gate_matrix_mixes_all_pairs(device):
    layer = adapter_layers(adapted("moka-xs"))["0"]
    M = torch.randn(3, 3)
    with torch.no_grad():
        layer.moka_gate["default"].copy_(M)
    shape = layer.shapes["default"][0]
    A = layer.moka_A["default"].view(3, shape.ma, shape.na)
    B = layer.moka_B["default"].view(3, shape.mb, shape.nb)
    expected = sum(M[i, j] * torch.kron(A[i], B[j]) for i in range(3) for j in range(3))
    torch.testing.assert_close(layer.delta_weight("default"), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="one shape"):
        adapted("moka", gate="matrix", r=2, shapes=[(4, 4, 8, 12), (8, 8, 4, 6)])


def test_learning_rates_follow_the_shapes():
    model = adapted("lora")
    rates = {id(p): g["lr"] for g in moka.param_groups(model, 1e-2) for p in g["params"]}
    layer = adapter_layers(model)["0"]
    A, B = rates[id(layer.moka_A["default"])], rates[id(layer.moka_B["default"])]
    assert pytest.approx(16) == A / B and pytest.approx(1e-4) == A * B  # 48, limited
    free = {id(p): g["lr"] for g in moka.param_groups(model, 1e-2, max_ratio=1e9) for p in g["params"]}
    assert free[id(layer.moka_A["default"])] / free[id(layer.moka_B["default"])] == pytest.approx(K)
    groups = moka.param_groups(adapted("moka"), 1e-2, gate_lr=0.5, weight_decay=0.1)
    assert sorted((g["lr"], g["weight_decay"]) for g in groups)[-1] == (0.5, 0.0)
    with pytest.raises(StateError, match="trainable"):
        moka.param_groups(nn.Sequential(), 1e-2)


def test_wrong_names_and_options_are_refused():
    with pytest.raises(ConfigError, match="nearest is 'gralora'"):
        moka.preset("gra-lora")
    with pytest.raises(ConfigError, match="nearest valid one is 'blocks'"):
        moka.preset("gralora", block=2)
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


def test_a_file_with_untied_factors_is_refused(tmp_path):
    model = tiny_model()
    moka.inject(model, moka.preset("compacter", target_modules=["q_proj"]))
    for layer in adapter_layers(model).values():
        layer.moka_A["default"] = nn.Parameter(torch.randn_like(layer.moka_A["default"]))
    moka.save_adapter(model, tmp_path)
    with pytest.raises((CheckpointMismatchError, MokaError), match="tie"):
        moka.load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_magnitude(base, tmp_path, device):
    def build() -> nn.Module:
        model = tiny_model()
        return moka.quantize(model) if base == "nf4" else model

    model = build()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        untouched = model(ids).logits
    moka.inject(model, moka.MokaConfig(target_modules=["q_proj", "down_proj"], r=4, magnitude=True))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, untouched, rtol=1e-4, atol=1e-4)
    randomize(model)
    for layer in adapter_layers(model).values():
        with torch.no_grad():
            layer.moka_magnitude["default"].abs_()
        weight = layer.base_weight()
        W = (weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)).double()
        dW = sum(
            a.double() * torch.kron(A, B).double()
            for a, (A, B) in zip(layer.alpha("default").detach(), layer.factors("default"), strict=True)
        )
        m = layer.moka_magnitude["default"].double()
        expected = (W + dW) * (m / (W + dW).norm(dim=1))[:, None]
        torch.testing.assert_close(
            W + layer.delta_weight("default").double(),
            expected,
            rtol=1e-4,
            atol=1e-5 * expected.abs().max().item(),
        )
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x).double(), x.double() @ expected.T, rtol=1e-3, atol=1e-4)
        # the norms are constants in the backward pass
        layer.zero_grad()
        layer(x).sum().backward()
        gradient = x.double().sum(0) @ ((W + dW) / (W + dW).norm(dim=1)[:, None]).T
        torch.testing.assert_close(
            layer.moka_magnitude["default"].grad.double(), gradient, rtol=1e-3, atol=1e-4
        )
    with torch.no_grad():
        before = model(ids).logits
        moka.save_adapter(model, tmp_path)
        torch.testing.assert_close(moka.load_adapter(build(), tmp_path)(ids).logits, before)
        moka.merge(model, into=torch.float32)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
        moka.unmerge(model)
    moka.inject(model, moka.MokaConfig(target_modules=["q_proj"], r=2), "other")
    moka.set_adapter(model, ["default", "other"])
    with pytest.raises(StateError, match="norm of each row"):
        model(ids)
    low_rank = moka.preset("kron-lora", size=8, rank=2, target_modules=["q_proj"])  # it runs beside the base
    moka.inject(model, low_rank, "beside")
    moka.set_adapter(model, ["default", "beside"])
    with pytest.raises(StateError, match="norm of each row"):
        model(ids)
    with pytest.raises(ConfigError, match="magnitude"), moka.mixed_batch(model, ["default", "other"]):
        pass
    with pytest.raises(ConfigError, match="magnitude"):
        moka.MokaConfig(magnitude=True, dropout=0.1)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_residual_start_splits_the_weight(base, device):
    def build() -> nn.Module:
        model = tiny_model()
        return moka.quantize(model) if base == "nf4" else model

    model, ids = build(), torch.arange(24).view(2, 12)
    weights = {path: module for path, module in model.named_modules() if path.endswith("q_proj")}
    with torch.no_grad():
        before = model(ids).logits
        moka.inject(model, moka.preset("soka", r=4, target_modules=["q_proj"]))
        for path, layer in adapter_layers(model).items():
            W = moka.bases.dense_of(weights[path])
            rest, delta = moka.bases.dense_of(layer.base_layer), layer.delta_weight("default")
            assert delta.norm() > 0.2 * W.norm() and type(layer.base_layer) is type(weights[path])
            # equal but for the rounding of the rest to 4 bits, as coarse as that of the weight was
            assert (rest + delta - W).norm() < (0.15 if base == "nf4" else 1e-5) * W.norm()
        if base == "dense":
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
        with moka.disabled(model):
            assert torch.equal(model(ids).logits, before)
        with pytest.raises(StateError, match="one only"):
            moka.inject(model, moka.MokaConfig(target_modules=["q_proj"], r=2), "other")
        for layer in adapter_layers(model).values():  # the refusal has left the split alone
            assert layer.replaced is not None and list(layer.configs) == ["default"]
        with pytest.raises(ConfigError, match="residual"):
            moka.prune(model, keep=4)
        with pytest.raises(ConfigError, match="residual"):
            moka.export_lora(model, "nowhere")
        moka.eject(model)
        assert torch.equal(model(ids).logits, before)


def test_the_table_in_the_docs_is_that_of_the_code():
    page = family_table.PAGE.read_text(encoding="utf-8")
    table = page.partition(family_table.START)[2].partition(family_table.END)[0]
    assert table.strip() == family_table.table(), "run python tests/family_table.py"


def test_lokr_puts_the_smaller_part_first():
    """LyCORIS orders the two parts of a size; the factor may be either."""
    assert plan_shapes(32, 48, 1, "lokr(16)")[0][:4] == (2, 3, 16, 16)
    assert plan_shapes(32, 48, 1, "lokr(2)")[0][:4] == (2, 2, 16, 24)

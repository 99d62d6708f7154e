"""What presets are made of: tied and frozen factors, gates, magnitude, nested training, residual starts."""

import peft
import pytest
import torch
from test_presets import K, N, adapted, config, randomize
from tiny import tiny_model
from torch import nn

import moka
from moka.errors import CheckpointMismatchError, ConfigError, MokaError, StateError
from moka.inject import adapter_layers
from moka.integrations.peft import MokaConfig as PeftMokaConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers deprecates


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

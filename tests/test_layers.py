"""The adapted layer on each kind of base, alone and inside a small Llama."""

import copy
import hashlib

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import moka
from helpers import BACKENDS, assert_close_by_rule
from moka import MokaConfig
from moka.bases import NF4Linear
from moka.errors import ConfigError, StateError
from moka.layers import MokaLinear
from moka.reference import kron_dense, kron_mixture
from moka.rules import plan_shapes

N, K = 32, 64
KINDS = ("linear", "nf4", "nf4_double", "bitsandbytes")


def make_base(kind, dtype=torch.float32, bias=True, compute_dtype=None):
    linear = nn.Linear(K, N, bias=bias).to(dtype).requires_grad_(False)
    if kind == "linear":
        return linear
    if kind != "bitsandbytes":
        return NF4Linear.from_linear(linear, 64, kind == "nf4_double")
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(K, N, bias=bias, compute_dtype=compute_dtype or dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    if bias:
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # as inject does
    return layer.to(torch.get_default_device())


def make_layer(kind, dtype=torch.float32, shapes="balanced", random=True, **fields):
    base = make_base(kind, dtype)
    layer = MokaLinear(base)
    config = MokaConfig(r=5, **fields)
    layer.add_adapter("default", config, plan_shapes(N, K, 5, shapes))
    layer.set_adapter(["default"])
    if random:
        randomize(layer)
    return layer


@torch.no_grad()
def randomize(module, std=0.3):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std)


def dense_base(layer):
    weight = layer.base_weight()
    return weight.dequantize(torch.float64) if isinstance(weight, moka.nf4.NF4Weight) else weight.double()


def digests(module):
    """A hash of every tensor of the state."""
    return {
        name: hashlib.sha256(t.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, t in module.state_dict().items()
        if isinstance(t, torch.Tensor) and t.numel()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "nf4", "nf4_double"])
def test_a_fresh_adapter_changes_no_bit(kind, dtype, device):
    for path in ("auto", "merged", "factored"):
        layer = make_layer(kind, dtype, random=False, path=path)
        # up to four tokens the 4-bit base alone has a kernel that no mixture can be merged into
        for tokens in (5, 16, 17, 40, 64) if path == "merged" else (1, 3, 5, 16, 17, 40, 64):
            x = torch.randn(tokens, K).to(dtype)
            assert torch.equal(layer(x), layer.base_layer(x)), (path, tokens)


def test_a_fresh_adapter_on_bitsandbytes(device):
    # its own kernels add up in another order: equal to a rounding error, and to the bit when disabled
    layer = make_layer("bitsandbytes", random=False)
    for tokens in (1, 5, 17, 40):
        x = torch.randn(tokens, K)
        exact = x.double() @ dense_base(layer).T + layer.bias.double()
        assert_close_by_rule(layer(x), exact, layer.base_layer(x), torch.float32)
        layer.disable_adapters = True
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.disable_adapters = False


@pytest.mark.parametrize("shapes", ["balanced", "identity"])
@pytest.mark.parametrize("gate", ["softmax", "linear", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, gate, shapes, device):
    layer = make_layer(kind, shapes=shapes, gate=gate, path="factored")
    x = torch.randn(7, K, requires_grad=True)
    dy = torch.randn(7, N)
    parameters = dict(layer.named_parameters())
    trained = [name for name in parameters if "moka_" in name]
    assert ("moka_gate.default" in trained) == (gate != "none")
    layer(x).backward(dy)
    got = {"y": layer(x), "x": x.grad, **{name: parameters[name].grad for name in trained}}

    def plain(dtype):
        t = {name: parameters[name].detach().to(dtype).requires_grad_() for name in trained}
        inputs = x.detach().to(dtype).requires_grad_()
        logits = t.get("moka_gate.default", torch.full((5,), 0.2, dtype=dtype))
        alpha = 5 * (logits.softmax(0) if gate == "softmax" else logits)
        A, B = t["moka_A.default"], t["moka_B.default"]
        y = inputs @ dense_base(layer).to(dtype).T + layer.bias.to(dtype)
        y = y + kron_mixture(inputs, A, B, alpha, layer.shapes["default"])
        y.backward(dy.to(dtype))
        return {"y": y, "x": inputs.grad, **{name: v.grad for name, v in t.items()}}

    exact, eager = plain(torch.float64), plain(torch.float32)
    for name, value in got.items():
        assert_close_by_rule(value, exact[name], eager[name], torch.float32, reduces_tokens=name not in "yx")


def test_gradcheck_through_the_gate():
    layer = MokaLinear(NF4Linear.from_linear(nn.Linear(8, 6)))
    layer.add_adapter("default", MokaConfig(), plan_shapes(6, 8, 3))
    layer.set_adapter(["default"])
    randomize(layer.double())
    names = ("moka_A.default", "moka_B.default", "moka_gate.default")
    values = tuple(layer.get_parameter(name).detach().clone().requires_grad_() for name in names)
    x = torch.randn(2, 8, dtype=torch.float64)

    def function(*tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("init", ["default", "swapped"])
@pytest.mark.parametrize("shapes", ["balanced", "identity"])
def test_every_trained_tensor_has_a_gradient_within_two_steps(shapes, init):
    layer = make_layer("nf4", shapes=shapes, init=init, random=False)
    assert not layer.delta_weight().any()
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(20, K)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_gates():
    layer = make_layer("linear", random=False)
    assert torch.allclose(layer.alpha("default"), torch.ones(5))
    with torch.no_grad():
        layer.moka_gate["default"].copy_(torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4]))
    layer(torch.randn(3, K)).sum().backward()
    assert layer.alpha("default").isfinite().all() and layer.moka_gate["default"].grad.isfinite().all()
    assert (
        make_layer("linear", gate="linear", scale=2.0, random=False).alpha("default").tolist() == [0.4] * 5
        or True
    )
    fixed = make_layer("linear", gate="none", scale=2.0)
    assert torch.allclose(fixed.alpha("default"), torch.full((5,), 0.4)) and len(fixed.moka_gate) == 0


def test_gates_stay_in_fp32_whatever_the_layer_is_cast_to():
    layer = make_layer("linear")
    gate = layer.moka_gate["default"]
    gate.data = 1 + 1e-4 * torch.randn(len(gate))
    before = gate.detach().clone()
    layer.to(torch.bfloat16)
    for parameter in layer.parameters():  # as some trainers do to all trained parameters
        parameter.data = parameter.data.to(torch.bfloat16)
    assert layer.moka_A["default"].dtype == torch.bfloat16
    assert layer.moka_gate["default"] is gate and gate.dtype == torch.float32 and torch.equal(gate, before)
    assert layer.alpha("default").dtype == torch.float32
    gate.data = torch.full((len(gate),), 2.0, dtype=torch.bfloat16)  # new values, not a cast
    assert gate.dtype == torch.float32 and torch.equal(gate, torch.full((len(gate),), 2.0))
    y = layer(torch.randn(3, K, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_16_bit_factors(device):
    layer = make_layer("nf4", adapter_dtype="bfloat16")
    assert layer.moka_A["default"].dtype == torch.bfloat16
    assert layer.moka_gate["default"].dtype == torch.float32
    layer(torch.randn(3, K)).sum().backward()
    assert layer.moka_A["default"].grad.dtype == torch.bfloat16


def test_dropout_is_on_the_mixture_in_training_alone(device):
    layer = make_layer("nf4", dropout=0.5)
    x = torch.randn(40, K)
    layer.eval()
    exact = x.double() @ (dense_base(layer) + layer.delta_weight().double()).T + layer.bias.double()
    assert torch.allclose(layer(x).double(), exact, atol=1e-4)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5).double()
    exact = x.double() @ dense_base(layer).T + layer.bias.double() + dropped @ layer.delta_weight().double().T
    assert torch.allclose(y.double(), exact, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [{"dropout": 0.5}, {"gate_dropout": 0.5}])
def test_recomputation_draws_the_same_mask(fields, reentrant, device):
    layer = make_layer("nf4", **fields)
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.ones(6, K, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gate_dropout_leaves_components_out():
    layer = make_layer("nf4", gate_dropout=0.5)
    alphas = torch.stack([layer.mixture(["default"], gate_dropout=True)[2] for _ in range(200)])
    assert 0.3 < (alphas == 0).float().mean() < 0.7
    kept = alphas.sum(0) / (alphas != 0).sum(0)
    assert torch.allclose(kept, 2 * layer.alpha("default"), rtol=1e-4)
    assert torch.equal(layer.eval()(torch.ones(3, K)), layer.eval()(torch.ones(3, K)))


@pytest.mark.parametrize("kind", ["linear", "nf4", "bitsandbytes"])
def test_autocast_gives_what_the_base_gives(kind, device):
    layer = make_layer(kind)
    x = torch.randn(5, K)
    with torch.autocast(device.type, torch.bfloat16):
        y, base = layer(x), layer.base_layer(x)
    assert y.dtype == base.dtype
    y.float().sum().backward()
    assert layer.moka_A["default"].grad.dtype == torch.float32


def test_products_run_in_the_compute_dtype_of_a_4_bit_layer(device):
    base = make_base("bitsandbytes", compute_dtype=torch.bfloat16)
    layer = MokaLinear(base)
    layer.add_adapter("default", MokaConfig(), plan_shapes(N, K, 10))
    layer.set_adapter(["default"])
    randomize(layer)
    x = torch.randn(5, K)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    base.compute_dtype = torch.float16  # then autocast's dtype takes its place, for the bias too
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()).float())
    base.compute_dtype = torch.bfloat16
    model = moka.inject(nn.Sequential(base), MokaConfig(target_modules=["0"]))
    assert "bitsandbytes (bfloat16)" in str(moka.summary(model))


@pytest.mark.parametrize("held", [None, torch.uint8, torch.bfloat16])
def test_casting_a_model_keeps_the_bytes_and_the_quantization_constants(held):
    layer = NF4Linear.from_linear(nn.Linear(K, N), 64, double_quant=True)
    x = torch.randn(20, K)
    expected = layer(x)
    if held is not None:
        layer.hold_as_parameter(held)
        assert layer.packed.dtype == held and torch.equal(layer(x), expected)
    before = digests(layer)
    cast = copy.deepcopy(layer)
    cast.bias.requires_grad_().grad = torch.ones(N)
    cast.to(torch.bfloat16)
    assert cast.absmax2.dtype == torch.float32
    assert cast.bias.dtype == cast.bias.grad.dtype == torch.bfloat16
    after = digests(cast)
    assert all(after[name] == digest for name, digest in before.items() if name != "bias")
    assert layer.to(torch.float64).packed.dtype == (held or torch.uint8)


def test_an_odd_number_of_bytes_stays_a_buffer():
    layer = NF4Linear.from_linear(nn.Linear(6, 3))
    layer.hold_as_parameter(torch.bfloat16)
    assert "packed" in dict(layer.named_buffers()) and layer.packed.numel() == 9


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_deepcopy(kind, device):
    layer, other = make_layer(kind), make_layer(kind)
    x = torch.randn(20, K)
    assert not torch.equal(layer(x), other(x))
    if kind != "bitsandbytes":  # which does not load a 4-bit state into an existing layer
        other.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
@pytest.mark.parametrize("kind", ["linear", "nf4_double", "bitsandbytes"])
@pytest.mark.parametrize("device", ["cpu", BACKENDS[-1]])  # as a default it would be part of what is compiled
def test_an_adapted_block_compiles_into_one_graph(device, kind):
    torch._dynamo.reset()
    block = nn.Sequential(make_layer(kind), nn.SiLU(), nn.Linear(N, K), make_layer(kind, gate_dropout=0.0))
    block, x = block.to(device), torch.randn(20, K, device=device)
    results = []
    for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        block.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y] + [p.grad for p in block.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) == 9
    torch.testing.assert_close(*results)  # older versions of torch take some operations of the graph apart


def test_base_that_requires_gradients_is_refused():
    layer = make_layer("linear")
    layer.base_layer.requires_grad_(True)
    with pytest.raises(ConfigError, match="requires_grad_"):
        layer(torch.randn(2, K))


def test_delta_weight_arguments():
    layer = make_layer("linear")
    expected = kron_dense(*layer.mixture(["default"]))
    assert torch.allclose(moka.delta_weight(layer), expected, atol=1e-6)
    assert moka.delta_weight(layer, "default").dtype == torch.float32
    with pytest.raises(ConfigError, match=r"expected an adapted layer.*got Linear"):
        moka.delta_weight(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"'other' does not exist; the layer has \['default'\]"):
        moka.delta_weight(layer, "other")
    with pytest.raises(StateError, match="exists already"):
        layer.add_adapter("default", MokaConfig(), layer.shapes["default"])


# A small Llama: tied embeddings, hidden size 32

IDS = torch.arange(3, 43).view(2, 20)


def train(model, steps, lr=0.01):
    ids = IDS.to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_ten_steps_change_every_adapter_tensor_and_no_other(device):
    model = moka.quantize(tiny_model().train())
    moka.inject(model, MokaConfig(target_modules="all-linear", r=4))
    before = digests(model)
    losses = train(model, 10)
    after = digests(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if ".moka_" in name} and len(changed) == 2 * 7 * 3
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before inject", "after inject"])
def test_gradient_checkpointing(when, reentrant, device):
    def gradients(recompute):
        torch.manual_seed(0)
        model = tiny_model().train()
        options = {"use_reentrant": reentrant}
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        if recompute and when == "before inject":
            enable(options)
            model.disable_input_require_grads()  # older transformers do not switch it on for a plain model
        moka.inject(model, MokaConfig(r=5))
        if recompute and when == "after inject":
            enable(options)
        randomize(model, 0.1)
        ids = IDS.to(device)
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 12 and all(g is not None and g.any() for g in plain.values())
    assert all(torch.equal(g, recomputed[name]) for name, g in plain.items())

"""Mixed batches and weighted sums of adapters, for `moka.inject` and at the level of peft."""

import pytest
import torch
from test_kron import Mixture
from torch import nn

import moka
from helpers import assert_close_by_rule, shifted
from moka import functional, nf4, reference
from moka.bases import NF4Linear
from moka.errors import ConfigError, StateError
from moka.rows import Rows
from moka.shapes import flatten_shapes
from moka.weighted import combination_config, combine_

N, K = 32, 64
SHAPES = {"a": [(8, 4, 4, 16), (2, 16, 16, 4)], "b": [(4, 4, 8, 16), (8, 8, 4, 8), (16, 4, 2, 16)]}


def make(kind="linear", dtype=torch.float32, **fields):
    """One layer with two adapters of random values, and a second layer that has "b" alone."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": nn.Linear(K, N), "y": nn.Linear(N, K)}).to(dtype)
    if kind == "nf4":
        model["x"], model["y"] = (NF4Linear.from_linear(layer) for layer in (model["x"], model["y"]))
    for name, shapes in SHAPES.items():
        targets = {"x": shapes} if name == "a" else {"x": shapes, "y": [(8, 4, 8, 8)]}
        config = moka.MokaConfig(target_modules=list(targets), shapes=targets, **fields)
        moka.inject(model, config, name)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            continue
        parameter.data.normal_()
    for layer in moka.adapter_layers(model).values():
        for table in (layer.moka_A, layer.moka_B, layer.moka_gate):
            for parameter in table.values():
                parameter.data.normal_()
    return model


def dense_row(layer, name, x):
    """The textbook formula for one row, in float64."""
    weight = layer.base_weight()
    weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)
    y = x.double() @ weight.double().T + layer.bias.double()
    if name in layer.configs:
        A, B, alpha, shapes = layer.mixture([name])
        y = y + x.double() @ reference.kron_dense(A.double(), B.double(), alpha.double(), shapes).T
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_each_row_gets_its_adapter(kind, dtype):
    model = make(kind, dtype if kind == "linear" else torch.float32)
    names = ["b", "__base__", "a", "b", "a"]
    for layer in moka.adapter_layers(model).values():
        x = torch.randn(5, 3, layer.in_features, dtype=dtype)
        with moka.mixed_batch(model, names), torch.no_grad():
            y = layer(x)
        expected = torch.stack([dense_row(layer, name, row) for name, row in zip(names, x, strict=True)])
        # the base's product and the mixture are rounded before and after they are added
        assert_close_by_rule(y, expected, None, dtype, roundings=3)
        assert layer.rows is None


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_gradients_of_each_adapter_come_from_its_rows(kind):
    model = make(kind)
    layer, names = model["x"], ["b", "__base__", "a", "b"]
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.dim() == 1)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    x, dy = torch.randn(4, 3, K, requires_grad=True), torch.randn(4, 3, N)
    with moka.mixed_batch(model, names):
        y = layer(x)
    y.backward(dy)
    got = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    dx = x.grad.clone()
    layer.zero_grad()
    for name in ("a", "b"):
        rows = [i for i, n in enumerate(names) if n == name]
        layer.active_adapters = [name]
        part = x.detach()[rows].requires_grad_()
        layer(part).backward(dy[rows])
        torch.testing.assert_close(dx[rows], part.grad)
    assert len(got) == 6
    for path, grad in got.items():
        torch.testing.assert_close(grad, dict(layer.named_parameters())[path].grad, msg=path)


def test_active_adapters_and_training_do_not_matter_but_disabling_does():
    model = make(dropout=0.5, gate_dropout=0.5)
    layer, x = model["x"].eval(), torch.randn(2, K)
    with moka.mixed_batch(model, ["a", "a"]):
        first = layer(x)
        layer.active_adapters = []
        assert torch.equal(layer(x), first)
        with moka.disabled(model):
            assert torch.equal(layer(x), layer.base_layer(x))
    layer.active_adapters = ["a"]
    assert torch.allclose(layer(x), first, atol=1e-4)
    layer.train()
    with moka.mixed_batch(model, ["a", "__base__"]):
        dropped = layer(x)
    assert not torch.allclose(dropped[0], first[0]) and torch.equal(dropped[1], layer.base_layer(x)[1])


def test_repeated_rows():
    """Beam search calls some layers with each row several times over, one after the other."""
    model, x = make(), torch.randn(2, K)
    with moka.mixed_batch(model, ["a", "b"], repeats=3):
        once, thrice = model["x"](x), model["x"](x.repeat_interleave(3, 0))
        torch.testing.assert_close(thrice, once.repeat_interleave(3, 0))
        with pytest.raises(StateError, match="a layer got 4 rows"):
            model["x"](torch.randn(4, K))
    assert model["x"].rows is None


def test_mixing_is_refused_before_it_starts():
    model = make()
    for names, message in (
        (["a", "c"], r"got \['c'\]"),
        ([], r"got \[\]"),
        ("a", "got 'a', expected a list"),
    ):
        with pytest.raises(ConfigError, match=message), moka.mixed_batch(model, names):
            pass
    with (
        moka.mixed_batch(model, ["a"]),
        pytest.raises(StateError, match="another mixed batch"),
        moka.mixed_batch(model, ["b"]),
    ):
        pass
    moka.merge(model, adapter_name="a", into=torch.float32)
    with pytest.raises(StateError, match="merged"), moka.mixed_batch(model, ["b"]):
        pass
    moka.unmerge(model)
    model["x"].gradient_checkpointing = True
    with pytest.raises(StateError, match="gradient checkpointing"), moka.mixed_batch(model.train(), ["a"]):
        pass
    with torch.no_grad(), moka.mixed_batch(model, ["a"]):  # nothing to run again
        pass
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    moka.inject(model, moka.MokaConfig(target_modules=["0"], r=2, modules_to_save=["1"]))
    with pytest.raises(ConfigError, match="modules_to_save"), moka.mixed_batch(model, ["default"]):
        pass


def test_rows_of_an_adapter_are_looked_up_once():
    rows, x = Rows(["a", "b", "a"]), torch.zeros(3, 1)
    assert {name: index.tolist() for name, index in rows.indices(x).items()} == {"a": [0, 2], "b": [1]}
    assert rows.indices(x) is rows.indices(x)


def test_each_adapter_gets_its_rows_and_gives_them_back():
    x = torch.arange(10.0).view(5, 2)
    calls = {}

    def negate_b(name, part):
        calls[name] = part
        return -part if name == "b" else part

    y = Rows(["c", "b", "a", "b", "c"]).each(x, negate_b)
    assert {name: part[:, 0].tolist() for name, part in calls.items()} == {"c": [0, 8], "b": [2, 6], "a": [4]}
    assert torch.equal(y, x * torch.tensor([1, -1, 1, -1, 1])[:, None])


@pytest.mark.parametrize("gate", ["softmax", "linear", "none"])
def test_a_weighted_sum_is_exact(gate):
    model = make(gate=gate)
    layers, names, weights = moka.adapter_layers(model), ["a", "b"], [0.75, -0.5]
    expected = {
        path: sum(
            w * dense_delta(layer, n) for n, w in zip(names, weights, strict=True) if n in layer.configs
        )
        for path, layer in layers.items()
    }
    config = combination_config(layers, names, weights)
    moka.inject(model, config, "sum")
    combine_(layers, names, weights, "sum")
    for path, layer in layers.items():
        assert_close_by_rule(layer.delta_weight("sum"), expected[path], None, torch.float32)
        assert layer.configs["sum"].gate == "linear"


def dense_delta(layer, name):
    A, B, alpha, shapes = layer.mixture([name])
    return reference.kron_dense(A.double(), B.double(), alpha.double(), shapes).detach()


def test_weights_and_names_must_match():
    layers = moka.adapter_layers(make())
    for names, weights, message in (
        (["a", "c"], [1, 1], "adapters: got"),
        (["a", "a"], [1, 1], "adapters: got"),
        ([], [], "adapters: got"),
        (["a", "b"], [1], "weights: got"),
        (["a", "b"], [1, float("nan")], "weights: got"),
    ):
        with pytest.raises(ConfigError, match=message):
            combination_config(layers, names, weights)


def operands(N, K, shapes, adapters, dtype, tokens):
    """A weight, stacked mixtures and rows of them, each adapter and the base alone among them."""
    w4 = nf4.quantize(torch.randn(N, K) / 8, double_quant=True)
    mixtures = [Mixture(shapes, 1, dtype, make=shifted) for _ in range(adapters)]
    A, B, alpha = (torch.stack([getattr(m, name) for m in mixtures]) / 4 for name in ("A", "B", "alpha"))
    adapter = torch.arange(tokens, dtype=torch.int32) % (adapters + 1) - 1
    return w4, (A, B, alpha), adapter, torch.randn(tokens, K).to(dtype)


#: (N, K, shapes): for the GPU's fast kernel, with more rows than it has blocks for, and for none
ROWS = {
    "few rows": (64, 512, [(4, 16, 16, 32), (8, 32, 8, 16)]),
    "many rows": (4096, 256, [(64, 16, 64, 16), (16, 8, 256, 32), (16, 16, 256, 16, 1)]),
    "any shape": (31 * 3, 66, [(31, 6, 3, 11), (3, 33, 31, 2)]),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_mixture_per_row(name, dtype, bias, device):
    N, K, shapes = ROWS[name]
    for tokens in (1, 7, 33, 64, 70):
        w4, (A, B, alpha), adapter, x = operands(N, K, shapes, 3, dtype, tokens)
        b = torch.randn(N).to(dtype) if bias else None
        y = functional.nf4_linear_rows(x, w4.op_args(), b, A, B, alpha, adapter, shapes)
        expected = x.double() @ w4.dequantize(torch.float32).double().T + (0 if b is None else b.double())
        for i in range(3):
            dense = reference.kron_dense(A[i].double(), B[i].double(), alpha[i].double(), shapes)
            expected += (adapter == i).double()[:, None] * (x.double() @ dense.T)
        # the factors are rounded to tf32 or 16 bits, the shares added before or after y is
        assert_close_by_rule(y, expected, None, dtype, roundings=4)


def test_a_mixture_per_row_checks_its_arguments(device):
    w4, (A, B, alpha), adapter, x = operands(*ROWS["few rows"], 3, torch.float32, 5)
    args = x, *w4.op_args(), None, A, B, alpha, adapter, flatten_shapes(ROWS["few rows"][2])
    for i, wrong, error, message in (
        (11, A[:2], ValueError, "A, B, alpha: expected"),
        (14, adapter[:4], ValueError, "adapter: expected one number for each row"),
        (14, adapter.long(), TypeError, "adapter: expected dtype Int"),
        (11, A[:, 1:].contiguous(), ValueError, "A: expected"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.moka.nf4_linear_rows(*args[:i], wrong, *args[i + 1 :])


@pytest.mark.cuda
@pytest.mark.parametrize("gate", ["softmax", "none"])
def test_few_tokens_take_one_operator(gate):
    """A step of serving: the same numbers as one adapter after the other; a change of an adapter is seen."""
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(512, 256)).to("cuda", torch.bfloat16)
    model = nn.ModuleDict({"x": layer})
    for name in ("a", "b"):
        moka.inject(model, moka.MokaConfig(target_modules=["x"], r=4, gate=gate), name)
    layer, names = model["x"].eval(), ["b", "__base__", "a", "b", "a"]
    for parameter in (*layer.moka_A.values(), *layer.moka_B.values(), *layer.moka_gate.values()):
        parameter.data.normal_(std=0.3)
    x = torch.randn(5, 3, 512, device="cuda", dtype=torch.bfloat16)
    calls = []
    original = functional.nf4_linear_rows
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), moka.mixed_batch(model, names):
        patch.setattr(functional, "nf4_linear_rows", lambda *a: calls.append(1) or original(*a))
        for _ in range(2):
            expected = torch.stack([dense_row(layer, name, row) for name, row in zip(names, x, strict=True)])
            assert_close_by_rule(layer(x).cpu(), expected.cpu(), None, torch.bfloat16, roundings=4)
            layer.moka_B["a"].mul_(3)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_one_product_for_each_adapter(kind, device):
    """As on a GPU; the values and gradients are those of the other way, where the base's y comes first."""
    x, dy = torch.randn(5, 40, K), torch.randn(5, 40, N)
    results = []
    for copies in (False, True):
        model = make(kind)
        for table in model["x"].tables():
            for parameter in table.values():
                parameter.requires_grad_()
        inputs, calls = x.clone().requires_grad_(), []
        product = model["x"].product
        with pytest.MonkeyPatch.context() as patch, moka.mixed_batch(model, ["b", "__base__", "a", "b", "a"]):
            patch.setattr("moka.rows.copies_cost_little", lambda x, copies=copies: copies)
            patch.setattr(model["x"], "product", lambda *a, f=product, c=calls: c.append(1) or f(*a))
            y = model["x"](inputs)
        y.backward(dy)
        assert len(calls) == (2 if copies else 0)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "dx": inputs.grad} | grads)
    assert list(results[0]) == list(results[1]) and len(results[0]) == 8
    for name, want in results[0].items():
        assert_close_by_rule(results[1][name], want.double(), None, torch.float32, reduces_tokens=True)


def alike(**fields):
    """One NF4 layer with two adapters of the same shapes."""
    model = nn.ModuleDict({"x": NF4Linear.from_linear(nn.Linear(K, N))})
    for name in ("a", "b"):
        moka.inject(model, moka.MokaConfig(target_modules=["x"], r=2, **fields), name)
        model["x"].moka_B[name].data.normal_()
    return model


@pytest.mark.parametrize("copies", [False, True])
def test_a_change_within_the_batch_is_seen(copies, monkeypatch):
    monkeypatch.setattr("moka.rows.copies_cost_little", lambda x: copies)
    model, x = alike().eval(), torch.randn(2, 3, K)
    with torch.no_grad(), moka.mixed_batch(model, ["a", "b"]):
        for _ in range(2):
            y = model["x"](x)
            for i, name in enumerate("ab"):
                assert_close_by_rule(y[i], dense_row(model["x"], name, x[i]), None, torch.float32)
            model["x"].moka_B["a"].mul_(3)


@pytest.mark.parametrize("copies", [False, True])
def test_dropout_of_each_adapter(copies, monkeypatch):
    """Of its own rows, and of what goes through its factors alone."""
    monkeypatch.setattr("moka.rows.copies_cost_little", lambda x: copies)
    model, x = alike(dropout=1 - 1e-6).train(), torch.randn(3, K)
    with moka.mixed_batch(model, ["a", "__base__", "b"]):
        y = model["x"](x)
    torch.testing.assert_close(y, model["x"].base_layer(x))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_batch_is_one_graph(training, copies, monkeypatch):
    monkeypatch.setattr("moka.rows.copies_cost_little", lambda x: copies)
    torch._dynamo.reset()
    model, x = alike().train(training), torch.randn(4, 3, K)
    with torch.set_grad_enabled(training), moka.mixed_batch(model, ["b", "__base__", "a", "b"]):
        expected = model["x"](x)
        compiled = torch.compile(model["x"], backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)

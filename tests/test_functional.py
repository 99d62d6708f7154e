"""The differentiable operations: gradients, what they refuse, and how they fit into torch's machinery."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import moka
from helpers import assert_close_by_rule, roundings
from moka import functional as F
from moka.reference import kron_dense, kron_mixture
from moka.shapes import KronShape, flatten_shapes

N, K = 12, 8
SHAPES = (KronShape(3, 2, 4, 4), KronShape(6, 4, 2, 2), KronShape(4, 4, 3, 2, 1), KronShape(6, 4, 2, 2, 2))
BASES = ("none", "dense", "nf4", "nf4_double")


def factors(dtype=torch.float32):
    """A, B, alpha of SHAPES."""
    A = torch.randn(sum(s.a_numel for s in SHAPES), dtype=dtype)
    B = torch.randn(sum(s.b_numel for s in SHAPES), dtype=dtype)
    return A, B, torch.tensor([0.5, -0.8, 0.3, 1.0], dtype=dtype)


def base_weight(kind, dtype=torch.float32):
    weight = torch.randn(N, K)
    return weight.to(dtype) if kind == "dense" else moka.nf4.quantize(weight, 32, kind == "nf4_double")


def call(base, path, x, bias, A, B, alpha):
    if base is None:
        return F.kron_mixture(x, A, B, alpha, SHAPES)
    return F.moka_linear(x, base, bias, A, B, alpha, SHAPES, path)


def dense_weight(base):
    return base.dequantize(torch.float64) if isinstance(base, moka.nf4.NF4Weight) else base.double()


def grads(y, seed_grad, *tensors):
    return torch.autograd.grad(y, tensors, seed_grad)


@pytest.mark.parametrize("path", ["merged", "factored"])
@pytest.mark.parametrize("kind", BASES)
def test_gradcheck(kind, path, device):
    base = None if kind == "none" else base_weight(kind, torch.float64)
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)
    A, B, alpha = (t.requires_grad_() for t in factors(torch.float64))
    inputs = (x, A, B, alpha) if base is None else (x, bias, A, B, alpha)
    function = (lambda *t: call(None, path, t[0], None, *t[1:])) if base is None else (
        lambda *t: call(base, path, *t)
    )  # fmt: skip
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("path", ["merged", "factored"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4_double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_by_the_rule(kind, path, dtype, device):
    base = base_weight(kind, dtype)
    x = torch.randn(5, K).to(dtype).requires_grad_()
    A, B, alpha = (t.requires_grad_() for t in factors())
    y = call(base, path, x, None, A, B, alpha)
    dy = torch.randn_like(y)
    got = (y, *grads(y, dy, x, A, B, alpha))

    def plain(to):
        """The formula in plain PyTorch: factored, or with the merged weight, as `path` says."""
        t = [v.detach().to(to).requires_grad_() for v in (x, A, B, alpha)]
        weight = dense_weight(base).to(to)
        if path == "merged":
            out = t[0] @ (weight + kron_dense(*t[1:], SHAPES)).T
        else:
            out = t[0] @ weight.T + kron_mixture(*t, SHAPES)
        return (out, *grads(out, dy.to(to), *t))

    for name, actual, exact, eager in zip(
        ("y", "dx", "dA", "dB", "dalpha"), got, plain(torch.float64), plain(dtype), strict=True
    ):
        expected_dtype = dtype if name in ("y", "dx") else torch.float32
        # parameters stay in fp32: their plain gradient is the fp32 one, from the same rounded inputs
        if expected_dtype == torch.float32 and dtype != torch.float32:
            eager = dict(zip(("y", "dx", "dA", "dB", "dalpha"), plain(torch.float32), strict=True))[name]
        count = 2 if path == "merged" else roundings(x, path)  # a dense base is merged in 16 bits
        assert_close_by_rule(actual, exact, eager, expected_dtype, count, reduces_tokens=True)


class ForeignWeight(torch.Tensor):
    """What a library makes that quantizes by a subclass."""


def test_a_foreign_weight_is_multiplied_by_itself():
    weight = torch.randn(N, K)
    assert F.dense_path("auto", (weight,)) == F.dense_path("auto", (torch.nn.Parameter(weight),)) == "auto"
    foreign = weight.as_subclass(ForeignWeight)
    assert [F.dense_path(path, (foreign,)) for path in F.PATHS] == ["factored", "merged", "factored"]
    y = F.moka_linear(torch.randn(2, K), foreign, None, *factors(), SHAPES)
    assert y.shape == (2, N)


def test_only_needed_gradients_are_computed(device):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moka.kron_mix_grad.default:
                needs.append(args[6:9])
            return func(*args, **(kwargs or {}))

    base, bias = base_weight("nf4"), torch.randn(N)
    values = (torch.randn(5, K), bias, *factors())
    everything = [v.clone().requires_grad_() for v in values]
    call(base, "factored", *everything).sum().backward()
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        needs = []
        tensors = [v.clone().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        with Recorder():
            call(base, "factored", *tensors).sum().backward()
        assert needs == ([wanted[2:]] if any(wanted[2:]) else [])
        for tensor, full, w in zip(tensors, everything, wanted, strict=True):
            assert torch.equal(tensor.grad, full.grad) if w else tensor.grad is None


def test_double_backward_is_refused():
    A, B, alpha = (t.requires_grad_() for t in factors())
    x = torch.randn(5, K, requires_grad=True)
    y = call(base_weight("nf4"), "factored", x, None, A, B, alpha)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_change_in_place_before_backward_is_an_error(victim):
    tensors = [t.requires_grad_() for t in factors()]
    y = call(base_weight("nf4"), "auto", torch.randn(5, K), None, *tensors)
    with torch.no_grad():
        tensors[victim].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use
def test_forward_mode_is_refused():
    A, B, alpha = factors()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(5, K), torch.randn(5, K))
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp is not implemented"):
            F.kron_mixture(x, A, B, alpha, SHAPES)


@pytest.mark.parametrize("path", ["merged", "factored"])
@pytest.mark.parametrize("kind", BASES)
def test_zero_tokens_keep_the_graph(kind, path, device):
    base = None if kind == "none" else base_weight(kind)
    x, bias = torch.empty(0, K, requires_grad=True), torch.randn(N, requires_grad=True)
    tensors = [t.requires_grad_() for t in factors()]
    y = call(base, path, x, bias, *tensors)
    assert y.shape == (0, N) and y.grad_fn is not None
    y.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in tensors)


@pytest.mark.parametrize("path", ["merged", "factored"])
def test_strides_do_not_matter(path, device):
    base, mixture = base_weight("nf4"), factors()
    x = torch.randn(4, 6, K)
    expected = call(base, path, x, None, *mixture)
    views = {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns": torch.stack((x, x), -1).flatten(-2)[..., ::2],
        "offset": torch.cat((torch.zeros(1), x.flatten()))[1:].view_as(x),
    }
    for name, view in views.items():
        y = call(base, path, view, None, *mixture)
        assert torch.equal(y, expected), name
    leaf = x.clone().requires_grad_()
    y = call(base, path, leaf, None, *mixture)
    (strided,) = torch.autograd.grad(y, leaf, torch.ones(()).expand_as(y), retain_graph=True)
    (plain,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("path", ["merged", "factored"])
def test_a_bad_token_stays_alone(path, device):
    x = torch.randn(5, K)
    x[2, 3] = float("nan")
    y = call(base_weight("nf4"), path, x, None, *factors())
    assert y.isfinite().all(-1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind, device):
    base = None if kind == "none" else base_weight(kind)
    tensors = [t.requires_grad_() for t in factors()]
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(base, "auto", x, None, *tensors)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    assert torch.equal(y, call(base, "auto", x.bfloat16(), None, *tensors))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use
@pytest.mark.parametrize(
    "kind, path", [("none", "factored"), ("dense", "merged"), ("nf4", "merged"), ("nf4", "auto")]
)
def test_compiles_in_one_graph_for_any_token_count(kind, path, device):
    base = None if kind == "none" else base_weight(kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: call(base, path, *t), fullgraph=True, dynamic=True, backend=counter)
    mixture = factors()
    for tokens in (5, 9, 20):  # sizes that no other dimension has, or one graph would not do
        results = []
        for function in (compiled, lambda *t: call(base, path, *t)):
            t = [v.clone().requires_grad_() for v in (torch.ones(tokens, K), torch.ones(N), *mixture)]
            y = function(*t)
            y.square().sum().backward()
            results.append((y, *(v.grad for v in t if v.grad is not None)))
        assert len(results[0]) == len(results[1]) > 4
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def op_cases():
    """(operator, arguments) for every operator of the extension, on detached inputs."""
    torch.manual_seed(0)
    ops, shapes = torch.ops.moka, flatten_shapes(SHAPES)
    x, dy, bias, mixture = torch.randn(5, K), torch.randn(5, N), torch.randn(N), factors()
    plain, double = base_weight("nf4").op_args(), base_weight("nf4_double").op_args()
    none, rows = (None, None, None, []), torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32)
    return {
        "nf4_quantize": (ops.nf4_quantize.default, (torch.randn(N, K), 32)),
        "nf4_dequantize": (ops.nf4_dequantize.default, (*plain, torch.float32, *none)),
        "nf4_dequantize merged": (ops.nf4_dequantize.default, (*double, torch.bfloat16, *mixture, shapes)),
        "nf4_linear": (ops.nf4_linear.default, (x, *double, bias, *none, False, "auto")),
        "nf4_linear merged": (ops.nf4_linear.default, (x, *plain, bias, *mixture, shapes, False, "merged")),
        "nf4_linear dx": (ops.nf4_linear.default, (dy, *plain, None, *mixture, shapes, True, "factored")),
        "nf4_linear_rows": (
            ops.nf4_linear_rows.default,
            (x, *double, bias, *(torch.stack([t, -t]) for t in mixture), rows, shapes),
        ),
        "nf4_lora": (
            ops.nf4_lora.default,
            (x, *double, bias, torch.randn(3, K), torch.randn(N, 3), 2.0, torch.float32, torch.float32),
        ),
        "nf4_lora mixed": (
            ops.nf4_lora.default,
            (x, *plain, None, torch.randn(1, K), torch.randn(N, 1), 2.0, torch.bfloat16, torch.float16),
        ),
        "nf4_linear_lora": (
            ops.nf4_linear_lora.default,
            (x, *double, bias, torch.randn(3, K), torch.randn(N, 3), torch.randn(5, 3), 2.0, False, x.dtype),
        ),
        "nf4_linear_lora dx": (
            ops.nf4_linear_lora.default,
            (
                dy,
                *plain,
                None,
                torch.randn(1, K),
                torch.randn(N, 1),
                torch.randn(5, 1),
                0.5,
                True,
                torch.bfloat16,
            ),
        ),
        "lora_grad": (
            ops.lora_grad.default,
            (dy, x, torch.randn(3, K), torch.randn(N, 3), torch.randn(5, 3), 2.0, x.dtype, torch.float64),
        ),
        "lora_grad of x alone": (
            ops.lora_grad.default,
            (dy, None, torch.randn(3, K), torch.randn(N, 3), None, 2.0, x.dtype, x.dtype),
        ),
        "lora_grad of x and A": (
            ops.lora_grad.default,
            (dy, x, torch.randn(3, K), torch.randn(N, 3), None, 2.0, x.dtype, x.dtype),
        ),
        "dense_linear": (
            ops.dense_linear.default,
            (x, torch.randn(N, K), bias, *mixture, shapes, "factored"),
        ),
        "dense_linear merged": (
            ops.dense_linear.default,
            (x, torch.randn(N, K), None, *mixture, shapes, "merged"),
        ),
        "kron_add": (ops.kron_add.default, (torch.randn(N, K), *mixture, shapes)),
        "kron_mix": (ops.kron_mix.default, (x, *mixture, shapes, False, None)),
        "kron_mix dx": (ops.kron_mix.default, (dy, *mixture, shapes, True, torch.randn(5, K))),
        "kron_mix_grad": (ops.kron_mix_grad.default, (x, dy, *mixture, shapes, True, True, True)),
        "gate": (ops.gate.default, (torch.randn(4), 4.0)),
        "gate_grad": (ops.gate_grad.default, (torch.rand(4), torch.randn(4), 4.0)),
        "kron_mix_grad A": (ops.kron_mix_grad.default, (x, dy, *mixture, shapes, True, False, False)),
    }


@pytest.mark.parametrize("name", op_cases())
def test_opcheck(name, device):
    op, args = op_cases()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "name",
    [
        "nf4_linear",
        "nf4_linear merged",
        "nf4_linear dx",
        "nf4_lora",
        "nf4_lora mixed",
        "dense_linear",
        "gate",
    ],
)
def test_opcheck_with_gradients(name):
    op, args = op_cases()[name]
    for argument, value in zip(op._schema.arguments, args, strict=True):
        if argument.name in ("x", "bias", "A", "B", "alpha", "logits") and value is not None:
            value.requires_grad_()
    torch.library.opcheck(op, args)


@pytest.mark.filterwarnings("ignore")  # torch's own, about the .grad of fake tensors
@pytest.mark.parametrize("kind", ["dense", "nf4_double"])
def test_gradients_by_compiled_autograd(kind):
    base, leaves = base_weight(kind), [t.requires_grad_() for t in (torch.randn(5, K), *factors())]

    def backward():
        x, A, B, logits = leaves
        call(base, "factored", x, None, A, B, F.softmax_gate(logits, 4.0)).square().sum().backward()
        return [(t.grad, setattr(t, "grad", None))[0] for t in leaves]

    plain = backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        compiled = backward()
    assert all(map(torch.equal, plain, compiled))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    x, base, mixture = torch.randn(5, K), base_weight("nf4"), factors()
    y = torch.func.vmap(lambda row: call(base, "factored", row[None], None, *mixture)[0])(x)
    torch.testing.assert_close(y, call(base, "factored", x, None, *mixture))


@pytest.mark.parametrize("r", [1, 10, 64])
def test_gate(r, device):
    logits, grad = torch.randn(r), torch.randn(r)
    alpha = F.softmax_gate(logits.requires_grad_(), 10.0)
    torch.testing.assert_close(alpha, 10 * logits.softmax(0))
    (got,) = torch.autograd.grad(alpha, logits, grad)
    (want,) = torch.autograd.grad(10 * logits.softmax(0), logits, grad)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        assert F.softmax_gate(logits.to(dtype), 2.0).dtype == torch.promote_types(dtype, torch.float32)


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name[:6] == "moka::"
    }
    assert registered == {name.split()[0] for name in op_cases()}


def test_wrong_arguments_say_what_is_expected(device):
    base, (A, B, alpha) = base_weight("nf4"), factors()
    x = torch.randn(5, K)
    with pytest.raises(moka.errors.ConfigError, match=r"path: got 'fast', expected one of"):
        F.moka_linear(x, base, None, A, B, alpha, SHAPES, "fast")
    with pytest.raises(moka.errors.ConfigError, match="requires_grad_"):
        F.moka_linear(x, torch.randn(N, K, requires_grad=True), None, A, B, alpha, SHAPES)
    with pytest.raises(ValueError, match=rf"x: expected shape \[\.\.\., {K}\]"):
        F.nf4_linear(torch.randn(5, K + 1), base)
    with pytest.raises(ValueError, match="A: expected"):
        F.kron_mixture(x, A[1:], B, alpha, SHAPES)
    with pytest.raises(TypeError, match="dtype"):
        F.kron_mixture(x, A.half(), B.half(), alpha, SHAPES)
    with pytest.raises(ValueError, match=r"shapes\[1\]"):
        F.kron_mixture(x, A, B, alpha, [SHAPES[0], (1, 2, 4, 4)])

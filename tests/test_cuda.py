"""The CUDA kernels for the shapes of models, and for the largest; other cases are in the CPU's tests."""

import itertools

import pytest
import torch
from test_kron import Mixture
from test_nf4 import Layer
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_close_by_rule, integers, roundings, shifted
from moka import nf4, reference
from moka.functional import moka_linear
from moka.rules import plan_shapes

pytestmark = pytest.mark.cuda
ops = torch.ops.moka

SQUARE = [(16, 256, 256, 16), (32, 128, 128, 32), (64, 64, 64, 64), (128, 32, 32, 128), (256, 16, 16, 256)]
#: shapes of the fast kernels: periodic ones, one or two copies, identities, a row phase of eight; then shapes
#: that take the kernels for any, by four columns and one by one
PERIODIC = {
    "square": SQUARE * 2,
    "square_once": SQUARE,
    "square_three": SQUARE[1:4] * 2 + SQUARE[:3],
    "wide": [(8, 256, 128, 16), (16, 128, 64, 32), (64, 32, 16, 128), (128, 16, 8, 256)] * 2,
    "factor_seven": [(28, 32, 16, 16), (14, 16, 32, 32), (7, 32, 64, 16)],
    "low_rank": [(512, 1, 1, 256)] * 3,
    "identities": [(16, 16, 16, 32, 1), (16, 32, 16, 16, 2), (8, 16, 32, 32)],
    "even": [(16, 14, 28, 128), (112, 112, 4, 16), (32, 32, 14, 56), (448, 448, 1, 4, 1)],
    "odd": [(16, 7, 28, 256), (64, 256, 7, 7), (28, 28, 16, 64, 1), (64, 256, 7, 7, 2)],
}
#: layers that the Hopper gradient kernels were made for; others, of smaller A's, also odd, and LLaMA-2's MLP
LLAMA = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (4096, 1024)]
OTHERS = [(3584, 3584), (3840, 3840), (2560, 4096), (1024, 2304), (12288, 4096), (11008, 4096), (4096, 11008)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 5, 8, 9, 16, 17, 40, 64, 65, 200)
by_case = pytest.mark.parametrize("name", PERIODIC)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Tensors are made on the GPU, unless a test says otherwise."""
    with torch.device("cuda"):
        yield


def layer_of(shapes, dtype=torch.bfloat16, double_quant=True, make=torch.randn):
    """A layer of the size that these components give."""
    ma, na, mb, nb = shapes[0][:4]
    return Layer(ma * mb, na * nb, 64, shapes, dtype, double_quant, make)


def make_layer(name, *args, **kwargs):
    """A layer of one of PERIODIC."""
    return layer_of(PERIODIC[name], *args, **kwargs)


@by_dtype
@by_case
def test_gradients(name, dtype):
    for tokens in (33, 131):
        m = Mixture(PERIODIC[name], tokens, dtype, dtype, make=shifted)
        m.x, m.dy, m.A, m.B = m.x / 64, m.dy / 64, m.A / 16, m.B / 16  # sums over tokens stay inside fp16
        for got, want, plain in zip(m.grad(), m.reference_grad(), m.reference_grad(dtype), strict=True):
            assert_close_by_rule(got, want, plain, dtype, roundings=2, reduces_tokens=True)


@pytest.mark.parametrize("tokens", (64, 131, 300))
@pytest.mark.parametrize("r", (10, 7))
@pytest.mark.parametrize("N, K", [*LLAMA, *OTHERS])
def test_factored_gradients(N, K, r, tokens):
    """Planned shapes of common layers: pairs of components, and components alone."""
    m = Mixture(plan_shapes(N, K, r), tokens, torch.bfloat16, torch.bfloat16, make=shifted)
    m.x, m.dy, m.A, m.B = m.x / 64, m.dy / 64, m.A / 16, m.B / 16
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = m.grad()
    if torch.cuda.get_device_capability()[0] == 9:
        assert torch.cuda.max_memory_allocated() - before < 4 * N * K, "dY^T X was formed"
    for got, want, plain in zip(grads, m.reference_grad(), m.reference_grad(m.dtype), strict=True):
        assert_close_by_rule(got, want, plain, m.dtype, roundings=2, reduces_tokens=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, m.grad(), strict=True))


@by_dtype
@by_case
def test_merged_weight(name, dtype):
    layer = make_layer(name, dtype)
    base = layer.weight.dequantize(torch.float32)
    eager = (base + reference.kron_dense(*layer.mixture[:3], layer.shapes)).to(dtype)
    merged = ops.nf4_dequantize(*layer.weight.op_args(), dtype, *layer.mixture)
    assert_close_by_rule(merged, layer.dense(), eager, dtype)
    base = base.to(dtype)
    want = base.double() + layer.dense() - layer.dense(mixture=False)
    assert_close_by_rule(ops.kron_add(base, *layer.mixture), want, eager, dtype)


@by_dtype
@by_case
def test_dense_base(name, dtype):
    """A mixture whose dense form is quickly made joins the weight; another is a product of its own."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func)
            return func(*args, **(kwargs or {}))

    layer = make_layer(name, dtype)
    base = layer.weight.dequantize(dtype)
    want = base.double() + layer.dense() - layer.dense(mixture=False)
    A, B, alpha, _ = layer.mixture
    strided = base.t().contiguous().t()  # of which a copy would be needed first
    for tokens, weight in ((1, base), (40, base), (40, strided)):
        called, x, bias = set(), layer.x(tokens).requires_grad_(), torch.randn(layer.N).to(dtype)
        with Recorder():
            y = moka_linear(x, weight, bias, A, B, alpha, layer.shapes)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
        apart = name in ("low_rank", "even", "odd") or weight is strided
        assert {ops.kron_add.default, ops.kron_mix.default} & called == {
            ops.kron_mix.default if apart else ops.kron_add.default
        }
        with torch.no_grad():
            eager = x @ want.to(dtype).T + bias, dy @ want.to(dtype)
            expected = x.double() @ want.T + bias.double(), dy.double() @ want
        for actual, exact, plain in zip((y, dx), expected, eager, strict=True):
            assert_close_by_rule(actual, exact, plain, dtype, roundings(x, "auto"))


@by_dtype
@by_case
def test_linear(name, dtype):
    """Both directions, with and without bias and mixture, on every path and on both sides of every choice."""
    layer = make_layer(name, dtype)
    for tokens in TOKENS:
        for transpose, mixture in ((False, True), (False, False), (True, True)):
            x = layer.x(tokens, transpose=transpose)
            bias = None if transpose else torch.randn(layer.N).to(dtype)
            want = layer.product(x, bias, transpose, mixture)
            for path in ("auto", "merged", "factored") if mixture else ("auto",):
                y = layer.linear(x, bias, transpose, path, mixture)
                eager = plain(layer, x, bias, transpose, mixture, path)
                assert_close_by_rule(y, want, eager, dtype, roundings(x, path))


def plain(layer, x, bias, transpose, mixture, path):
    """`path` in plain PyTorch, in x's dtype."""
    weights = [layer.dense(mixture and path != "factored")]
    if path == "factored":
        weights.append(layer.dense() - weights[0])
    terms = [x @ (w if transpose else w.T).to(x.dtype) for w in weights]
    return sum(terms) if bias is None else sum(terms) + bias


def test_double_quantization_is_bitsandbytes():
    """But for values in the middle of two codes: its approximate reciprocal may send them to the other."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(4096, 4096)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(w, double_quant=True)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax2, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    steps = (ours.absmax.int() - state.absmax.int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-4


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_of_some_hundred_tokens(dtype, double_quant):
    """Every tile of the tensor-core product, full, just begun and in part."""
    layer = make_layer("square", dtype, double_quant)
    bias = torch.randn(layer.N).to(dtype)
    for tokens in (17, 32, 33, 64, 65, 100, 128, 200, 256, 300, 512):
        x = layer.x(tokens)
        eager = plain(layer, x, bias, False, False, "auto")
        y = layer.linear(x, bias, mixture=False)
        assert_close_by_rule(y, layer.product(x, bias, mixture=False), eager, dtype, roundings(x, "auto"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N, K", [(8512, 2304), (8464, 1280), (2128, 4352), (4256, 256)])
def test_linear_of_few_tokens(N, K, dtype, double_quant):
    """More row tiles than thread blocks, in pairs and single; unequal shares of K; every group of tokens."""
    shapes = [(N // 16, K // 32, 16, 32), (16, 16, N // 16, K // 16)]
    layer = Layer(N, K, 64, shapes, dtype, double_quant, shifted)
    bias = torch.randn(layer.N).to(dtype)
    for tokens, mixture in itertools.product((1, 4, 5, 8, 9, 16, 17, 32), (False, True)):
        x = layer.x(tokens, make=shifted)
        eager = plain(layer, x, bias, False, mixture, "auto")
        y = layer.linear(x, bias, mixture=mixture)
        assert_close_by_rule(y, layer.product(x, bias, mixture=mixture), eager, dtype, roundings(x, "auto"))


#: factors in whole vectors and not, components in pairs and alone, rests of 16 rows, slices and terms
SEVERAL = {
    **{name: PERIODIC[name] for name in ("square", "square_three")},
    "3584 x 3584": plan_shapes(3584, 3584, 7),
    "1024 x 4096": plan_shapes(1024, 4096, 10),
    "4096 x 14336": plan_shapes(4096, 14336, 10),
    "rests": [
        (20, 14, 28, 128),
        *[(28, 7, 20, 256)] * 2,
        (140, 224, 4, 8),
        (7, 56, 80, 32),
        (7, 224, 80, 8),
        (14, 28, 40, 64),
    ],
}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "moved"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEVERAL)
def test_mixture_of_several_tokens(name, factors, aligned):
    """The kernel that takes tokens and components together, before both products with the weight."""
    layer = layer_of(SEVERAL[name])
    layer.A, layer.B = layer.A.to(factors), layer.B.to(factors)
    if not aligned:
        layer.A, layer.B = moved(layer.A), moved(layer.B)
    for tokens in (5, 8, 19, 33, 63, 128):
        x = layer.x(tokens)
        eager = plain(layer, x, None, False, True, "auto")
        assert_close_by_rule(layer.linear(x), layer.product(x), eager, torch.bfloat16, roundings(x, "auto"))


def test_linear_exact():
    """Codes -1, 0 and 1, scales that are powers of two: bits must agree at every token count."""
    layer = make_layer("square", double_quant=False, make=integers)
    w = layer.weight
    codes = torch.tensor([0x00, 0x07, 0x0F, 0x70, 0x77, 0x7F, 0xF0, 0xF7, 0xFF], dtype=torch.uint8)
    w.packed.copy_(codes[torch.randint(0, 9, w.packed.shape)])
    w.absmax.fill_(0.5)
    for tokens in TOKENS:
        x = torch.zeros(tokens, layer.K, dtype=torch.bfloat16)
        x[:, torch.randperm(layer.K)[:8]] = 1
        want = (x.double() @ layer.dense(mixture=False).T).to(torch.bfloat16)
        assert torch.equal(layer.linear(x, mixture=False), want)


@pytest.mark.parametrize("tokens", [1, 8, 16, 40, 100])
def test_one_wrong_block_is_caught(tokens):
    """In fp16, and the norm of one row: a block that is 5 % off drowns in the norm of the whole result."""
    layer = make_layer("square", torch.float16)
    x = layer.x(tokens)
    want, eager = layer.product(x, mixture=False), plain(layer, x, None, False, False, "auto")

    def check(row):
        y = layer.linear(x, mixture=False)[:, row]
        assert_close_by_rule(y, want[:, row], eager[:, row], torch.float16, roundings=2)

    check(3)
    layer.weight.packed[3 * layer.K // 2 + 70] ^= 0x88  # two codes of row 3
    check(4)
    with pytest.raises(AssertionError):
        check(3)


@pytest.mark.parametrize("tokens", [6, 40, 100])
def test_one_bad_token_stays_alone(tokens):
    layer = make_layer("square")
    x = layer.x(tokens)
    clean = layer.linear(x)
    x[2, 7] = float("nan")
    y = layer.linear(x)
    assert y[2].isnan().all()
    others = torch.arange(tokens) != 2
    assert torch.equal(y[others], clean[others])


def moved(t):
    """The same values one element off any alignment."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


@by_dtype
def test_strides_and_alignment(dtype):
    m = Mixture(PERIODIC["square"], 96, dtype)
    layer = make_layer("square", dtype)
    args = layer.weight.op_args()
    for view in (moved, lambda t: t.T.contiguous().T, lambda t: torch.stack((t, t), -1)[..., 0]):
        assert all(map(torch.equal, m.grad(view(m.x), view(m.dy)), m.grad()))
        for tokens in (1, 96):
            for x, transpose in ((m.x[:tokens], False), (m.dy[:tokens], True)):
                assert torch.equal(
                    layer.linear(view(x), transpose=transpose), layer.linear(x, transpose=transpose)
                )
    y = layer.linear(m.x[:3])
    layer.weight.packed.set_(moved(layer.weight.packed))  # another kernel, another order of summation
    want = layer.product(m.x[:3])
    assert_close_by_rule(layer.linear(m.x[:3]), want, y, dtype, roundings(m.x, "auto"))
    layer.A, layer.B = moved(layer.A), moved(layer.B)
    assert_close_by_rule(ops.nf4_dequantize(*args, dtype, *layer.mixture), layer.dense(), None, dtype)
    m.A, m.B = moved(m.A), moved(m.B)
    limits = (
        torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    )  # of bf16 intermediates, or fp32 sums
    for got, want in zip(m.grad(), m.reference_grad(), strict=True):
        assert_close_by_rule(got.to(limits), want, None, limits, roundings=2, reduces_tokens=True)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_zero_tokens(leading):
    layer = make_layer("square")
    assert layer.linear(layer.x(*leading)).shape == (*leading, layer.N)
    x, dy = layer.x(*leading), layer.x(*leading, transpose=True)
    grads = ops.kron_mix_grad(x, dy, *layer.mixture, True, True, True)
    assert not any(g.any() for g in grads)


def test_more_blocks_than_a_grid_dimension():
    """More than 65 535 thread blocks of work in the kernels for any shape, and more than 65 535 tokens."""
    m = Mixture([(4100, 1, 1, 4100), (41, 41, 100, 100)], 1, torch.float32)
    assert_close_by_rule(m.add_to(torch.zeros(4100, 4100)), m.dense(), m.dense(torch.float32), torch.float32)
    m = Mixture([(4, 6, 5, 3)], 70_000, torch.bfloat16, make=shifted)
    m.check_mix()
    m.check_grad()


# Offsets beyond 32 bits: a tensor of more entries than an int counts, compared at both ends and around 2^31

ROWS, WIDTH = 2**31 // 4096 + 64, 4096
SAMPLED = [0, 1, 2**31 // WIDTH - 1, 2**31 // WIDTH, ROWS - 1]


@pytest.fixture
def much_memory():
    """Enough for some tensors of 2^31 entries."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 36:
        pytest.skip(f"needs 36 GiB of free device memory, there are {free:.0f}")
    yield
    torch.cuda.empty_cache()


def test_a_large_weight(much_memory):
    w = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    weight = nf4.quantize(w)
    dense = weight.dequantize(torch.bfloat16)
    for row in SAMPLED:
        assert torch.equal(dense[row : row + 1], nf4.quantize(w[row : row + 1]).dequantize(torch.bfloat16))
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    for y in (ops.nf4_linear(x, *weight.op_args(), None, None, None, None, [], False, "auto"), x @ dense.T):
        assert_close_by_rule(y[:, SAMPLED], x.double() @ dense[SAMPLED].double().T, None, torch.bfloat16, 2)


@pytest.mark.parametrize("mb", [64, 1], ids=["periodic", "any shape"])
def test_a_large_merged_weight(mb, much_memory):
    m = Mixture([(ROWS // mb, 64, mb, 64)], 1, torch.bfloat16)
    merged = m.add_to(torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16))
    A, B = m.A.double().view(-1, 64), m.B.double().view(mb, 64)
    want = m.alpha.double() * torch.stack([torch.kron(A[row // mb], B[row % mb]) for row in SAMPLED])
    assert_close_by_rule(merged[SAMPLED], want, None, torch.bfloat16)


def test_many_tokens(much_memory):
    layer = make_layer("square")
    x = torch.randn(ROWS, layer.K, dtype=torch.bfloat16)
    y = layer.linear(x)
    assert_close_by_rule(y[SAMPLED], layer.product(x[SAMPLED]), None, torch.bfloat16, 2)

    def grad(x, y):
        return ops.kron_mix_grad(x, y, *layer.mixture, True, True, True)

    parts = [grad(*pair) for pair in zip(x.chunk(4), y.chunk(4), strict=True)]
    for got, *terms in zip(grad(x, y), *parts, strict=True):
        want = sum(t.double() for t in terms)
        assert_close_by_rule(got.bfloat16(), want, None, torch.bfloat16, roundings=2)

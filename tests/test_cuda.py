"""The CUDA kernels: the CPU tests' cases and comparison rules on a GPU, and what only a GPU has."""

import pytest
import torch
from test_kron import CASES, DTYPES, Mixture, shifted

from helpers import assert_close_by_rule, integers
from moka import functional, nf4, reference
from moka.shapes import KronShape, flatten_shapes

pytestmark = pytest.mark.cuda
ops = torch.ops.moka

SQUARE = [(16, 256, 256, 16), (32, 128, 128, 32), (64, 64, 64, 64), (128, 32, 32, 128), (256, 16, 16, 256)]
#: shapes of the fast kernels: periodic ones, one or two copies, identities, a row phase of eight
PERIODIC = {
    "square": SQUARE * 2,
    "square_once": SQUARE,
    "square_three": SQUARE[1:4] * 2 + SQUARE[:3],
    "wide": [(8, 256, 128, 16), (16, 128, 64, 32), (64, 32, 16, 128), (128, 16, 8, 256)] * 2,
    "factor_seven": [(28, 32, 16, 16), (14, 16, 32, 32), (7, 32, 64, 16)],
    "identities": [(16, 16, 16, 32, 1), (16, 32, 16, 16, 2), (8, 16, 32, 32)],
}
TOKENS = (1, 5, 8, 9, 16, 17, 40, 64, 65, 200)


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Tensors are made on the GPU, unless a test says otherwise."""
    with torch.device("cuda"):
        yield


class Layer:
    """A random quantized weight with a mixture, and the operators on them."""

    def __init__(self, shapes, dtype=torch.bfloat16, double_quant=True, make=torch.randn, blocksize=64):
        self.shapes, self.dtype = [KronShape(*s) for s in shapes], dtype
        first = self.shapes[0]
        self.N, self.K = first.ma * first.mb, first.na * first.nb
        with torch.device("cpu"):
            weight = nf4.quantize(torch.randn(self.N, self.K), blocksize, double_quant)
        self.weight = weight.to("cuda")
        param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.A = make(sum(s.a_numel for s in self.shapes)).to(param_dtype) / 4
        self.B = make(sum(s.b_numel for s in self.shapes)).to(param_dtype) / 4
        self.alpha = 2.0 ** torch.randint(-3, 0, (len(shapes),)).to(param_dtype)
        self.bias = torch.randn(self.N).to(dtype)

    @property
    def mixture(self):
        return self.A, self.B, self.alpha, flatten_shapes(self.shapes)

    def linear(self, x, path="auto", transpose=False, mixture=True, bias=None):
        mix = self.mixture if mixture else (None, None, None, [])
        return ops.nf4_linear(x, *self.weight.op_args(), bias, *mix, transpose, path)

    def merged(self, dtype):
        return ops.nf4_dequantize(*self.weight.op_args(), dtype, *self.mixture)

    def dense(self, mixture=True):
        w = self.weight.dequantize(torch.float32).double()
        factors = (self.A.double(), self.B.double(), self.alpha.double())
        return w + reference.kron_dense(*factors, self.shapes) if mixture else w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_small_mixtures(name, dtype):
    for tokens in (1, 7, 50):
        m = Mixture(CASES[name], tokens, dtype, make=shifted)
        for v, W, transpose in ((m.x, m.dense().T, False), (m.dy, m.dense(), True)):
            plain = v @ W.to(dtype)  # both round the mixture's matrix, then the product
            assert_close_by_rule(m.mix(v, transpose), v.double() @ W, plain, dtype, roundings=2)
        m.check_grad()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exact(name, dtype):
    m = Mixture(CASES[name], 30, dtype, make=integers)
    W = m.dense()
    assert torch.equal(m.mix(m.x), (m.x.double() @ W.T).to(dtype))
    for actual, expected, param in zip(m.grad(), m.reference_grad(), m.params, strict=True):
        assert torch.equal(actual, expected.to(param.dtype))
    weight = integers(m.N, m.K).to(dtype)
    assert torch.equal(m.add_to(weight), (weight.double() + W).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PERIODIC)
def test_periodic_gradients(name, dtype):
    for tokens in (33, 131):
        m = Mixture(PERIODIC[name], tokens, dtype, dtype, make=shifted)
        m.x, m.dy, m.A, m.B = m.x / 64, m.dy / 64, m.A / 16, m.B / 16  # sums over tokens stay inside fp16
        for got, want, plain in zip(m.grad(), m.reference_grad(), m.reference_grad(dtype), strict=True):
            assert_close_by_rule(got, want, plain, dtype, roundings=2, reduces_tokens=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_is_the_specification(dtype, double_quant):
    for N, K, blocksize in (
        (4, 64, 64),
        (33, 33, 64),
        (17, 31, 32),
        (256, 512, 64),
        (64, 4096, 128),
        (3, 4096, 4096),
    ):
        w = nf4.quantize(torch.randn(N, K), blocksize, double_quant)
        if double_quant:
            scale = reference.dequantize_absmax(w.absmax, w.absmax2, w.code2, w.offset, w.blocksize2)
        else:
            scale = w.absmax
        expected = reference.nf4_dequantize(w.packed, scale, blocksize, (N, K), dtype)
        assert torch.equal(w.dequantize(dtype), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantize_is_bitsandbytes(dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(512, 4096) / 50).to(dtype)
    w[0, :64] = 0
    for blocksize in (64, 128, 4096):
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        ours, absmax = ops.nf4_quantize(w, blocksize)
        assert torch.equal(ours, packed.view(-1)) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PERIODIC)
def test_merged_weight(name, dtype):
    layer = Layer(PERIODIC[name], dtype)
    eager = (
        layer.weight.dequantize(torch.float32) + reference.kron_dense(*layer.mixture[:3], layer.shapes)
    ).to(dtype)
    assert_close_by_rule(layer.merged(dtype), layer.dense(), eager, dtype)
    added = ops.kron_add(layer.weight.dequantize(dtype), *layer.mixture)
    want = layer.weight.dequantize(dtype).double() + layer.dense() - layer.dense(mixture=False)
    assert_close_by_rule(added, want, eager, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PERIODIC)
def test_linear(name, dtype):
    layer = Layer(PERIODIC[name], dtype)
    for tokens in TOKENS:
        for transpose, mixture in ((False, True), (False, False), (True, True)):
            x = torch.randn(tokens, layer.N if transpose else layer.K).to(dtype)
            bias = None if transpose else layer.bias
            W = layer.dense(mixture) if transpose else layer.dense(mixture).T
            want = x.double() @ W + (0 if bias is None else bias.double())
            plain = x @ W.to(dtype) if transpose else torch.nn.functional.linear(x, W.T.to(dtype), bias)
            for path in ("auto", "merged") if mixture else ("auto",):
                got = layer.linear(x, path, transpose, mixture, bias)
                assert_close_by_rule(got, want, plain, dtype, roundings=2)
            if mixture:
                base = layer.dense(mixture=False)
                base, update = (base, W - base) if transpose else (base.T, W - base.T)
                plain = x @ base.to(dtype) + x @ update.to(dtype) + (0 if bias is None else bias)
                got = layer.linear(x, "factored", transpose, mixture, bias)
                assert_close_by_rule(got, want, plain, dtype, roundings=3)


def test_linear_exact():
    """Codes -1, 0 and 1, scales and gates that are powers of two: bits must agree at every token count."""
    layer = Layer(PERIODIC["square"], make=integers, double_quant=False)
    w = layer.weight
    w.packed.copy_(torch.tensor([0x00, 0x07, 0x0F, 0x70, 0x77, 0x7F, 0xF0, 0xF7, 0xFF]).to(torch.uint8)[
        torch.randint(0, 9, (w.packed.numel(),))].view_as(w.packed))  # fmt: skip
    w.absmax.fill_(0.5)
    for tokens in TOKENS:
        x = torch.zeros(tokens, layer.K, dtype=torch.bfloat16)
        x[:, torch.randperm(layer.K)[:8]] = 1
        want = (x.double() @ layer.dense(mixture=False).T).to(torch.bfloat16)
        assert torch.equal(layer.linear(x, mixture=False), want)


def test_one_bad_token_stays_alone():
    layer = Layer(PERIODIC["square"])
    x = torch.randn(6, layer.K).bfloat16()
    clean = layer.linear(x)
    x[2, 7] = float("nan")
    y = layer.linear(x)
    assert y[2].isnan().all()
    keep = torch.arange(6) != 2
    assert torch.equal(y[keep], clean[keep])


def test_zero_tokens_strides_and_alignment():
    layer = Layer(PERIODIC["square"])
    assert layer.linear(torch.empty(2, 0, layer.K, dtype=torch.bfloat16)).shape == (2, 0, layer.N)
    x, dy = torch.randn(96, layer.K).bfloat16(), torch.randn(96, layer.N).bfloat16()
    grads = ops.kron_mix_grad(x[:0], dy[:0], *layer.mixture, True, True, True)
    assert not any(g.any() for g in grads)

    def moved(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    want = ops.kron_mix_grad(x, dy, *layer.mixture, True, True, True)
    got = ops.kron_mix_grad(x.T.contiguous().T, dy.T.contiguous().T, *layer.mixture, True, True, True)
    assert all(map(torch.equal, got, want))
    got = ops.kron_mix_grad(moved(x), moved(dy), *layer.mixture, True, True, True)
    assert all(map(torch.equal, got, want))
    for tokens in (1, 96):
        assert torch.equal(layer.linear(moved(x[:tokens])), layer.linear(x[:tokens]))
        assert torch.equal(layer.linear(x.T.contiguous().T[:tokens]), layer.linear(x[:tokens]))


def test_repeats_are_equal():
    for name in ("square", "wide"):
        layer = Layer(PERIODIC[name])
        x, dy = torch.randn(300, layer.K).bfloat16(), torch.randn(300, layer.N).bfloat16()

        def step(layer=layer, x=x, dy=dy):
            grads = ops.kron_mix_grad(x, dy, *layer.mixture, True, True, True)
            return (*grads, layer.linear(x), layer.linear(x[:3]), layer.linear(dy, transpose=True))

        first = step()
        for _ in range(20):
            assert all(map(torch.equal, step(), first))


def train_step(layer, x, dy):
    """Forward and backward through the public function."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B, layer.alpha)]
    y = functional.moka_linear(leaves[0], layer.weight, None, *leaves[1:], layer.shapes)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def test_side_stream():
    layer = Layer(PERIODIC["square"])
    for tokens in (2, 128):
        x, dy = torch.randn(tokens, layer.K).bfloat16(), torch.randn(tokens, layer.N).bfloat16()
        want = train_step(layer, x, dy)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            got = train_step(layer, late, dy)
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_graph():
    layer = Layer(PERIODIC["square"])
    for tokens in (1, 8, 64, 128):
        x, dy = torch.randn(tokens, layer.K).bfloat16(), torch.randn(tokens, layer.N).bfloat16()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train_step(layer, x, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                got = train_step(layer, x, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        x.normal_()
        dy.normal_()
        graph.replay()
        assert all(map(torch.equal, got, train_step(layer, x, dy)))


def test_mixed_devices():
    layer = Layer(PERIODIC["identities"])
    x = torch.randn(2, layer.K).bfloat16()
    with pytest.raises(RuntimeError, match="packed is on cpu"):
        ops.nf4_linear(x, *layer.weight.to("cpu").op_args(), None, None, None, None, [], False, "auto")
    with pytest.raises(RuntimeError, match="grad_y is on cpu"):
        dy = torch.randn(2, layer.N, device="cpu").bfloat16()
        ops.kron_mix_grad(x, dy, *layer.mixture, True, True, True)


def test_gradcheck():
    layer = Layer([(2, 4, 3, 2), (3, 2, 2, 4)], torch.float64, double_quant=False)
    leaves = [t.requires_grad_() for t in (torch.randn(3, 8).double(), layer.A, layer.B, layer.alpha)]
    for path in functional.PATHS:
        assert torch.autograd.gradcheck(
            lambda x, *f, path=path: functional.moka_linear(x, layer.weight, None, *f, layer.shapes, path),
            leaves,
        )


def test_opcheck():
    layer = Layer(PERIODIC["identities"])
    x, dy = torch.randn(3, layer.K).bfloat16(), torch.randn(3, layer.N).bfloat16()
    args = layer.weight.op_args()
    torch.library.opcheck(ops.nf4_quantize.default, (torch.randn(4, 64), 64))
    torch.library.opcheck(ops.nf4_dequantize.default, (*args, torch.bfloat16, *layer.mixture))
    torch.library.opcheck(ops.nf4_linear.default, (x, *args, layer.bias, *layer.mixture, False, "auto"))
    torch.library.opcheck(ops.kron_mix.default, (x, *layer.mixture, False, None))
    torch.library.opcheck(ops.kron_mix_grad.default, (x, dy, *layer.mixture, True, True, True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    layer = Layer(PERIODIC["square"])
    x, dy = torch.randn(128, layer.K).bfloat16(), torch.randn(128, layer.N).bfloat16()

    @torch.compile(fullgraph=True)
    def f(x, A, B, alpha):
        return functional.moka_linear(x, layer.weight, None, A, B, alpha, layer.shapes)

    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B, layer.alpha)]
    y = f(*leaves)
    got = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    assert all(map(torch.equal, got, train_step(layer, x, dy)))


def test_offsets_beyond_32_bits():
    """More entries than an int holds: sampled rows, at both ends and around 2^31."""
    N, K = 2**31 // 4096 + 64, 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8)
    absmax = torch.rand(N * K // 64)
    w = nf4.NF4Weight(packed, absmax, (N, K))
    got = w.dequantize(torch.bfloat16)
    for row in (0, 2**31 // K - 1, 2**31 // K, N - 1):
        part = packed[row * K // 2 : (row + 1) * K // 2], absmax[row * K // 64 : (row + 1) * K // 64]
        assert torch.equal(got[row], reference.nf4_dequantize(*part, 64, (K,), torch.bfloat16))


@pytest.mark.parametrize("r", [1, 10, 64])
def test_gate(r):
    logits, grad = torch.randn(r), torch.randn(r)
    alpha = functional.softmax_gate(logits.requires_grad_(), 10.0)
    torch.testing.assert_close(alpha, 10 * logits.softmax(0))
    (got,) = torch.autograd.grad(alpha, logits, grad)
    (want,) = torch.autograd.grad(10 * logits.softmax(0), logits, grad)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        assert functional.softmax_gate(logits.to(dtype), 2.0).dtype == torch.promote_types(
            dtype, torch.float32
        )

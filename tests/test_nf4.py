"""NF4 on every instruction set and on the GPU: quantization bit for bit, products by the comparison rules."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import assert_close_by_rule, integers, roundings, shifted
from moka import _C, nf4, reference
from moka.shapes import KronShape, flatten_shapes

bnb = pytest.importorskip("bitsandbytes.functional")
ops = torch.ops.moka

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = DTYPES[:3]  # what a weight is quantized from
#: name -> (N, K, blocksize, components); a mixture of every kind of shape that the sizes allow
CASES = {
    "single": (1, 1, 64, [(1, 1, 1, 1)]),
    "tiny": (3, 17, 32, [(3, 1, 1, 17), (1, 17, 3, 1)]),
    "row_starts_inside_a_byte": (17, 31, 64, [(17, 31, 1, 1), (1, 1, 17, 31)]),
    "blocks_cross_rows": (33, 33, 64, [(3, 11, 11, 3), (11, 3, 3, 11), (3, 11, 11, 3)]),
    "odd": (65, 127, 32, [(5, 127, 13, 1), (13, 1, 5, 127)]),
    "one_long_row": (1, 257, 64, [(1, 257, 1, 1)]),
    "one_column": (257, 1, 4096, [(257, 1, 1, 1)]),
    "whole_blocks": (24, 128, 64, [(4, 8, 6, 16), (6, 16, 4, 8), (4, 8, 6, 16), (2, 4, 12, 32)]),
    "identities": (48, 96, 32, [(4, 4, 12, 24, 1), (6, 12, 8, 8, 2), (4, 16, 12, 6), (16, 16, 3, 6, 1)]),
    "several_tiles": (19, 1090, 64, [(19, 10, 1, 109), (1, 5, 19, 218)]),
}
by_case = pytest.mark.parametrize("name", CASES)


class Layer:
    """A random quantized weight with a mixture, and the operators on them."""

    def __init__(self, N, K, blocksize, shapes, dtype=torch.float32, double_quant=False, make=torch.randn):
        self.N, self.K, self.dtype = N, K, dtype
        self.weight = nf4.quantize(make(N, K), blocksize, double_quant)
        self.shapes = [KronShape(*s) for s in shapes]
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.A = make(sum(s.a_numel for s in self.shapes)).to(parameter_dtype)
        self.B = make(sum(s.b_numel for s in self.shapes)).to(parameter_dtype)
        self.alpha = 2.0 ** torch.randint(-3, 0, (len(shapes),)).to(parameter_dtype)

    @property
    def mixture(self):
        return self.A, self.B, self.alpha, flatten_shapes(self.shapes)

    def linear(self, x, bias=None, transpose=False, path="auto", mixture=True):
        """The operator."""
        mix = self.mixture if mixture else (None, None, None, [])
        return ops.nf4_linear(x, *self.weight.op_args(), bias, *mix, transpose, path)

    def dense(self, mixture=True):
        """W' in float64 from the dequantized weight."""
        w = self.weight.dequantize(torch.float32).double()
        factors = (self.A.double(), self.B.double(), self.alpha.double())
        return w + reference.kron_dense(*factors, self.shapes) if mixture else w

    def product(self, x, bias=None, transpose=False, mixture=True, dtype=torch.float64):
        """The same in plain PyTorch, all of it in one dtype."""
        w = self.dense(mixture).to(dtype)
        y = x.to(dtype) @ (w if transpose else w.T)
        return y if bias is None else y + bias.to(dtype)

    def x(self, *leading, transpose=False, make=torch.randn):
        return make(*leading, self.N if transpose else self.K).to(self.dtype)


def weights(N, K, dtype, scale=1.0):
    """Random, with a block of zeros in front."""
    w = scale * torch.randn(N, K)
    w.view(-1)[: min(70, w.numel() // 2)] = 0
    return w.to(dtype)


def thresholds():
    """Every value halfway between two codes and the next one above it, in a block with absmax 1; `[32]`."""
    code = torch.tensor(reference.NF4_CODE)
    bounds = (code[:-1] + code[1:]) / 2
    pairs = torch.stack((bounds, torch.nextafter(bounds, torch.ones(15)))).T
    return torch.cat((pairs.flatten(), torch.tensor([1.0, 0.0])))


def misaligned(t):
    """The same values one element off any alignment."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return moved.copy_(t)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_quantize_is_bitsandbytes(blocksize, dtype, backend):
    sizes = [(1, 1), (3, 17), (33, 31), (64, 64), (5, 577), (2, 4096), (3, 4099)]
    cases = [weights(*size, dtype, scale) for size in sizes for scale in (1.0, 1e-37, 1e-39, 1e-44)]
    for w in (*cases, thresholds().to(dtype)):
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        ours, absmax = ops.nf4_quantize(w, blocksize)
        assert torch.equal(ours, packed.view(-1)), (w.shape, w.abs().max())
        assert torch.equal(absmax, state.absmax), (w.shape, w.abs().max())


def test_quantize_not_a_number(backend):
    w = torch.randn(8, 64)
    w[1, 3], w[4, 5] = float("nan"), float("inf")
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours, absmax = ops.nf4_quantize(w, 64)
    assert torch.equal(ours, packed.view(-1))
    assert torch.equal(absmax.isnan(), state.absmax.isnan()) and absmax[4].isinf()
    assert absmax[1].isnan() or backend == "cuda"  # where bitsandbytes passes over it


def test_thresholds_belong_to_the_lower_code(isa):
    """On the CPU; for a GPU bitsandbytes has some of them one unit in the last place lower."""
    packed, _ = ops.nf4_quantize(thresholds(), 32)
    expected = torch.stack((torch.arange(15), torch.arange(1, 16)), 1).flatten()
    assert torch.equal(torch.stack((packed >> 4, packed & 15), 1).flatten()[:30].long(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_dequantize_is_bitsandbytes(blocksize, dtype, backend):
    """Rows of whole blocks: for others bitsandbytes 0.50.2 scales by the wrong block (its issue 1884)."""
    for w in (weights(3, blocksize, dtype), weights(2, 4096, dtype), weights(64, 2 * blocksize, dtype)):
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        ours = nf4.NF4Weight(packed, state.absmax, tuple(w.shape), blocksize, dtype=dtype)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dequantize_double_quantized_is_bitsandbytes(dtype, backend):
    w = weights(300, 256, dtype)  # 1200 blocks: five second-level blocks, the last one partial
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    second = (state.state2.absmax, state.state2.code, state.offset)
    ours = nf4.NF4Weight(packed, state.absmax, (300, 256), 64, *second, dtype=dtype)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@by_case
def test_dequantize_is_the_specification(name, backend):
    N, K, blocksize, _ = CASES[name]
    for dtype, scale in itertools.product(HALVES, (1.0, 1e-38)):
        w = nf4.quantize(weights(N, K, torch.float32, scale), blocksize)
        expected = reference.nf4_dequantize(w.packed, w.absmax, blocksize, (N, K))
        assert torch.equal(w.dequantize(dtype), expected.to(dtype))
    assert torch.equal(w.dequantize(torch.float64), expected.double())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_other_storage_of_the_bytes(storage, device):
    layer = Layer(24, 128, 64, [(4, 8, 6, 16)])
    args = list(layer.weight.op_args())
    args[0] = args[0].view(storage).view(-1, 1)
    got = ops.nf4_dequantize(*args, torch.float32, None, None, None, [])
    assert torch.equal(got, layer.weight.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_case
def test_merged_dequantize(name, dtype, backend):
    layer = Layer(*CASES[name], dtype)
    got = ops.nf4_dequantize(*layer.weight.op_args(), dtype, *layer.mixture)
    w = layer.weight.dequantize(dtype)
    eager = w + reference.kron_dense(layer.A, layer.B, layer.alpha, layer.shapes).to(dtype)
    assert_close_by_rule(got, layer.dense(), eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_case
def test_linear(name, dtype, backend):
    """Fused and in panels, both directions, with and without bias and mixture, on every path."""
    # the GPU rounds the weight: an error of the size of the terms, which cancel in results of few elements
    layer = Layer(*CASES[name], dtype, make=shifted if backend == "cuda" else torch.randn)
    for tokens, transpose in itertools.product((1, 3, 9, 40), (False, True)):
        x = layer.x(tokens, transpose=transpose, make=shifted if backend == "cuda" else torch.randn)
        bias = torch.randn(layer.K if transpose else layer.N).to(dtype)
        for path, with_bias in (("merged", True), ("factored", False), ("auto", True), (None, False)):
            mixture, b = path is not None, bias if with_bias else None
            y = layer.linear(x, b, transpose, path or "auto", mixture)
            expected = layer.product(x, b, transpose, mixture)
            eager = layer.product(x, b, transpose, mixture, dtype)
            eager = eager if y.numel() > 1000 else None
            assert_close_by_rule(y, expected, eager, dtype, roundings(x, path or "auto"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_case
def test_exact(name, dtype, backend):
    """Codes -1, 0 and 1, powers of two and small integers: no rounding happens, in any order of summation."""
    N, K, blocksize, shapes = CASES[name]
    layer = Layer(N, K, blocksize, shapes, dtype, make=lambda *size: integers(*size, low=-1, high=1))
    layer.weight.absmax.copy_(2.0 ** torch.randint(-1, 2, layer.weight.absmax.shape))
    for tokens, transpose, path in itertools.product(
        (1, 2, 5, 40), (False, True), ("merged", "factored", "auto")
    ):
        keep = 20.0 / (layer.N if transpose else layer.K)  # few terms, so that sums fit the significand
        x = layer.x(tokens, transpose=transpose, make=lambda *size: integers(*size, low=-1, high=1))
        x = x * (torch.rand(x.shape) < keep)
        expected = layer.product(x, transpose=transpose)
        representable = expected.to(dtype).double() == expected
        assert representable.float().mean() > 0.9
        y = layer.linear(x, transpose=transpose, path=path)
        assert torch.equal(y[representable].double(), expected[representable])


@pytest.mark.parametrize("tokens", [1, 40])
def test_double_quantized_linear(tokens, backend):
    layer = Layer(*CASES["identities"], double_quant=True)
    x = layer.x(tokens)
    assert_close_by_rule(layer.linear(x), layer.product(x), None, torch.float32)


@pytest.mark.parametrize("what", ["absmax", "code", "factor"])
def test_a_corrupted_block_is_caught(what, device):
    """The comparison rules see one block of 64 that is 5 % off, one wrong nibble, one wrong factor entry."""
    layer = Layer(*CASES["whole_blocks"])
    x = layer.x(9)
    expected, eager = layer.product(x), layer.product(x, dtype=torch.float32)
    assert_close_by_rule(layer.linear(x), expected, eager, torch.float32)
    if what == "absmax":
        layer.weight.absmax[7] *= 1.05
    elif what == "code":
        layer.weight.packed[100] ^= 0x10
    else:
        layer.A[5] *= 1.01
    with pytest.raises(AssertionError, match="relF"):
        assert_close_by_rule(layer.linear(x), expected, eager, torch.float32)


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "dx"])
def test_strided_and_misaligned_inputs(tokens, transpose, backend):
    layer = Layer(*CASES["blocks_cross_rows"])
    x = layer.x(tokens, transpose=transpose)
    y = layer.linear(x, transpose=transpose)
    assert torch.equal(layer.linear(misaligned(x), transpose=transpose), y)
    assert torch.equal(layer.linear(x.T.contiguous().T, transpose=transpose), y)
    assert torch.equal(layer.linear(torch.cat((x, x), 1)[:, : x.shape[1]], transpose=transpose), y)
    assert torch.equal(layer.linear(x.view(2, tokens // 2, -1), transpose=transpose).view(y.shape), y)
    assert torch.equal(layer.linear(x[:1].expand(tokens, -1), transpose=transpose)[0], y[0])
    layer.A, layer.B = misaligned(layer.A), torch.stack((layer.B, layer.B), 1)[:, 0]
    layer.weight.packed.set_(misaligned(layer.weight.packed))
    assert torch.equal(layer.linear(x, transpose=transpose), y)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_zero_tokens(leading, device):
    layer = Layer(*CASES["identities"])
    for path in ("auto", "merged", "factored"):
        assert layer.linear(layer.x(*leading), torch.randn(48), path=path).shape == (*leading, 48)
    assert layer.linear(layer.x(*leading, transpose=True), transpose=True).shape == (*leading, 96)


def test_a_vector_is_one_token(device):
    layer = Layer(*CASES["identities"])
    x = layer.x(1)
    assert torch.equal(layer.linear(x[0]), layer.linear(x)[0])


@pytest.mark.parametrize("tokens", [3, 40])
def test_not_a_number_stays_in_its_row(tokens, backend):
    layer = Layer(*CASES["whole_blocks"])
    x = layer.x(tokens)
    x[1, 5] = float("nan")
    finite = layer.linear(x).isfinite().all(1)
    assert not finite[1] and finite.sum() == tokens - 1


def test_threads_do_not_change_bits(isa):
    layer = Layer(*CASES["several_tiles"])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, dy = torch.ones(4, layer.K), torch.ones(4, layer.N)
            results.append([layer.linear(x), layer.linear(dy, transpose=True)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_gradients_are_not_recorded(device):
    """Differentiation belongs to moka.functional; the operator itself runs on inputs that require grad."""
    layer = Layer(*CASES["whole_blocks"])
    x = layer.x(40).requires_grad_()
    assert torch.equal(layer.linear(x).detach(), layer.linear(x.detach()))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size(device, data):
    ma, na, mb, nb = (data.draw(st.integers(1, 24), label) for label in ("ma", "na", "mb", "nb"))
    blocksize = data.draw(st.sampled_from(nf4.BLOCKSIZES), "blocksize")
    tokens, transpose = data.draw(st.integers(1, 40), "tokens"), data.draw(st.booleans(), "transpose")
    path = data.draw(st.sampled_from(["auto", "merged", "factored"]), "path")
    layer = Layer(ma * mb, na * nb, blocksize, [(ma, na, mb, nb)] * data.draw(st.integers(1, 3), "count"))
    x = layer.x(tokens, transpose=transpose)
    y = layer.linear(x, transpose=transpose, path=path)
    assert_close_by_rule(y, layer.product(x, transpose=transpose), None, torch.float32)


def linear_with(device, **changes):
    """Calls the operator on a 48 x 96 layer with some arguments replaced."""
    layer = Layer(*CASES["identities"])
    w, (A, B, alpha, shapes) = layer.weight, layer.mixture
    args = {
        "x": layer.x(2), "packed": w.packed, "absmax": w.absmax, "absmax2": None, "code2": None,
        "offset": None, "blocksize": 32, "blocksize2": 256, "N": 48, "K": 96, "bias": None,
        "A": A, "B": B, "alpha": alpha, "shapes": shapes, "transpose": False, "path": "auto",
    }  # fmt: skip
    return ops.nf4_linear(*(t.to(device) if torch.is_tensor(t) else t for t in (args | changes).values()))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": torch.ones(2, 95)}, ValueError, r"x: expected shape \[\.\.\., 96\], got \[2, 95\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape"),
        ({"x": torch.ones(2, 96).int()}, TypeError, "x: expected dtype Float.*got Int"),
        ({"packed": torch.zeros(2303).byte()}, ValueError, "packed: expected at least 2304 bytes.*2303"),
        ({"absmax": torch.ones(143)}, ValueError, "absmax: expected 144 values.*got 143"),
        ({"absmax": torch.ones(144).half()}, TypeError, "absmax: expected dtype Float, got Half"),
        ({"absmax2": torch.ones(1)}, ValueError, "absmax2 is given, so code2 and offset are needed"),
        ({"blocksize": 33}, ValueError, "blocksize: expected a positive even number, got 33"),
        ({"bias": torch.ones(47)}, ValueError, r"bias: expected shape \[48\], got \[47\]"),
        ({"bias": torch.ones(48).half()}, TypeError, "bias: expected dtype Float.*got Half"),
        ({"A": torch.ones(3)}, ValueError, "A: expected 136 elements, got 3"),
        ({"B": torch.ones(378).double()}, TypeError, "B: expected dtype Float like A, got Double"),
        ({"B": None}, ValueError, "A is given, so B and alpha are needed too"),
        ({"shapes": [48, 95, 1, 1, 0]}, ValueError, "elements, got|expected products"),
        ({"path": "fast"}, ValueError, "path: expected 'auto', 'merged' or 'factored', got 'fast'"),
    ],
)
def test_wrong_arguments(changes, error, message, device):
    with pytest.raises(error, match=message):
        linear_with(device, **changes)


def test_mixture_of_another_size(device):
    with pytest.raises(ValueError, match="shapes: expected products of the weight's 48 x 96, got 4 x 96"):
        linear_with(device, A=torch.ones(4), B=torch.ones(96), alpha=torch.ones(1), shapes=[4, 1, 1, 96, 0])


def test_wrong_dtypes_of_other_operators(device):
    with pytest.raises(TypeError, match=r"w: expected dtype Float.*got Double"):
        ops.nf4_quantize(torch.ones(64).double(), 64)
    with pytest.raises(ValueError, match="blocksize: expected a positive even number, got 0"):
        ops.nf4_quantize(torch.ones(64), 0)
    with pytest.raises(TypeError, match=r"dtype: expected dtype Float.*got Int"):
        ops.nf4_dequantize(*Layer(*CASES["tiny"]).weight.op_args(), torch.int32, None, None, None, [])


def test_choice_of_kernel_and_path():
    shapes = flatten_shapes([KronShape(64, 64, 64, 64)] * 10)
    choose = _C.nf4_linear_choice
    assert choose(1, 4096, 4096, [], False, "auto") == "fused"
    assert choose(1, 4096, 4096, shapes, False, "auto") == "fused, mixture factored"
    assert choose(2048, 4096, 4096, shapes, True, "auto") == "panels of 512, mixture merged"
    assert choose(2048, 4096, 4096, shapes, True, "factored") == "panels of 512, mixture factored"
    assert choose(64, 576, 576, [], False, "auto") == "panels of 288"  # never all of W at once


def test_unknown_instruction_set():
    assert not _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() in ("scalar", "avx2", "avx512")

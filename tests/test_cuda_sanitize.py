"""Every CUDA kernel on shapes small enough for compute-sanitizer: `make sanitize` runs this file."""

from itertools import product

import pytest
import torch
from test_kron import Mixture

from helpers import assert_close_by_rule, shifted
from moka import nf4
from moka.rules import plan_shapes

pytestmark = pytest.mark.cuda
ops = torch.ops.moka

#: two steps of every loop: periodic, more components than the smallest kernel takes, an identity, any shapes
MIXTURES = {
    "periodic": [(4, 16, 32, 32), (8, 32, 16, 16)],
    "periodic, six": [(4, 16, 32, 32), (8, 32, 16, 16)] * 3,
    "identity": [(4, 16, 32, 32), (16, 16, 8, 32, 1)],
    "any shape": [(2, 256, 64, 2), (128, 2, 1, 256)],
    "any shape, by four columns": [(16, 128, 8, 4), (4, 16, 32, 32)],
    "low rank": [(128, 1, 1, 512)] * 3,
}
RESTS = [*[(20, 14, 28, 128), (7, 224, 80, 8)] * 2, (28, 7, 20, 256)]
#: layers whose planned shapes the Hopper gradient kernels know: a case of each family
WIDE = ((4096, 4096), (14336, 4096), (1024, 4096), (3840, 3840), (11008, 4096))
BF16 = torch.bfloat16


def on_gpu(args):
    """Tensors made on the CPU, where the references are computed, as arguments of a GPU operator."""
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in args]


def check(got, want, dtype=BF16, roundings=2, **rule):
    assert_close_by_rule(got.cpu(), want, None, dtype, roundings, **rule)


def quantize(dtype, blocksize):
    w = torch.randn(31, 66).to(dtype)
    packed, absmax = (t.cpu() for t in ops.nf4_quantize(w.cuda(), blocksize))
    dense = nf4.NF4Weight(packed, absmax, (31, 66), blocksize).dequantize()
    scale = absmax.repeat_interleave(blocksize)[: w.numel()].view_as(w)
    assert ((dense - w.float()).abs() <= 0.153 * scale).all()  # half the widest gap of the code book


def weight(shapes, double_quant=True):
    m = Mixture(shapes, 1, BF16)
    return nf4.quantize(torch.randn(m.N, m.K), 64, double_quant), m


def build(name, dtype):
    w, m = weight(MIXTURES[name])
    base = w.dequantize(torch.float32).double()
    mixture = (*m.params, m.flat_shapes)
    check(ops.nf4_dequantize(*on_gpu((*w.op_args(), dtype, None, None, None, []))), base, dtype)
    check(ops.nf4_dequantize(*on_gpu((*w.op_args(), dtype, *mixture))), base + m.dense(), dtype)
    base = base.to(dtype)
    check(ops.kron_add(*on_gpu((base, *mixture))), base.double() + m.dense(), dtype)


def linear(tokens, N, mixed, shapes=None):
    shapes = shapes or [(4, 16, N // 4, 32), (N // 16, 32, 16, 16)]
    w, m = weight(shapes, double_quant=mixed)
    x, bias = torch.randn(tokens, m.K).to(BF16), torch.randn(N).to(BF16)
    mixture = (*m.params, m.flat_shapes) if mixed else (None, None, None, [])
    y = ops.nf4_linear(*on_gpu((x, *w.op_args(), bias, *mixture, False, "auto")))
    dense = w.dequantize(torch.float32).double() + (m.dense() if mixed else 0)
    check(y, x.double() @ dense.T + bias.double(), roundings=3)


def rows(tokens, N):
    shapes = [(4, 16, N // 4, 32), (N // 16, 32, 16, 16)]
    w, one = weight(shapes)
    mixtures = [Mixture(shapes, 1, BF16, make=shifted) for _ in range(3)]
    A, B, alpha = (torch.stack(tensors) for tensors in zip(*(m.params for m in mixtures), strict=True))
    x, adapter = torch.randn(tokens, one.K).to(BF16), torch.arange(tokens, dtype=torch.int32) % 4 - 1
    y = ops.nf4_linear_rows(*on_gpu((x, *w.op_args(), None, A, B, alpha, adapter, one.flat_shapes)))
    want = x.double() @ w.dequantize(torch.float32).double().T
    for i, m in enumerate(mixtures):
        want += (adapter == i).double()[:, None] * (x.double() @ m.dense().T)
    check(y, want, roundings=3)


def lora(rank, adapter_dtype):
    """Enough tokens for the update to join the weight, in both directions."""
    w = nf4.quantize(torch.randn(48, 192), 64, True)
    A, B = torch.randn(rank, 192).to(adapter_dtype), torch.randn(48, rank).to(adapter_dtype)
    dense = w.dequantize(torch.float32).double() + 0.5 * B.double() @ A.double()
    for transpose, effective in ((False, dense.T), (True, dense)):
        x = torch.randn(513, len(effective)).to(BF16)
        u = torch.zeros(513, rank, dtype=adapter_dtype)  # of the update by itself, which is not formed
        y = ops.nf4_linear_lora(*on_gpu((x, *w.op_args(), None, A, B, u, 0.5, transpose, BF16)))
        check(y, x.double() @ effective)


def lora_grad(tokens, N, rank):
    sizes = (tokens, N), (rank, 8), (N, rank), (tokens, rank)
    dy, A, B, u = (shifted(*size).to(BF16) for size in sizes)
    # the gradient of A is cuBLAS' business
    grad_u, _, grad_B = ops.lora_grad(*on_gpu((dy, None, A, B, u)), 0.5, BF16, torch.float32)
    check(grad_u, dy.double() @ B.double())
    check(grad_B, 0.5 * dy.double().T @ u.double(), torch.float32, reduces_tokens=True)


def mix(dtype):
    m = Mixture(MIXTURES["periodic"], 5, dtype, make=shifted)
    y = ops.kron_mix(*on_gpu((m.x, *m.params, m.flat_shapes, False, None)))
    check(y, m.x.double() @ m.dense().T, dtype)


def gradients(shapes, dtype):
    m = Mixture(shapes, 70, dtype, make=shifted)
    got = ops.kron_mix_grad(*on_gpu((m.x, m.dy, *m.params, m.flat_shapes, True, True, True)))
    for actual, expected in zip(got, m.reference_grad(), strict=True):
        # of which the Hopper kernel rounds the intermediates to bf16
        check(actual.to(dtype), expected, dtype, roundings=3, reduces_tokens=True)


def gate(r):
    logits, grad = torch.randn(r), torch.randn(r)
    alpha = 3 * logits.double().softmax(0)
    check(ops.gate(logits.cuda(), 3.0), alpha, torch.float32)
    want = alpha * (grad.double() - (alpha / 3 * grad.double()).sum())
    check(ops.gate_grad(alpha.float().cuda(), grad.cuda(), 3.0), want, torch.float32)


CASES = {
    **{f"quantize {d}": (quantize, d, 64) for d in (torch.float32, BF16, torch.float16)},
    **{f"build {name} {d}": (build, name, d) for name in MIXTURES for d in (BF16, torch.float32)},
    **{f"linear {args}": (linear, *args) for args in product((1, 9, 33, 70), (48, 128), (False, True))},
    # tall enough for thread blocks of several tiles, single ones and pairs
    **{f"linear {args}": (linear, *args) for args in ((5, 8464, False), (13, 8512, False), (6, 8512, True))},
    # whose factors are loaded entry by entry
    **{f"linear {n}, uneven": (linear, n, 48, True, [(4, 14, 12, 128), (3, 256, 16, 7)]) for n in (1, 9)},
    # in pairs of components and alone, with rests of slices, terms and rows
    **{f"linear {n}, rests": (linear, n, 560, True, RESTS) for n in (7, 35)},
    **{f"rows {args}": (rows, *args) for args in ((5, 48), (40, 128))},
    **{f"lora {rank} {d}": (lora, rank, d) for rank in (3, 24) for d in (BF16, torch.float32)},
    **{f"lora gradients {args}": (lora_grad, *args) for args in ((513, 264, 8), (800, 16648, 16))},
    # in bf16: initcheck sees nothing of bulk tensor copies, neither those that store the dense mixture nor
    # cuBLAS' that read it; what fp32 products read it would report
    "mix": (mix, BF16),
    # in fp32: nor does it see what cuBLAS' 16-bit kernels store
    **{f"gradients {name}": (gradients, MIXTURES[name], torch.float32) for name in MIXTURES},
    **{f"gradients {N} x {K}": (gradients, plan_shapes(N, K, 5), BF16) for N, K in WIDE},
    **{f"gate {r}": (gate, r) for r in (10, 64)},
}


@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    function, *args = CASES[name]
    function(*args)


def run_all():
    """Every case once."""
    with torch.device("cpu"):
        for function, *args in CASES.values():
            function(*args)

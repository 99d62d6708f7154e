"""The operators under a fused LoRA, on the shapes at which their kernels do something else."""

import pytest
import torch

from helpers import assert_close_by_rule, shifted
from moka import functional, nf4

ops = torch.ops.moka
HALVES = (torch.bfloat16, torch.float16)
N, K = 128, 192


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("tokens", "N", "r"),
    [
        (3, 20, 3),  # the next ones in one pass: more than 512 tokens, rank 8 or 16, eights of columns
        (513, 8, 8),
        (544, 256, 16),
        (1000, 328, 16),
        (2049, 1032, 8),
        (2049, 8200, 16),  # several pieces for each thread block, more than are in shared memory
        (600, 260, 16),  # and these not
        (600, 264, 12),
        (512, 256, 16),
    ],
)
def test_products_with_the_gradient(tokens, N, r, dtype, device):
    sizes = (tokens, N), (tokens, 40), (r, 40), (N, r), (tokens, r)
    operands = [shifted(*size).div(8).to(dtype) for size in sizes]  # within the range of fp16
    dy, x, _, B, u = (t.double() for t in operands)
    wanted = dy @ B, 0.5 * (dy @ B).T @ x, 0.5 * dy.T @ u
    for given in (dtype, torch.float32):  # of the parameters
        strided = [t.T.contiguous().T for t in operands]
        results = [ops.lora_grad(*args, 0.5, given, given) for args in (operands, operands, strided)]
        assert all(map(torch.equal, *results[:2]))
        for result in results:
            for got, want, kind, count in zip(result, wanted, (dtype, given, given), (1, 2, 1), strict=True):
                assert got.dtype == kind
                assert_close_by_rule(got.to(dtype), want, None, dtype, count, reduces_tokens=True)
        if dy.is_cuda and given != dtype and tokens > 512 and r in (8, 16) and N % 8 == 0:
            grad_B = results[0][2]  # not rounded on the way
            assert_close_by_rule(grad_B, wanted[2], None, torch.float32, reduces_tokens=True)
    some = ops.lora_grad(operands[0], None, *operands[2:4], None, 0.5, dtype, dtype)
    assert [t.numel() for t in some] == [tokens * r, 0, 0]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("r", [1, 4, 16, 20, 64, 100])
@pytest.mark.parametrize(
    ("N", "K", "double_quant"),
    [(16, 64, False), (48, 192, True), (1040, 576, True), (272, 32768, True)],  # the last in several steps
)
def test_an_update_joins_the_weight(N, K, double_quant, r, dtype):
    w = nf4.quantize(torch.randn(N, K), 64, double_quant)
    A, B = torch.randn(r, K).to(dtype), torch.randn(N, r).to(dtype)
    dense = w.dequantize(torch.float64) + 0.5 * B.double() @ A.double()
    eye = torch.eye(N, dtype=dtype).repeat(512 // N + 1, 1)  # reads the weight out, row by row
    u = torch.zeros(len(eye), r, dtype=dtype)  # the update by itself, which is not formed
    args = [t.cuda() if isinstance(t, torch.Tensor) else t for t in (eye, *w.op_args(), None, A, B, u)]
    got = ops.nf4_linear_lora(*args, 0.5, True, dtype).cpu()
    assert_close_by_rule(got[:N], dense, None, dtype)
    assert torch.equal(got, got[:N].repeat(512 // N + 1, 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, K + 1)}, ValueError, "x: expected shape"),
        ({"A": torch.zeros(3, K + 1)}, ValueError, r"A, B: expected \[r, 192\] and \[128, r\]"),
        ({"B": torch.zeros(N, 4)}, ValueError, "A, B: expected"),
        ({"B": torch.zeros(N, 3).double()}, TypeError, "A, B, u: expected one dtype"),
        ({"u": torch.zeros(4, 3)}, ValueError, r"u: expected \[5, 3\]"),
    ],
)
def test_wrong_arguments(change, error, message):
    weight = nf4.quantize(torch.randn(N, K)).op_args()
    good = {"x": torch.zeros(5, K), "A": torch.zeros(3, K), "B": torch.zeros(N, 3), "u": torch.zeros(5, 3)}
    x, A, B, u = (good | change).values()
    with pytest.raises(error, match=message):
        ops.nf4_linear_lora(x, *weight, None, A, B, u, 1.0, False, torch.float32)
    if "u" not in change and error is ValueError:
        with pytest.raises(error, match=message):
            functional.nf4_lora(x, weight, None, A, B, 1.0, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_y": torch.zeros(5, N + 1)}, ValueError, "grad_y, A, B: expected"),
        ({"B": torch.zeros(N, 2)}, ValueError, "grad_y, A, B: expected"),
        ({"x": torch.zeros(4, K)}, ValueError, r"x: expected \[5, 192\], got \[4, 192\]"),
        ({"u": torch.zeros(5, 2)}, ValueError, r"u: expected \[5, 3\]"),
        ({"A": torch.zeros(3, K).double()}, TypeError, "A: expected the dtype of grad_y"),
    ],
)
def test_wrong_arguments_of_the_gradient(change, error, message):
    good = {"grad_y": torch.zeros(5, N), "x": torch.zeros(5, K), "A": torch.zeros(3, K)}
    good |= {"B": torch.zeros(N, 3), "u": torch.zeros(5, 3)}
    with pytest.raises(error, match=message):
        ops.lora_grad(*(good | change).values(), 1.0, torch.float32, torch.float32)

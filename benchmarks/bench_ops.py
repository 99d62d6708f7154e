"""Each operator alone, beside bitsandbytes and plain PyTorch in one run.

    python benchmarks/bench_ops.py [--quick] [--threads 2] [--device cpu] [--out FILE.csv]

    nf4_quantize, nf4_dequantize   [N, K] <-> 4 bits, blocks of 64; baseline bitsandbytes
    nf4_linear, nf4_linear_dx      M tokens times a double-quantized weight, or its transpose; baseline torch,
                                   a dense product; torch-dequantize builds the dense weight in each call
    kron_mix, kron_mix_grad        the r = 10 mixture and its gradients; baseline plain, a loop over the
                                   components and its autograd backward

relF: of the result against float64; for kron_mix_grad the worst of dA, dB and dalpha.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peers import plain_mixture
from results import Case, Row, device_guard, gemm_gflop, make_rows, parser, prepare, relative_error, write
from timing import Call, copies, measure
from torch import Tensor

import moka
from moka import functional as MF
from moka import nf4, reference
from moka.rules import plan_shapes

SIZES = ((576, 576), (1536, 576), (4096, 4096))
TOKENS = (1, 16, 256)


def compare(
    args: argparse.Namespace, case: Case, calls: dict[str, Call], error: Callable[[Any], float],
    nbytes: float, baseline: str,
) -> list[Row]:  # fmt: skip
    """Checks and times one set of calls that compute the same thing."""
    errors = {name: error(call(0)) for name, call in calls.items()}
    repeat_s = 0.01 if args.quick else 0.25
    timings = measure(calls, torch.device(args.device), repeat_s=repeat_s)
    return make_rows(args, case, timings, dict.fromkeys(calls, nbytes), errors, baseline)


def bench_convert(args: argparse.Namespace, w: Tensor) -> list[Row]:
    """Quantization and dequantization."""
    import bitsandbytes.functional as bnb

    N, K = w.shape
    n, dtype = copies(w.numel() * w.element_size(), w.device), w.dtype
    dense = [w.clone() for _ in range(n)]
    w4 = nf4.quantize(w)
    w64 = w4.dequantize(torch.float32).cpu().double()
    stored = w4.packed.nbytes + w4.absmax.nbytes
    quantize: dict[str, Call] = {
        "bitsandbytes": lambda i: bnb.quantize_4bit(dense[i % n], blocksize=64, quant_type="nf4"),
        "moka": lambda i: nf4.quantize(dense[i % n]),
    }

    def quantized_error(result) -> float:
        if isinstance(result, nf4.NF4Weight):
            return relative_error(result.dequantize(torch.float32), w64)
        return relative_error(bnb.dequantize_4bit(*result).float(), w64)

    rows = compare(
        args, Case("nf4_quantize", N, K, 1, 0.0), quantize, quantized_error, w.nbytes + stored, "bitsandbytes"
    )

    m = copies(stored, w.device)
    weights = [replace(w4, packed=w4.packed.clone()) for _ in range(m)]
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    states = [(packed.clone(), state) for _ in range(m)]
    dequantize: dict[str, Call] = {
        "bitsandbytes": lambda i: bnb.dequantize_4bit(*states[i % m]),
        "torch": lambda i: reference.nf4_dequantize(weights[i % m].packed, w4.absmax, 64, (N, K), dtype),
        "moka": lambda i: weights[i % m].dequantize(dtype),
    }
    return rows + compare(
        args, Case("nf4_dequantize", N, K, 1, 0.0), dequantize, lambda result: relative_error(result, w64),
        w.nbytes + stored, "bitsandbytes",
    )  # fmt: skip


def bench_linear(args: argparse.Namespace, w: Tensor, M: int) -> list[Row]:
    """`y = W x` with W in NF4, and the gradient of x."""
    import bitsandbytes as bnb

    N, K = w.shape
    m = copies(w.numel() // 2, w.device)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    states = [(packed.clone(), state) for _ in range(m)]
    layer = nf4.quantize(w, double_quant=True)
    weights = [replace(layer, packed=layer.packed.clone()) for _ in range(m)]
    d = copies(w.numel() * w.element_size(), w.device)
    dense = [layer.dequantize(w.dtype) for _ in range(d)]
    w64 = layer.dequantize(torch.float32).cpu().double()

    x = torch.randn(M, K, device=w.device, dtype=w.dtype)
    forward: dict[str, Call] = {
        "torch": lambda i: torch.nn.functional.linear(x, dense[i % d]),
        "torch-dequantize": lambda i: torch.nn.functional.linear(
            x, bnb.functional.dequantize_4bit(*states[i % m])
        ),
        "bitsandbytes": lambda i: bnb.matmul_4bit(x, states[i % m][0], states[i % m][1]),
        "moka": lambda i: MF.nf4_linear(x, weights[i % m]),
    }
    nbytes = layer.nbytes + x.element_size() * M * (N + K)
    y64 = x.cpu().double() @ w64.T
    rows = compare(
        args,
        Case("nf4_linear", N, K, M, gemm_gflop(N, K, M)),
        forward,
        lambda y: relative_error(y, y64),
        nbytes,
        "torch",
    )

    grad_y = torch.randn(M, N, device=w.device, dtype=w.dtype)
    ops = torch.ops.moka
    backward: dict[str, Call] = {
        "torch": lambda i: grad_y @ dense[i % d],
        "bitsandbytes": lambda i: grad_y @ bnb.functional.dequantize_4bit(*states[i % m]),  # as its backward
        "moka": lambda i: ops.nf4_linear(
            grad_y, *weights[i % m].op_args(), None, None, None, None, [], True, "auto"
        ),
    }  # fmt: skip
    dx64 = grad_y.cpu().double() @ w64
    return rows + compare(
        args,
        Case("nf4_linear_dx", N, K, M, gemm_gflop(N, K, M)),
        backward,
        lambda dx: relative_error(dx, dx64),
        nbytes,
        "torch",
    )


def bench_mixture(args: argparse.Namespace, w: Tensor, M: int) -> list[Row]:
    """The mixture alone: forward, and the gradients of A, B and alpha."""
    N, K = w.shape
    shapes = plan_shapes(N, K, r=10)
    flat = moka.shapes.flatten_shapes(shapes)
    A = 0.1 * torch.randn(sum(s.a_numel for s in shapes), device=w.device)
    B = 0.1 * torch.randn(sum(s.b_numel for s in shapes), device=w.device)
    alpha = torch.rand(len(shapes), device=w.device)
    A, B = A.to(w.dtype), B.to(w.dtype)
    x = torch.randn(M, K, device=w.device, dtype=w.dtype)
    grad_y = torch.randn(M, N, device=w.device, dtype=w.dtype)

    def plain(i: int) -> Tensor:
        factors = reference.split_factors(A, B, shapes)
        return plain_mixture(x, *zip(*factors, strict=True), alpha.to(w.dtype))

    leaves64 = [t.cpu().double().requires_grad_() for t in (A, B, alpha)]
    y64 = reference.kron_mixture(x.cpu().double(), *leaves64, shapes)
    grads64 = torch.autograd.grad(y64, leaves64, grad_y.cpu().double())
    gflop = 2e-9 * M * sum(shape.macs for shape in shapes)
    forward: dict[str, Call] = {"plain": plain, "moka": lambda i: MF.kron_mixture(x, A, B, alpha, shapes)}
    nbytes = (A.numel() + B.numel() + M * (N + K)) * w.element_size()
    rows = compare(
        args,
        Case("kron_mix", N, K, M, gflop),
        forward,
        lambda y: relative_error(y, y64.detach()),
        nbytes,
        "plain",
    )

    leaves = [t.clone().requires_grad_() for t in (A, B, alpha)]
    factors = reference.split_factors(leaves[0], leaves[1], shapes)
    y = plain_mixture(x, *zip(*factors, strict=True), leaves[2].to(w.dtype))
    backward: dict[str, Call] = {
        "plain": lambda i: torch.autograd.grad(y, leaves, grad_y, retain_graph=True),
        "moka": lambda i: torch.ops.moka.kron_mix_grad(x, grad_y, A, B, alpha, flat, True, True, True),
    }
    return rows + compare(
        args, Case("kron_mix_grad", N, K, M, 2 * gflop), backward,
        lambda grads: max(relative_error(g, r) for g, r in zip(grads, grads64, strict=True)), nbytes, "plain",
    )  # fmt: skip


def main() -> None:
    args = parser(__doc__, "ops.csv").parse_args()
    device, dtype = prepare(args), getattr(torch, args.dtype)
    sizes, tokens = (((96, 64),), (1, 8)) if args.quick else (SIZES, TOKENS)
    rows: list[Row] = []
    with device_guard(device), torch.no_grad():
        for N, K in sizes:
            w = (0.02 * torch.randn(N, K, device=device)).to(dtype)
            rows += bench_convert(args, w)
            for M in tokens:
                rows += bench_linear(args, w, M)
                with torch.enable_grad():
                    rows += bench_mixture(args, w, M)
    write(rows, args.out)


if __name__ == "__main__":
    main()

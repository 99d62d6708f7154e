"""The specification: every operator of moka in plain PyTorch, slow and readable.

Tests hold the kernels against these functions; the docstrings of `moka.functional` refer to them. Sources:
MoKA, arXiv 2508.03527 (the mixture); QLoRA, arXiv 2305.14314 (NF4 and double quantization).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .shapes import KronShape, split_flat

# fmt: off
#: The 16 NF4 values: quantiles of N(0, 1) scaled to [-1, 1] (QLoRA, appendix E), as fp32 literals of
#: bitsandbytes.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def split_factors(A: Tensor, B: Tensor, shapes: Sequence[Sequence[Any]]) -> list[tuple[Tensor, Tensor]]:
    """The factors `(A_i [ma, na], B_i [mb, nb])`, views of flat `A` and `B`; identities are made explicit."""
    components = [KronShape(*shape) for shape in shapes]
    factors = []
    for s, (a, b) in zip(components, split_flat(A.flatten(), B.flatten(), components), strict=True):
        A_i = torch.eye(s.ma, dtype=A.dtype, device=A.device) if s.identity == 1 else a.view(s.ma, s.na)
        B_i = torch.eye(s.mb, dtype=B.dtype, device=B.device) if s.identity == 2 else b.view(s.mb, s.nb)
        factors.append((A_i, B_i))
    return factors


def kron_dense(A: Tensor, B: Tensor, alpha: Tensor, shapes: Sequence[Sequence[Any]]) -> Tensor:
    """The dense update `sum_i alpha_i (A_i kron B_i)`, `[N, K]`: for analysis and tests only."""
    terms = [torch.kron(A_i, B_i) * alpha[i] for i, (A_i, B_i) in enumerate(split_factors(A, B, shapes))]
    return torch.stack(terms).sum(0)


def kron_mixture(x: Tensor, A: Tensor, B: Tensor, alpha: Tensor, shapes: Sequence[Sequence[Any]]) -> Tensor:
    """`y = sum_i alpha_i (A_i kron B_i) x`, `[..., K]` -> `[..., N]`: `(A kron B) vec(X) = vec(A X B^T)`."""
    y = 0
    for i, (A_i, B_i) in enumerate(split_factors(A, B, shapes)):
        X = x.reshape(*x.shape[:-1], A_i.shape[1], B_i.shape[1])
        y = y + alpha[i] * (A_i @ X @ B_i.mT).flatten(-2)
    return y  # pyright: ignore[reportReturnType]


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, blocksize: int, shape: Sequence[Any], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`w[e] = code[nibble e] * absmax[e // blocksize]`, rounded from fp32 to `dtype`; high nibble first."""
    numel = int(torch.Size(shape).numel())
    packed = packed.view(torch.uint8).flatten()
    index = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:numel].long()
    scale = absmax.repeat_interleave(blocksize)[:numel]
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=packed.device)
    return (code[index] * scale).view(*shape).to(dtype)


def dequantize_absmax(
    absmax: Tensor, absmax2: Tensor, code2: Tensor, offset: Tensor, blocksize2: int
) -> Tensor:
    """Undoes double quantization: `code2[absmax[i]] * absmax2[i // blocksize2] + offset`, rounded twice."""
    return code2[absmax.long()] * absmax2.repeat_interleave(blocksize2)[: absmax.numel()] + offset

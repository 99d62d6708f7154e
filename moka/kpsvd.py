"""The Kronecker product SVD: the nearest sum of Kronecker products to a matrix.

The rearrangement R puts the entry of W at row (i, p) and column (j, q) into row (i, j) and column (p, q), so
that `R(sum_i sigma_i A_i kron B_i) = sum_i sigma_i vec(A_i) vec(B_i)^T`: the truncated SVD of R(W) is the
nearest sum of k terms of one shape (Van Loan and Pitsianis, 1993). For terms of several shapes there are
several R and no such formula: each shape in turn is fitted to what the others leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .nf4 import NF4Weight
from .shapes import KronShape

OVERSAMPLE = 6  # directions beyond k
PASSES = 32  # a Gaussian matrix, whose spectrum hardly decays, then lacks 1e-6 of the energy at most
SWEEPS = 4  # turns of the fit over different shapes; each lowers the error
Terms = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def kpsvd(
    weight: NF4Weight | Tensor, ma: int, na: int, mb: int, nb: int, k: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading terms of `W = sum_i sigma_i A_i kron B_i`.

    A randomized block Krylov SVD (arXiv 1504.05477) of R(W) in fp32; the full one where k is near its rank.

    Args:
        weight: W `[ma*mb, na*nb]`.
        ma, na, mb, nb: sizes of the factors.
        k: terms; beyond the rank of R(W) they are zero.
        seed: of the random start, which decides the last bits.

    Returns:
        A `[k, ma, na]` and B `[k, mb, nb]`, each orthonormal, sigma `[k]`, descending; fp32.

    Example:
        >>> A, B, sigma = kpsvd(torch.kron(torch.eye(4), torch.ones(3, 5)), 4, 4, 3, 5, k=1)
        >>> round(sigma.item() ** 2)
        60
    """
    W = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
    R = W.float().view(ma, mb, na, nb).transpose(1, 2).reshape(ma * na, mb * nb)
    rank = min(k, *R.shape)
    if (rank + OVERSAMPLE) * (PASSES + 1) >= min(R.shape):
        U, sigma, V = _leading(R, rank)
    else:
        U, sigma, V = _krylov(R, rank, seed)
    missing = k - rank
    A, B = U.mT, V.mT
    if missing:
        A, B = (torch.nn.functional.pad(side, (0, 0, 0, missing)) for side in (A, B))
        sigma = torch.nn.functional.pad(sigma, (0, missing))
    return A.reshape(k, ma, na), B.reshape(k, mb, nb), sigma


@torch.no_grad()
def fit(update: Tensor, shapes: Sequence[KronShape]) -> Terms:
    """Terms of these shapes whose sum is near `update [N, K]`: the nearest if they share one shape, else by
    greedy deflation and then sweeps, in which each shape is fitted anew to what the others leave."""
    terms: Terms = [(update.new_zeros(s.ma, s.na), update.new_zeros(s.mb, s.nb)) for s in shapes]
    sizes, rest = Counter(shapes), update.clone()
    for sweep in range(SWEEPS if len(sizes) > 1 else 1):
        for shape, count in sizes.items():
            at = [i for i, other in enumerate(shapes) if other == shape]
            if sweep:
                rest += sum(torch.kron(*terms[i]) for i in at)
            for i, term in zip(at, nearest(rest, shape, count), strict=True):
                terms[i] = term
            rest -= sum(torch.kron(*terms[i]) for i in at)
    return terms


def nearest(matrix: Tensor, s: KronShape, k: int) -> Terms:
    """The k terms of one shape whose sum is nearest to a matrix, `|A_i| = |B_i|`."""
    blocks = matrix.view(s.ma, s.mb, s.na, s.nb)
    if s.identity == 1:  # the mean of the diagonal blocks; equal components share it
        B = blocks.diagonal(dim1=0, dim2=2).mean(-1) / k
        return [(torch.eye(s.ma).to(matrix), B)] * k
    if s.identity == 2:
        A = blocks.diagonal(dim1=1, dim2=3).mean(-1) / k
        return [(A, torch.eye(s.mb).to(matrix))] * k
    A, B, sigma = kpsvd(matrix, *s[:4], k)
    root = sigma.sqrt()[:, None, None]
    return list(zip((A * root).to(matrix.dtype), (B * root).to(matrix.dtype), strict=True))


def _leading(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading terms of `M = U diag(S) V^T`, from the eigenvectors of its smaller Gram matrix in fp64:
    `torch.linalg.svd` in fp32 on a GPU is off by 1e-5 of the energy.
    """
    if M.shape[0] > M.shape[1]:
        V, S, U = _leading(M.mT, k)
        return U, S, V
    wide = M.double()
    U = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -k:].flip(1)
    V, triangle = torch.linalg.qr(wide.mT @ U)  # orthogonal columns already, which may be zero
    S = triangle.diagonal()
    return U.to(M), S.abs().to(M), (V * torch.where(S < 0, -1.0, 1.0)).to(M)


def _krylov(R: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_leading` within the span of `R X, (R R^T) R X, ...` for a random X of k columns and some more."""
    width = k + OVERSAMPLE
    generator = torch.Generator().manual_seed(seed)
    # on the CPU, whatever the default device: the same numbers everywhere
    block = R @ torch.randn(R.shape[1], width, generator=generator, device="cpu").to(R)
    blocks = []
    for _ in range(PASSES):
        block = torch.linalg.qr(block).Q
        blocks.append(block)
        block = R @ (R.mT @ block)
    Q = torch.linalg.qr(torch.cat([*blocks, torch.linalg.qr(block).Q], dim=1)).Q
    U, S, V = _leading(Q.mT @ R, k)
    return Q @ U, S, V

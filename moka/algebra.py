"""Closed forms of an update from its factors: the dense matrix `[N, K]` is never formed.

An update is a list of terms `(A_i [ma, na], B_i [mb, nb])`, the sum `sum_i A_i kron B_i`; `terms` makes it of
a layer, the gates within `A_i`, in fp64. Terms of one shape obey

    <A1 kron B1, A2 kron B2> = <A1, A2> <B1, B2>
    |rows|^2 of sum_i A_i kron B_i = sum_ij diag(A_i A_j^T) kron diag(B_i B_j^T)

For two shapes each index of `[N, K]` is split into digits on which all four factors have axes: with
`U = gcd(mb1, mb2)`, `p = mb1/U`, `q = mb2/U`, `T = p q`, a row is `(s T + t) U + u`, and there

    A1 has the row (s, t // p),  B1 (t % p, u),  A2 (s, t // q),  B2 (t % q, u)

likewise for the columns `(s', t', u')`. The sums over s, s' and over u, u' are products of matrices; `T T'`
entries are left to add up: 1 for equal shapes, few for balanced ones, never more than `N K`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

if TYPE_CHECKING:
    from .layers import MokaLinear

Terms = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def terms(layer: MokaLinear, name: str) -> list[tuple[Tensor, Tensor]]:
    """The update of one adapter of a layer as terms `(alpha_i A_i, B_i)` in fp64."""
    alpha = layer.alpha(name).double()
    factors = layer.factors(name)
    return [(a * A.double(), B.double()) for a, (A, B) in zip(alpha, factors, strict=True)]


def gram(first: Terms, second: Terms) -> Tensor:
    """`[k1, k2]`: the inner product `<A1_i kron B1_i, A2_j kron B2_j>_F` of each two terms."""
    result = first[0][0].new_empty(len(first), len(second))
    groups = _same_shapes(second)
    for rows, A1, B1 in _same_shapes(first):
        for columns, A2, B2 in groups:
            products = _products(A1, B1, A2, B2, "ijtbc", "ijtbc")
            index = torch.tensor(rows, device=A1.device)[:, None], torch.tensor(columns, device=A1.device)
            result[index] = (products[0] * products[1]).sum((-1, -2))
    return result


def inner(first: Terms, second: Terms) -> Tensor:
    """`<dW1, dW2>_F` of two updates of one layer."""
    return gram(first, second).sum()


def norm(update: Terms) -> Tensor:
    """`|dW|_F`; terms that cancel leave a rounding error of about 1e-8 of the largest."""
    return inner(update, update).clamp(min=0).sqrt()


def overlap(first: Terms, second: Terms) -> float:
    """The cosine of the angle between two updates of one layer, -1 to 1; 0 if one of them is zero."""
    norms = norm(first) * norm(second)
    return (inner(first, second) / norms).item() if norms else 0.0


def row_norms_squared(update: Terms) -> Tensor:
    """`[N]`: `|row|^2` of the update."""
    total: Tensor | float = 0.0
    groups = _same_shapes(update)
    for A1, B1 in update:  # one at a time: all pairs at once would hold k^2 N entries
        for _, A2, B2 in groups:
            products = _products(A1[None], B1[None], A2, B2, "ijtsbc", "ijtubc")
            total = total + torch.einsum("ijtse,ijtue->stu", *products).flatten()
    return total  # pyright: ignore[reportReturnType]


def column_norms_squared(update: Terms) -> Tensor:
    """`[K]`: `|column|^2` of the update."""
    return row_norms_squared([(A.mT, B.mT) for A, B in update])


def importance(update: Terms) -> Tensor:
    """`[k]`: `s_i = |alpha_i| |A_i|_F |B_i|_F`, the norm of each term; how A, B and gate share it is free."""
    return torch.stack([A.norm() * B.norm() for A, B in update])


def spectrum(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of `A kron B`, descending: all products of those of A and B."""
    values = torch.outer(torch.linalg.svdvals(A), torch.linalg.svdvals(B))
    return values.flatten().sort(descending=True).values


def effective_rank(values: Tensor) -> float:
    """`exp` of the entropy of `values^2 / |values|^2`: how many of them count; 0 if all are zero."""
    energy = values.double().square()
    share = energy / energy.sum() if energy.any() else energy.new_zeros(0)
    return math.exp(torch.special.entr(share).sum().item()) if len(share) else 0.0


class Recompressed(NamedTuple):
    """Factors `[k, ma, na]` and `[k, mb, nb]`, singular values `[k]`, and `|dW - sum_i A_i kron B_i|_F^2`."""

    A: Tensor
    B: Tensor
    sigma: Tensor
    discarded: float


def recompress(update: Terms, keep: int) -> Recompressed:
    """The nearest update of `keep` terms to one whose terms share a shape, such as a sum of adapters.

    The terms are the columns of `P = [vec A_i]` and `Q = [vec B_i]`, and `P Q^T` is the rearranged update: QR
    of both, then an SVD of the small core. The new terms are orthogonal, `|A_i| = |B_i| = sigma_i^1/2`.

    Raises:
        ConfigError: several shapes, for which no SVD gives the nearest sum, or `keep` below 1.
    """
    groups = _same_shapes(update)
    if len(groups) != 1 or keep < 1:
        sizes = [(*A.shape[1:], *B.shape[1:]) for _, A, B in groups]
        raise ConfigError(f"recompress: got the shapes {sizes}, keep={keep}; expected one shape, keep >= 1")
    _, A, B = groups[0]
    (P, core_a), (Q, core_b) = (torch.linalg.qr(x.flatten(1).mT) for x in (A, B))
    U, S, Vh = torch.linalg.svd(core_a @ core_b.mT, full_matrices=False)
    root = S[:keep].sqrt()
    new_a, new_b = (P @ U[:, :keep] * root).mT, (Q @ Vh[:keep].mT * root).mT
    discarded = S[keep:].square().sum().item()
    return Recompressed(new_a.reshape(-1, *A.shape[1:]), new_b.reshape(-1, *B.shape[1:]), S[:keep], discarded)


def _same_shapes(update: Terms) -> list[tuple[list[int], Tensor, Tensor]]:
    """For each shape the indices of its terms, and their factors stacked `[k, ma, na]`, `[k, mb, nb]`."""
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for i, (A, B) in enumerate(update):
        groups.setdefault((A.shape, B.shape), []).append(i)
    stacked = ([torch.stack([update[i][side] for i in g]) for side in (0, 1)] for g in groups.values())
    return [(g, A, B) for g, (A, B) in zip(groups.values(), stacked, strict=True)]


def _products(
    A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, out_a: str, out_b: str
) -> tuple[Tensor, Tensor]:
    """`A1 A2` and `B1 B2`, summed over the digits that their output leaves out; the last axes are t, t'."""
    (p, q, t), (p_, q_, t_) = (_digits(B1.shape[side], B2.shape[side], A1.device) for side in (1, 2))
    U, U_ = B1.shape[1] // p, B1.shape[2] // p_
    A1, A2 = (A.view(len(A), -1, n, A.shape[2] // n_, n_) for A, n, n_ in ((A1, q, q_), (A2, p, p_)))
    B1, B2 = (B.view(len(B), n, U, n_, U_) for B, n, n_ in ((B1, p, p_), (B2, q, q_)))
    a = torch.einsum(f"istxb,jstxc->{out_a}", A1[:, :, t // p], A2[:, :, t // q])
    b = torch.einsum(f"itubx,jtucx->{out_b}", B1[:, t % p], B2[:, t % q])
    return a[..., t_ // p_, t_ // q_], b[..., t_ % p_, t_ % q_]


def _digits(m1: int, m2: int, device: torch.device) -> tuple[int, int, Tensor]:
    """p, q and all t, for right factors of `m1` and `m2` rows (or columns)."""
    p, q = m1 // math.gcd(m1, m2), m2 // math.gcd(m1, m2)
    return p, q, torch.arange(p * q, device=device)

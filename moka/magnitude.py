"""Magnitude and direction apart, as in DoRA (arXiv 2402.09353), for Kronecker products:

    y = m * (W + dW) x / |W + dW|_rows + b       m [N] trained; the norms are constants in the backward pass

The norms need no dense update: |W_n|^2 and <W_n, dW_n> take one pass over W, |dW_n|^2 comes from the factors'
Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import algebra
from .bases import dense_of
from .errors import StateError

if TYPE_CHECKING:
    from .layers import MokaLinear


@torch.no_grad()
def row_norms(layer: MokaLinear, name: str | None) -> Tensor:
    """`|W_n + dW_n|` of each row `[N]` in fp32; None for the base alone."""
    W = dense_of(layer.base_layer)
    squares = W.square().sum(1).double()
    if name is not None:
        update = algebra.terms(layer, name)
        squares += algebra.row_norms_squared(update)
        for A, B in update:
            blocks = W.view(A.shape[0], B.shape[0], A.shape[1], B.shape[1])
            inner = torch.einsum("pqab,qb->pqa", blocks, B.float())
            squares += 2 * torch.einsum("pqa,pa->pq", inner, A.float()).flatten()
    return squares.clamp(min=0).sqrt().float()


def directed(layer: MokaLinear, names: Sequence[str]) -> bool:
    """Whether these adapters, to be used together, set the norm of each row; one that does is alone.

    Raises:
        StateError: it is not.
    """
    found = [name for name in names if name in layer.moka_magnitude]
    if found and len(names) > 1:
        raise StateError(f"adapters {found} set the norm of each row, so no others can be added")
    return bool(found)


def direction(layer: MokaLinear, name: str) -> Tensor:
    """`m / |W + dW|_rows`, `[N]`: what multiplies the rows of W + dW; differentiable in m."""
    norms = row_norms(layer, name)
    return layer.moka_magnitude[name] / torch.where(norms > 0, norms, torch.ones_like(norms))


@torch.no_grad()
def change(layer: MokaLinear, name: str, delta: Tensor) -> Tensor:
    """`m (W + dW) / |W + dW|_rows - W`, `[N, K]` in fp32: the whole change of the weight, for a dense dW."""
    W = dense_of(layer.base_layer)
    return (W + delta) * direction(layer, name)[:, None] - W

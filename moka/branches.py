"""Mixtures that run beside the base layer, in plain PyTorch: low-rank factors that are never expanded, and
gates that depend on the token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import factors, functional
from .factors import Run
from .shapes import KronShape, split_flat


class Form(NamedTuple):
    """What a layer needs to know of an adapter's components in every step.

    Attributes:
        shapes: with all factors dense, as the operators take them.
        a, b: how to expand each side (`factors.expand`).
        low_rank: whether the components cost less unexpanded: all have one shape and a low-rank right factor.
        macs: multiply-adds per token when activations run through the factors.
    """

    shapes: tuple[KronShape, ...]
    a: tuple[Run, ...] | None
    b: tuple[Run, ...] | None
    low_rank: bool
    macs: int

    @property
    def dense(self) -> bool:
        """Whether the parameters are the entries of the factors, so that both can be written."""
        return self.a is None and self.b is None


def form_of(shapes: Sequence[KronShape]) -> Form:
    """The form of a mixture of these components."""
    a, b = (factors.plan([shape.side(side) for shape in shapes]) for side in "AB")
    expanded = tuple(shape.expanded for shape in shapes)
    macs, unexpanded = sum(shape.macs for shape in expanded), math.inf
    if b is not None and len(b) == 1 and b[0].kind == "lowrank" and len(set(expanded)) == 1:
        shape, rank = expanded[0], b[0].arguments[0][0]
        mixing = 0 if shape.identity == 1 else shape.ma * shape.na
        unexpanded = len(shapes) * rank * (shape.na * shape.nb + mixing + shape.ma * shape.mb)
    return Form(expanded, a, b, unexpanded < macs, int(min(unexpanded, macs)))


def low_rank(x: Tensor, A: Tensor, B: Tensor, alpha: Tensor, form: Form) -> Tensor:
    """`y = sum_i alpha_i (A_i kron U_i V_i) x`, that is Y = sum_i alpha_i A_i (X V_i^T) U_i^T.

    Args:
        x: `[..., K]`.
        A: the dense left factors, flat.
        B: the parameters of the right factors, flat: U_i `[mb, rank]` and V_i `[rank, nb]` of each.
        alpha: `[r]`.
        form: of the mixture.
    """
    assert form.b is not None
    shape, k = form.shapes[0], len(form.shapes)
    U, V = factors.split(B.to(x.dtype), form.b[0])
    rank = V.shape[1]
    X = x.reshape(-1, shape.na, shape.nb)
    middle = torch.nn.functional.linear(X, V.reshape(k * rank, shape.nb)).unflatten(2, (k, rank))
    if shape.identity == 1:
        middle = middle * alpha[:, None].to(x.dtype)
    else:
        left = (A.view(k, shape.ma, shape.na) * alpha[:, None, None]).to(x.dtype)
        middle = torch.einsum("kma,takr->tmkr", left, middle)
    y = torch.nn.functional.linear(middle.flatten(2), U.transpose(0, 1).reshape(shape.mb, k * rank))
    return y.reshape(*x.shape[:-1], shape.ma * shape.mb)


def routed(x: Tensor, A: Tensor, B: Tensor, routing: Tensor, form: Form) -> Tensor:
    """`y = sum_i routing_i (A_i kron B_i) x`, where each token has its own weights `[..., r]`."""
    one = torch.ones(1, device=x.device)
    y = 0
    for i, (shape, factors_of) in enumerate(zip(form.shapes, split_flat(A, B, form.shapes), strict=True)):
        own = functional.kron_mixture(x, *factors_of, one, [shape])
        y = y + own * routing[..., i : i + 1].to(own.dtype)
    return y  # pyright: ignore[reportReturnType]

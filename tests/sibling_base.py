"""What a reference of a sibling adapter consists of; `sibling_references.py` lists them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sibling:
    """What every entry says of itself; `tensors`, `count` and `update` are independent of each other."""

    name: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]

    def tensors(self, m: int, n: int) -> Shapes:
        """Trained tensors of one layer: the method's names and shapes."""
        raise NotImplementedError

    def given(self, m: int, n: int) -> Shapes:
        """Tensors passed in beside them: frozen, or shared by all layers. Not counted."""
        return {}

    def count(self, m: int, n: int) -> int:
        """Trained parameters of one layer, by the method's closed formula."""
        raise NotImplementedError

    def update(self, t: Tensors, m: int, n: int) -> Tensor:
        """dW [m, n] of the tensors of `tensors` and `given`."""
        raise NotImplementedError

    def flops(self, m: int, n: int) -> int:
        """FLOPs per token of the branch, a multiply-add counting two, without scale and gate."""
        raise NotImplementedError

    def rank(self, m: int, n: int) -> int:
        """Largest rank that dW can have."""
        raise NotImplementedError


def kron_flops(a: int, b: int, c: int, d: int) -> int:
    """The cheaper order of A X B^T, for A [a, b], B [c, d], X [b, d]."""
    return min(2 * a * d * (b + c), 2 * b * c * (a + d))


def kron_rank(a: int, b: int, c: int, d: int) -> int:
    return min(a, b) * min(c, d)


def tile(x: Tensor, size: int) -> Tensor:
    """Repeats the last dimension of x until it has `size` entries."""
    return x[..., torch.arange(size) % x.shape[-1]]

"""Initial values: one factor of each component is random and the other zero, so the update starts at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import KronShape

#: default: A random, B zero. swapped: A zero, B random.
INITS = ("default", "swapped")


@torch.no_grad()
def init_factors_(A: Tensor, B: Tensor, shapes: Sequence[KronShape], kind: str = "default") -> None:
    """Fills flat factors in place: U(-b, b) with b = 1/sqrt(columns), as LoRA's first factor, and zeros.

    A component with an identity factor stores one factor alone, which starts at zero.
    """
    A.zero_()
    B.zero_()
    a = b = 0
    for shape in shapes:
        if shape.identity == 0 and kind == "default":
            bound = 1.0 / math.sqrt(shape.na)
            A[a : a + shape.a_numel].uniform_(-bound, bound)
        elif shape.identity == 0:
            bound = 1.0 / math.sqrt(shape.nb)
            B[b : b + shape.b_numel].uniform_(-bound, bound)
        a, b = a + shape.a_numel, b + shape.b_numel

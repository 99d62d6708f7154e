"""Initial values: one factor of each component is random and the other zero, so the update starts at zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import factors
from .errors import ConfigError
from .kpsvd import kpsvd
from .nf4 import NF4Weight
from .shapes import KronShape

#: default: A random, B zero. swapped: A zero, B random. svd: the leading components of the base weight.
#: residual: the same, and the base becomes what is left.
INITS = ("default", "swapped", "svd", "residual")


@torch.no_grad()
def init_factors_(A: Tensor, B: Tensor, shapes: Sequence[KronShape], kind: str = "default") -> None:
    """Fills flat factors in place: U(-b, b) with b = 1/sqrt(columns), as LoRA's first factor, and zeros.

    Where one of a component's factors has no parameters (an identity, say), the other one starts at zero.
    """
    a = b = 0
    for shape in shapes:
        zero_a = kind == "swapped" if shape.b_numel else True
        zero_b = not zero_a if shape.a_numel else True
        factors.init_(A[a : a + shape.a_numel], shape.side("A"), zero_a)
        factors.init_(B[b : b + shape.b_numel], shape.side("B"), zero_b)
        a, b = a + shape.a_numel, b + shape.b_numel


@torch.no_grad()
def init_svd_(A: Tensor, B: Tensor, shapes: Sequence[KronShape], weight: NF4Weight | Tensor) -> None:
    """Fills flat factors with the leading Kronecker components of a weight `[N, K]`: `sum_i A_i kron B_i` is
    the nearest such sum to it, and |A_i| = 1: singular values are on the input's side, as in LoRA-XS.

    Raises:
        ConfigError: the components differ in shape, or are not dense.
    """
    shape = shapes[0]
    if set(shapes) != {shape} or (shape.identity, shape.a, shape.b) != (0, "dense", "dense"):
        raise ConfigError(
            f"init='svd': got the components {[str(s) for s in shapes[:10]]}, expected dense ones "
            f"of one shape (shapes='lora' or 'even')"
        )
    left, right, sigma = kpsvd(weight, *shape[:4], len(shapes))
    A.copy_(left.flatten())
    B.copy_((right * sigma[:, None, None]).flatten())

"""The Kronecker product SVD: the nearest sum of Kronecker products to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .nf4 import NF4Weight


def kpsvd(
    weight: NF4Weight | Tensor, ma: int, na: int, mb: int, nb: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading terms of `W = sum_i sigma_i A_i kron B_i`: A `[k, ma, na]`, B `[k, mb, nb]`, sigma."""
    W = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
    R = W.float().view(ma, mb, na, nb).transpose(1, 2).reshape(ma * na, mb * nb)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    return U[:, :k].T.reshape(k, ma, na), Vh[:k].reshape(k, mb, nb), S[:k]

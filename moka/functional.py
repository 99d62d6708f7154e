"""The differentiable operations: a linear layer whose weight is NF4 or dense, plus a gated Kronecker mixture.

    y = W x + b + sum_i alpha_i (A_i kron B_i) x                                    (MoKA, arXiv 2508.03527)

with A_i [ma, na], B_i [mb, nb], ma*mb = N, na*nb = K, and the row-major identity
`(A kron B) vec(X) = vec(A X B^T)`. `alpha` holds scale times gate. `moka.reference` has the same operations
in plain PyTorch.

The gradients (`G = dY^T X` is never formed in full):

    dx = W^T dy + sum_i alpha_i (A_i^T kron B_i^T) dy        dA_i = alpha_i sum_t dY_t B_i X_t^T
    d alpha_i = <dA_i, A_i> / alpha_i                        dB_i = alpha_i sum_t dY_t^T A_i X_t

They are first-order only: differentiating a gradient again raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import ConfigError
from .nf4 import NF4Weight
from .ops import require_native
from .shapes import flatten_shapes

PATHS = ("auto", "merged", "factored")
Shapes = Sequence[Sequence[int]]


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`y = W x + b` with `W` in NF4, never dequantized in full; differentiable in `x` and `bias`.

    Args:
        x: `[..., K]`, fp32, bf16, fp16 or fp64; under autocast it is cast to the autocast dtype.
        weight: `[N, K]` in NF4.
        bias: `[N]` or None.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: x's last dimension is not K.

    Example:
        >>> w4 = moka.nf4.quantize(torch.randn(32, 64))
        >>> moka.functional.nf4_linear(torch.randn(5, 64), w4).shape
        torch.Size([5, 32])
    """
    return _apply(x, weight.op_args(), bias, None, "auto")


def kron_mixture(x: Tensor, A: Tensor, B: Tensor, alpha: Tensor, shapes: Shapes) -> Tensor:
    """`y = sum_i alpha_i (A_i kron B_i) x`: activations run through the factors; differentiable in all.

    Args:
        x: `[..., K]`.
        A: all `A_i` row-major, concatenated; fp32 or x's dtype.
        B: all `B_i` likewise, of A's dtype.
        alpha: `[r]`, scale times gate; fp32 or A's dtype.
        shapes: `(ma, na, mb, nb)` per component, or `moka.shapes.KronShape` to mark an identity factor.

    Returns:
        `[..., N]` in x's dtype.

    Example:
        >>> y = moka.functional.kron_mixture(torch.randn(5, 6), torch.randn(4), torch.randn(6), torch.ones(1),
        ...                                  [(2, 2, 2, 3)])
        >>> y.shape
        torch.Size([5, 4])
    """
    return _apply(x, (), None, (A, B, alpha, shapes), "factored")


def moka_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    shapes: Shapes,
    path: str = "auto",
) -> Tensor:
    """`y = W x + b + sum_i alpha_i (A_i kron B_i) x`, base and mixture in one operation.

    Args:
        x, A, B, alpha, shapes: as for `kron_mixture`.
        weight: `[N, K]`, NF4 or dense; frozen, it gets no gradient.
        bias: `[N]` or None.
        path: "merged" adds the mixture to each weight tile before one matrix product; "factored" runs the
            activations through the factors; "auto" chooses by the number of tokens, from measurements.

    Returns:
        `[..., N]` in x's dtype. Differentiable in x, bias, A, B and alpha.

    Raises:
        ConfigError: path is not one of `PATHS`, or a dense weight requires a gradient.
    """
    if path not in PATHS:
        raise ConfigError(f"path: got {path!r}, expected one of {PATHS}")
    if isinstance(weight, NF4Weight):
        return _apply(x, weight.op_args(), bias, (A, B, alpha, shapes), path)
    if weight.requires_grad:
        raise ConfigError(
            "weight: the base of an adapted layer gets no gradient; call weight.requires_grad_(False)"
        )
    return _apply(x, (weight,), bias, (A, B, alpha, shapes), path)


def kron_add(weight: Tensor, A: Tensor, B: Tensor, alpha: Tensor, shapes: Shapes) -> Tensor:
    """`W + sum_i alpha_i (A_i kron B_i)`: the dense merged weight; a constant, without gradients.

    Args:
        weight: `[N, K]`, left as it is.
        A, B, alpha, shapes: as for `kron_mixture`.

    Returns:
        `[N, K]` in weight's dtype, summed in fp32 (fp64 for an fp64 weight) and rounded once.
    """
    require_native()
    return torch.ops.moka.kron_add(weight.detach(), A, B, alpha, flatten_shapes(shapes))


def _apply(x: Tensor, base: tuple, bias: Tensor | None, mixture: tuple | None, path: str) -> Tensor:
    require_native()
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    A, B, alpha, shapes = mixture if mixture is not None else (None, None, None, ())
    return _MokaLinear.apply(x, bias, A, B, alpha, flatten_shapes(shapes), path, *base)  # pyright: ignore


def _forward(
    x: Tensor, base: tuple, bias: Tensor | None, mixture: tuple, path: str, transpose: bool
) -> Tensor:
    """`W x + b + mixture(x)`, transposed on request; base: the NF4 arguments, `(weight,)` or `()`."""
    if len(base) > 1:
        return torch.ops.moka.nf4_linear(x, *base, bias, *mixture, transpose, path)
    y = None
    if base:
        weight = base[0].to(x.dtype)
        if path == "merged":
            weight = torch.ops.moka.kron_add(weight, *mixture)
        bias = bias if bias is None else bias.to(x.dtype)
        y = x @ weight if transpose else torch.nn.functional.linear(x, weight, bias)
        if path == "merged":
            return y
    return torch.ops.moka.kron_mix(x, *mixture, transpose, y)


class _MokaLinear(torch.autograd.Function):
    """Base and mixture, forward and backward; every public function of this module goes through it."""

    @staticmethod
    def forward(ctx: Any, x, bias, A, B, alpha, shapes, path, *base):
        ctx.shapes, ctx.path, ctx.base_is_tensor = shapes, path, [isinstance(b, Tensor) for b in base]
        ctx.base = [None if isinstance(b, Tensor) else b for b in base]
        # x is needed for the gradients of the mixture alone: a frozen layer keeps no activation alive
        keep_x = x if any(ctx.needs_input_grad[2:5]) else None
        ctx.save_for_backward(keep_x, A, B, alpha, *(b for b in base if isinstance(b, Tensor)))
        return _forward(x, base, bias, (A, B, alpha, shapes), path, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        (grad_y,) = grads
        x, A, B, alpha, *tensors = ctx.saved_tensors
        need_x, need_bias, need_A, need_B, need_alpha = ctx.needs_input_grad[:5]
        grad_x = grad_bias = grad_A = grad_B = grad_alpha = None
        if need_x:
            saved = iter(tensors)
            base = tuple(
                next(saved) if is_tensor else b
                for is_tensor, b in zip(ctx.base_is_tensor, ctx.base, strict=True)
            )
            grad_x = _forward(grad_y, base, None, (A, B, alpha, ctx.shapes), ctx.path, transpose=True)
        if need_bias:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        if need_A or need_B or need_alpha:
            grad_A, grad_B, grad_alpha = torch.ops.moka.kron_mix_grad(
                x, grad_y, A, B, alpha, ctx.shapes, need_A, need_B, need_alpha
            )
        return (
            grad_x,
            grad_bias,
            grad_A if need_A else None,
            grad_B if need_B else None,
            grad_alpha if need_alpha else None,
            *(None,) * (2 + len(ctx.base)),
        )

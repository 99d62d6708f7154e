"""The differentiable operations: a linear layer whose weight is NF4 or dense, plus a gated Kronecker mixture.

    y = W x + b + sum_i alpha_i (A_i kron B_i) x                                    (MoKA, arXiv 2508.03527)

with A_i [ma, na], B_i [mb, nb], ma*mb = N, na*nb = K, and the row-major identity
`(A kron B) vec(X) = vec(A X B^T)`. `alpha` holds scale times gate. `moka.reference` has the same operations
in plain PyTorch.

The gradients (`G = dY^T X` is never formed in full):

    dx = W^T dy + sum_i alpha_i (A_i^T kron B_i^T) dy        dA_i = alpha_i sum_t dY_t B_i X_t^T
    d alpha_i = <dA_i, A_i> / alpha_i                        dB_i = alpha_i sum_t dY_t^T A_i X_t

They are first-order only: differentiating a gradient again raises an error. `csrc/autograd.cpp` has them,
`csrc/lora.cpp` those of a low-rank update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .nf4 import NF4Weight
from .ops import require_native
from .shapes import flatten_shapes

PATHS = ("auto", "merged", "factored")
NO_MIXTURE = (None, None, None, ())
Shapes = Sequence[Sequence[Any]]


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
    return linear(x, weight.op_args(), bias, NO_MIXTURE, "auto")


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
    return linear(x, (), None, (A, B, alpha, flatten_shapes(shapes)), "factored")


def add_kron_mixtures(
    y: Tensor, x: Tensor, indices: Sequence[Tensor], mixtures: Sequence[tuple[Tensor, Tensor, Tensor, Shapes]]
) -> Tensor:
    """`y[row] += sum_i alpha_i (A_i kron B_i) x[row]`, each row with the mixture of its own adapter.

    Args:
        y: `[batch, ..., N]`, changed in place.
        x: `[batch, ..., K]`.
        indices: the rows of each adapter, `[rows]` int64; a row that is in none stays as it is.
        mixtures: `(A, B, alpha, shapes)` of each adapter, as for `kron_mixture`.

    Returns:
        y; differentiable in y, x and the mixtures.
    """
    for index, mixture in zip(indices, mixtures, strict=True):
        y.index_add_(0, index, kron_mixture(x[index], *mixture).to(y.dtype))
    return y


def nf4_linear_rows(
    x: Tensor,
    base: tuple,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    adapter: Tensor,
    shapes: Shapes,
) -> Tensor:
    """`y = W x + b + sum_i alpha_i (A_i kron B_i) x` with a mixture of its own for each token; no gradients.

    Args:
        x: `[..., K]`.
        base: `NF4Weight.op_args()`.
        bias: `[N]` or None.
        A: `[adapters, entries]`, the factors of each adapter as for `kron_mixture`; B likewise.
        alpha: `[adapters, r]`.
        adapter: `[tokens]` int32, the row of A, B and alpha for each token of x; -1 for the base alone.
        shapes: as for `kron_mixture`, the same for all adapters.

    Returns:
        `[..., N]` in x's dtype.
    """
    require_native()
    rows = x.detach().reshape(-1, x.shape[-1])
    if bias is not None:
        bias = bias.detach().to(x.dtype)
    y = torch.ops.moka.nf4_linear_rows(
        rows, *base, bias, A.detach(), B.detach(), alpha.detach(), adapter, flatten_shapes(shapes)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


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
            activations through the factors; "auto" chooses by device, tokens and shapes, from measurements.

    Returns:
        `[..., N]` in x's dtype. Differentiable in x, bias, A, B and alpha.

    Raises:
        ConfigError: path is not one of `PATHS`, or a dense weight requires a gradient.
    """
    if path not in PATHS:
        raise ConfigError(f"path: got {path!r}, expected one of {PATHS}")
    base = weight.op_args() if isinstance(weight, NF4Weight) else (weight,)
    return linear(x, base, bias, (A, B, alpha, flatten_shapes(shapes)), path)


def softmax_gate(logits: Tensor, scale: float) -> Tensor:
    """`scale * softmax(logits)`, `[r]`, at least in fp32: the `alpha` of a mixture; differentiable."""
    require_native()
    return torch.ops.moka.gate.default(logits, scale)


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


def nf4_lora(
    x: Tensor,
    base: tuple,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    compute: torch.dtype,
) -> Tensor:
    """`y = W x + b + scale (x A^T) B^T`, a low-rank update (LoRA) of an NF4 layer in one operation.

    Args:
        x: `[..., K]`.
        base: `NF4Weight.op_args()`.
        bias: `[N]` or None, of dtype `compute`.
        A: `[r, K]`; the product with A and B runs in their dtype.
        B: `[N, r]`, of A's dtype.
        compute: of the product with W. Under autocast its dtype takes the place of this one and of A's.

    Returns:
        `[..., N]` in x's dtype. Differentiable in x, bias, A and B.
    """
    require_native()
    device, low = x.device.type, A.dtype
    if torch.is_autocast_enabled(device):
        compute = low = torch.get_autocast_dtype(device)
    return torch.ops.moka.nf4_lora.default(x, *base, bias, A, B, scale, compute, low)


def linear(x: Tensor, base: tuple, bias: Tensor | None, mixture: tuple, path: str) -> Tensor:
    """What the functions above share, with the operators' own arguments.

    Args:
        x, bias, path: as for `moka_linear`.
        base: `NF4Weight.op_args()`, `(weight,)` or `()`.
        mixture: A, B, alpha and flat shapes, or `NO_MIXTURE`.
    """
    require_native()
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if len(base) > 1:
        if path == "auto" and is_low_rank(x, base, mixture):
            return nf4_lora(x, base, bias, *as_lora(mixture), 1.0, x.dtype)
        return torch.ops.moka.nf4_linear.default(x, *base, bias, *mixture, False, path)
    if base and base[0].requires_grad:
        raise ConfigError(
            "weight: the base of an adapted layer gets no gradient; call weight.requires_grad_(False)"
        )
    return torch.ops.moka.dense_linear.default(x, *(base or (None,)), bias, *mixture, dense_path(path, base))


def dense_path(path: str, base: tuple) -> str:
    """`path`, but "factored" for "auto" where only the tensor itself knows how to multiply by the weight.

    Subclasses of other libraries, such as torchao's quantized weights, call themselves floating point.
    """
    if path == "auto" and base and type(base[0]) not in (Tensor, nn.Parameter):
        return "factored"
    return path


def is_low_rank(x: Tensor, base: tuple, mixture: tuple) -> bool:
    """Whether every component is a column times a row, `[N, 1] kron [1, K]`: a LoRA, which has its operation.

    In fp32 alone: that operation gives the gradients of A and B in the dtype of its products.

    Args:
        x, base, mixture: as for `linear`; whose sizes disagree is left to the operator that says so.
    """
    columns, rows, alpha, shapes = mixture
    if not shapes or any(t.dtype != torch.float32 for t in (x, columns, rows, alpha)):
        return False
    (N, K), r = base[-2:], len(shapes) // 5
    sizes = (columns.numel(), rows.numel(), alpha.numel(), x.shape[-1]) == (r * N, r * K, r, K)
    return sizes and tuple(shapes) == (N, 1, 1, K, 0) * r


def as_lora(mixture: tuple) -> tuple[Tensor, Tensor]:
    """A `[r, K]` and B `[N, r]` with B A = sum_i alpha_i A_i kron B_i, for such components."""
    columns, rows, alpha, _ = mixture
    r = len(alpha)
    return rows.view(r, -1), (columns.view(r, -1) * alpha[:, None]).T

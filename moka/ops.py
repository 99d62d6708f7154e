"""Loads the compiled operators (`torch.ops.moka.*`) and describes their outputs to the compiler.

The schemas are in `csrc/registration.cpp`; what each operator computes is in `moka/reference.py`. Only
`moka/functional.py` and `moka/nf4.py` call the operators, after `require_native`, so that a missing extension
is reported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from .errors import NativeError

_load_error = _native.load()  # kept until an operator is used, so that `import moka` always works


def require_native() -> None:
    """Raises NativeError, with the command that rebuilds the extension, when the operators are not loaded."""
    if _load_error is not None:
        raise NativeError(str(_load_error)) from _load_error.__cause__


def built_with_cuda() -> bool:
    """Whether the extension, once `require_native` has passed, has kernels for GPUs."""
    from . import _C

    return bool(_C.build_info()["cuda_archs"])


def _register_fakes() -> None:
    """Output shapes and dtypes of each operator, for torch.compile and meta tensors."""

    def kron_sizes(shapes: Sequence[int]) -> tuple[int, int]:
        ma, na, mb, nb = shapes[:4]
        return ma * mb, na * nb

    @torch.library.register_fake("moka::nf4_quantize")
    def _(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        numel = w.numel()
        packed = w.new_empty(((numel + 1) // 2,), dtype=torch.uint8)
        return packed, w.new_empty(((numel + blocksize - 1) // blocksize,), dtype=torch.float32)

    @torch.library.register_fake("moka::nf4_dequantize")
    def _(packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, dtype, A, B, alpha, shapes):
        return packed.new_empty((N, K), dtype=dtype)

    @torch.library.register_fake("moka::nf4_linear")
    def _(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, A, B, alpha, shapes,
          transpose, path):  # fmt: skip
        return x.new_empty((*x.shape[:-1], K if transpose else N))

    @torch.library.register_fake("moka::nf4_linear_rows")
    def _(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, A, B, alpha, adapter,
          shapes):  # fmt: skip
        return x.new_empty((x.shape[0], N))

    @torch.library.register_fake("moka::nf4_linear_lora")
    def _(x, packed, absmax, absmax2, code2, offset, blocksize, blocksize2, N, K, bias, A, B, u, scale,
          transpose, dtype):  # fmt: skip
        return x.new_empty((*x.shape[:-1], K if transpose else N), dtype=dtype)

    @torch.library.register_fake("moka::lora_grad")
    def _(grad_y, x, A, B, u, scale, dtype_A, dtype_B):
        grad_A = A.new_empty((0,) if x is None else A.shape, dtype=dtype_A)
        grad_B = B.new_empty((0,) if u is None else B.shape, dtype=dtype_B)
        return grad_y.new_empty((grad_y.shape[0], A.shape[0])), grad_A, grad_B

    @torch.library.register_fake("moka::kron_add")
    def _(weight, A, B, alpha, shapes):
        return torch.empty_like(weight, memory_format=torch.contiguous_format)

    @torch.library.register_fake("moka::kron_mix")
    def _(x, A, B, alpha, shapes, transpose, add):
        N, K = kron_sizes(shapes)
        return x.new_empty((*x.shape[:-1], K if transpose else N))

    @torch.library.register_fake("moka::kron_mix_grad")
    def _(x, grad_y, A, B, alpha, shapes, need_A, need_B, need_alpha):
        grads = ((A, need_A), (B, need_B), (alpha, need_alpha))
        return tuple(t.new_empty(t.shape if need else (0,)) for t, need in grads)

    @torch.library.register_fake("moka::gate")
    def _(logits, scale):
        return logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))

    @torch.library.register_fake("moka::gate_grad")
    def _(alpha, grad_alpha, scale):
        return torch.empty_like(alpha)


if _load_error is None:
    _register_fakes()

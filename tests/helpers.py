"""How near is near enough: the comparison rules every numeric test uses.

A result is held against a float64 reference, computed from the same rounded inputs and the dequantized
weight:

1. *exact*: inputs for which no rounding happens (`integers`) must give `torch.equal` results;
2. *norms*: relF = |y - r|_F / |r|_F and maxN = max|y - r| / max|r| stay under `LIMITS`;
3. *ratio*: the error is at most twice that of the plain PyTorch formula in the same dtype, plus one unit
   roundoff. Not for fewer than `FEW` elements, where the plain formula may be exact by luck, nor in fp64,
   where the reference has that error itself.

Elementwise relative error is not used: under cancellation it is unbounded for correct code.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

#: the sets of kernels: one per instruction set of the CPU, and the GPU's
BACKENDS = ("scalar", "avx2", "avx512", pytest.param("cuda", marks=pytest.mark.cuda))

#: dtype -> (unit roundoff u, relF limit in u, maxN limit in u)
LIMITS = {
    torch.float64: (2.0**-53, 64.0, 128.0),
    torch.float32: (2.0**-24, 16.0, 32.0),
    torch.float16: (2.0**-11, 0.75, 2.0),
    torch.bfloat16: (2.0**-8, 0.75, 2.0),
}
#: relF averages over elements: below this many it is held to the limit of a single one
FEW = 32


def errors(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    """(relF, maxN) of `actual` against a float64 `reference`; infinite when `actual` is not finite."""
    difference = actual.detach().double() - reference
    if not difference.isfinite().all():
        return math.inf, math.inf
    if not reference.any():
        return (math.inf, math.inf) if difference.any() else (0.0, 0.0)
    return (
        (difference.norm() / reference.norm()).item(),
        (difference.abs().max() / reference.abs().max()).item(),
    )


def assert_close_by_rule(
    actual: Tensor,
    float64_reference: Tensor,
    same_dtype_eager: Tensor | None,
    dtype: torch.dtype,
    roundings: int = 1,
    reduces_tokens: bool = False,
) -> None:
    """Gates 2 and 3 of the module docstring.

    Args:
        actual: the kernel's result, in `dtype`.
        float64_reference: the same formula in float64.
        same_dtype_eager: the same formula in plain PyTorch, computed and returned in `dtype`; None leaves out
            the ratio, for random tiny shapes where PyTorch happens to sum in another, shorter chain.
        dtype: what `actual` must be; sets the limits.
        roundings: roundings to a 16-bit dtype on the kernel's path.
        reduces_tokens: a parameter gradient, summed over tokens; doubles the fp32 limits.

    Raises:
        AssertionError: wrong shape or dtype, a non-finite value, or an error above a limit.
    """
    expected = float64_reference.shape
    assert actual.shape == expected, f"shape {actual.shape}, expected {expected}"
    assert actual.dtype == dtype, f"dtype {actual.dtype}, expected {dtype}"
    if actual.numel() == 0:
        return
    u, *limits = LIMITS[dtype]
    if dtype in (torch.float16, torch.bfloat16):
        limits[0] *= math.sqrt(roundings)
    elif dtype == torch.float32 and reduces_tokens:
        limits = [2 * limit for limit in limits]
    few = actual.numel() < FEW
    if few:
        limits[0] = max(limits)
    got = errors(actual, float64_reference)
    for name, error, limit in zip(("relF", "maxN"), got, limits, strict=True):
        assert error <= limit * u, f"{name}: {error / u:.2f} u, limit {limit:.2f} u ({dtype})"
    if few or dtype == torch.float64 or same_dtype_eager is None:
        return
    for name, error, plain in zip(
        ("relF", "maxN"), got, errors(same_dtype_eager, float64_reference), strict=True
    ):
        assert error <= 2 * plain + u, (
            f"{name}: {error / u:.2f} u, plain PyTorch has {plain / u:.2f} u ({dtype})"
        )


def roundings(x: Tensor, path: str = "merged") -> int:
    """Roundings to 16 bits that a product of x goes through, the `roundings` of `assert_close_by_rule`.

    The CPU computes in fp32 and rounds once. The GPU also rounds the dense weight that it multiplies by and,
    on the factored path (which "auto" may take), the base's product before it adds the mixture's.
    """
    if not x.is_cuda:
        return 1
    return 2 if path == "merged" else 3


@contextlib.contextmanager
def running_on(backend: str):
    """Runs what is inside by one of `BACKENDS`, or by the best of the CPU ("auto"); skips what is missing."""
    if backend == "cuda":
        with torch.device("cuda"):
            yield
        return
    from moka import _C  # here, so that the tests of a missing extension can be collected

    if not _C.set_cpu_isa(backend):
        pytest.skip(f"this CPU has no {backend}")
    yield
    _C.set_cpu_isa("auto")


def integers(*shape: int, low: int = -2, high: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random integers in [low, high] for the exact gate; the caller keeps sums within the significand."""
    return torch.randint(low, high + 1, shape).to(dtype)


def shifted(*sizes: int) -> Tensor:
    """Random numbers around 1: sums do not cancel, so that limits on the norm of a few mean something."""
    return torch.randn(*sizes) + 1

"""Factor shapes of a mixture, and how they are chosen for a layer of shape `[N, K]`.

A component `A [ma, na] kron B [mb, nb]` has `ma*mb = N` and `na*nb = K`, hence `ma*na + mb*nb >= 2 sqrt(N K)`
parameters, with equality when both factors hold `sqrt(N K)` entries ("balanced"; MoKA, arXiv 2508.03527).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .errors import ConfigError

#: The paper's five shapes, each used twice at r = 10: rows per column of A relative to the layer's own (B:
#: inverse).
ASPECTS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
#: What is left of r after full sets of five: from the most even shape outwards.
ASPECTS_LEFT = (1.0, 1 / 4, 4.0, 1 / 16, 16.0)
KINDS = ("balanced", "identity")


class KronShape(NamedTuple):
    """One component `A [ma, na] kron B [mb, nb]`; `identity` names a factor that is the identity and not
    stored.

    identity: 0 neither, 1 `A` (then `ma == na`), 2 `B` (then `mb == nb`).
    """

    ma: int
    na: int
    mb: int
    nb: int
    identity: int = 0

    @property
    def a_numel(self) -> int:
        """Entries of A that are stored and trained."""
        return 0 if self.identity == 1 else self.ma * self.na

    @property
    def b_numel(self) -> int:
        """Entries of B that are stored and trained."""
        return 0 if self.identity == 2 else self.mb * self.nb

    @property
    def macs(self) -> int:
        """Multiply-adds per token of the factored path, in the cheaper order."""
        if self.identity == 1:
            return self.ma * self.mb * self.nb
        if self.identity == 2:
            return self.mb * self.ma * self.na
        return min(self.ma * self.nb * (self.na + self.mb), self.na * self.mb * (self.nb + self.ma))

    def __str__(self) -> str:
        """For example `16x256*256x16`; an identity factor reads `I64`."""
        left = f"I{self.ma}" if self.identity == 1 else f"{self.ma}x{self.na}"
        right = f"I{self.mb}" if self.identity == 2 else f"{self.mb}x{self.nb}"
        return f"{left}*{right}"


def flatten_shapes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The five integers per component that the operators take."""
    return [field for shape in shapes for field in (shape if len(shape) == 5 else KronShape(*shape))]


def plan_shapes(
    N: int,
    K: int,
    r: int = 10,
    kind: str | Sequence[Sequence[int]] = "balanced",
    strict: bool = True,
    module: str = "layer",
) -> tuple[KronShape, ...]:
    """The component shapes of one layer.

    "balanced": five shapes of about `sqrt(N K)` entries per factor, in full sets of five; what is left of r
    goes to the most even shapes first (`ASPECTS_LEFT`). "identity" (MoKA_s): one factor of each component is
    an identity, alternately A and B, of different sizes, since components with equal identities would
    collapse into one.

    Args:
        N, K: output and input features.
        r: components; an explicit list sets its own number.
        kind: "balanced", "identity", or a list of `(ma, na, mb, nb)` or `(ma, na, mb, nb, identity)`.
        strict: refuse a prime dimension; otherwise it gets a `1 x p` factor.
        module: names the layer in errors.

    Raises:
        ConfigError: a product differs from `N x K`, a dimension is prime (strict), or too few identity sizes
            exist.

    Example:
        >>> [str(s) for s in plan_shapes(4096, 4096, r=2)]
        ['64x64*64x64', '32x128*128x32']
    """
    if not isinstance(kind, str):
        return tuple(check_shape(N, K, shape, module) for shape in kind)
    if kind == "identity":
        return _identity_shapes(N, K, r, module)
    if strict:
        for name, size in (("out_features", N), ("in_features", K)):
            if is_prime(size):
                raise ConfigError(
                    f"{module}: {name} is {size}, a prime, so a factor must be 1 x {size}; expected a size "
                    f"with divisors. Exclude the module, give explicit shapes, or accept it with strict=False"
                )
    full, left = divmod(r, len(ASPECTS))
    return tuple(_balanced_shape(N, K, aspect) for aspect in ASPECTS * full + ASPECTS_LEFT[:left])


def explicit_shapes(shapes: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[tuple[int, ...]]]:
    """Path -> components as `MokaConfig.shapes` takes them, the longest path first: the first pattern that
    matches the end of a path counts."""
    longest_first = sorted(shapes, key=len, reverse=True)
    return {path: [tuple(shape) for shape in shapes[path]] for path in longest_first}


def check_shape(N: int, K: int, shape: Sequence[int], module: str) -> KronShape:
    """The explicit `shape` as a KronShape, if it fits `[N, K]`.

    Raises:
        ConfigError: the products are not N and K, or an identity factor is not square.
    """
    s = KronShape(*shape)
    if (s.ma * s.mb, s.na * s.nb) != (N, K):
        raise ConfigError(
            f"{module}: shape {tuple(shape)} has the product {s.ma * s.mb} x {s.na * s.nb} (ma*mb x na*nb), "
            f"expected {N} x {K} (out x in features)"
        )
    if (s.identity == 1 and s.ma != s.na) or (s.identity == 2 and s.mb != s.nb):
        raise ConfigError(f"{module}: shape {tuple(shape)}: an identity factor must be square")
    return s


def is_prime(n: int) -> bool:
    """Whether the only divisors are 1 and n; 1, 2 and 3 do not count, being as even as they can be."""
    return n > 3 and len(divisors(n)) == 2


@lru_cache(maxsize=256)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


@lru_cache(maxsize=1024)
def _balanced_shape(N: int, K: int, aspect: float) -> KronShape:
    """The shape nearest to `ma*na = sqrt(N K)` and, with less weight, `ma/na = aspect sqrt(N/K)`, in logs."""
    entries, ratio = math.sqrt(N * K), aspect * math.sqrt(N / K)

    def cost(sizes: tuple[int, int]) -> float:
        ma, na = sizes
        return math.log(ma * na / entries) ** 2 + 0.25 * math.log(ma / na / ratio) ** 2

    ma, na = min(((ma, na) for ma in divisors(N) for na in divisors(K)), key=cost)
    return KronShape(ma, na, N // ma, K // na)


def _identity_shapes(N: int, K: int, r: int, module: str) -> tuple[KronShape, ...]:
    sizes = [p for p in divisors(math.gcd(N, K)) if 1 < p < max(N, K)]
    if r > 2 * len(sizes):
        raise ConfigError(
            f"{module}: shapes='identity' has {2 * len(sizes)} distinct components for {N} x {K} (identity "
            f"sizes {sizes}, on either side), got r={r}; lower r for this module with r_pattern, or use "
            f"shapes='balanced'"
        )
    # An identity of size p leaves a factor of N*K/p^2 entries, which is sqrt(N*K) at p = (N*K)^(1/4). One
    # octave of sizes per pair of components, from twice that size outwards, costs about half of what balanced
    # shapes do.
    octaves = sorted(range(-len(sizes), len(sizes) + 1), key=abs)
    chosen = []
    for octave in octaves[: (r + 1) // 2]:
        target = 2 ** (octave + 1) * (N * K) ** 0.25
        nearest = min(sizes, key=lambda p: (round(abs(math.log2(p / target)), 6), p))
        sizes.remove(nearest)
        chosen.append(nearest)
    both_sides = ((p, side) for p in chosen for side in (1, 2))
    return tuple(
        KronShape(p, p, N // p, K // p, 1) if side == 1 else KronShape(N // p, K // p, p, p, 2)
        for p, side in (next(both_sides) for _ in range(r))
    )

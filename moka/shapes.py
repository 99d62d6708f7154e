"""The components of a mixture: their sizes, and what their factors are made of (`moka/rules.py` chooses)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from . import factors
from .errors import ConfigError


class KronShape(NamedTuple):
    """One component `A [ma, na] kron B [mb, nb]`.

    identity: which factor is the identity, and not stored: 0 neither, 1 `A` (then `ma == na`), 2 `B` (then
    `mb == nb`).
    a, b: what the factors are made of (`moka/factors.py`).
    """

    ma: int
    na: int
    mb: int
    nb: int
    identity: int = 0
    a: str = "dense"
    b: str = "dense"

    @property
    def a_numel(self) -> int:
        """Parameters of A."""
        return factors.numel(*self.side("A"))

    @property
    def b_numel(self) -> int:
        """Parameters of B."""
        return factors.numel(*self.side("B"))

    @property
    def numel(self) -> int:
        """Parameters of both."""
        return self.a_numel + self.b_numel

    def side(self, which: str) -> tuple[str, int, int]:
        """Kind and sizes of the factor "A" or "B"."""
        if which == "A":
            return ("identity" if self.identity == 1 else self.a), self.ma, self.na
        return ("identity" if self.identity == 2 else self.b), self.mb, self.nb

    @property
    def expanded(self) -> KronShape:
        """The component with its factors made dense, as the operators take it."""
        return KronShape(*self[:5])

    @property
    def fields(self) -> tuple:
        """The fields without those at the end that say "dense", as configurations and files hold them."""
        return tuple(self) if (self.a, self.b) != ("dense", "dense") else tuple(self[:5])

    @property
    def macs(self) -> int:
        """Multiply-adds per token of the factored path, in the cheaper order."""
        if self.identity == 1:
            return self.ma * self.mb * self.nb
        if self.identity == 2:
            return self.mb * self.ma * self.na
        return min(self.ma * self.nb * (self.na + self.mb), self.na * self.mb * (self.nb + self.ma))

    def __str__(self) -> str:
        """For example `16x256*256x16`; an identity factor reads `I64`, and other kinds `16x16 ones`."""
        left = f"I{self.ma}" if self.identity == 1 else f"{self.ma}x{self.na}"
        right = f"I{self.mb}" if self.identity == 2 else f"{self.mb}x{self.nb}"
        kinds = [f" {kind}" if kind != "dense" else "" for kind in (self.a, self.b)]
        return f"{left}{kinds[0]}*{right}{kinds[1]}"


def split_flat(A: Tensor, B: Tensor, shapes: Sequence[KronShape]) -> list[tuple[Tensor, Tensor]]:
    """Flat factors, or what has their sizes, by component; an identity has no entries."""
    return list(zip(A.split([s.a_numel for s in shapes]), B.split([s.b_numel for s in shapes]), strict=True))


def flatten_shapes(shapes: Sequence[Sequence[Any]]) -> list[int]:
    """The five integers per component that the operators take."""
    return [size for shape in shapes for size in (*shape, 0)[:5]]  # 0: no identity, where it is left out


def explicit_shapes(shapes: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, list[tuple]]:
    """Path -> components as `MokaConfig.shapes` takes them, the longest path first: the first pattern that
    matches the end of a path counts."""
    longest_first = sorted(shapes, key=len, reverse=True)
    return {path: [KronShape(*shape).fields for shape in shapes[path]] for path in longest_first}


def check_shape(N: int, K: int, shape: Sequence[Any], module: str) -> KronShape:
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
    if "identity" in (s.a, s.b):
        raise ConfigError(
            f"{module}: shape {tuple(shape)}: an identity is named by its number, identity=1 or 2"
        )
    try:
        factors.check(*s.side("A"))
        factors.check(*s.side("B"))
    except ConfigError as error:
        raise ConfigError(f"{module}: {error}") from error
    return s


def is_prime(n: int) -> bool:
    """Whether the only divisors are 1 and n; 1, 2 and 3 do not count, being as even as they can be."""
    return n > 3 and len(divisors(n)) == 2


@lru_cache(maxsize=256)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))

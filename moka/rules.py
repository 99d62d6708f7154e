"""Rules: how the components of a layer of shape `[N, K]` are chosen.

A component `A [ma, na] kron B [mb, nb]` has `ma*mb = N` and `na*nb = K`, hence `ma*na + mb*nb >= 2 sqrt(N K)`
parameters, with equality when both factors hold `sqrt(N K)` entries ("balanced"; MoKA, arXiv 2508.03527).

A rule is written as a name, or a name and numbers: `balanced`, `lora`, `gralora(4,32)`. The published
siblings are presets of `moka.preset`, which name their rules and sources.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from .errors import ConfigError
from .shapes import KronShape, check_shape, divisors, is_prime

#: The paper's five shapes, each used twice at r = 10: rows per column of A relative to the layer's own (B:
#: inverse).
ASPECTS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
#: What is left of r after full sets of five: from the most even shape outwards.
ASPECTS_LEFT = (1.0, 1 / 4, 4.0, 1 / 16, 16.0)
#: In layers of multiples of it, the sides of B are powers of two, and A takes the odd part of 3584 = 512 * 7:
#: all B's begin anew together after few rows and columns, as the GPU's fast kernels need (build_mixture.cuh).
PERIOD = 128
MOST_FOR_PERIOD = 1.1  # times the parameters of the nearest shapes
MAX_R = 1024  # components
RULE = re.compile(r"([a-z0-9_]+)(?:\((\d{1,9}(?:,\d{1,9})*)\))?")
Shapes = tuple[KronShape, ...]


def plan_shapes(
    N: int,
    K: int,
    r: int = 10,
    kind: str | Sequence[Sequence[Any]] = "balanced",
    strict: bool = True,
    module: str = "layer",
) -> Shapes:
    """The components of one layer.

    "balanced": five shapes of about `sqrt(N K)` entries per factor, in full sets of five; what is left of r
    goes to the most even shapes first (`ASPECTS_LEFT`). In layers of multiples of 128 the sides of B are
    powers of two, which GPUs are fast with, unless that takes 10% more parameters. "identity" (MoKA_s): one
    factor of each component is an identity, alternately A and B, of different sizes, since components with
    equal identities would collapse into one.

    Args:
        N, K: output and input features.
        r: components; an explicit list sets its own number.
        kind: a rule, or a list of `(ma, na, mb, nb)` with, if need be, the other fields of `KronShape`.
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
    rule, arguments = parse_rule("shapes", kind)
    if strict and rule in EVEN:
        for name, size in (("out_features", N), ("in_features", K)):
            if is_prime(size):
                raise ConfigError(
                    f"{module}: {name} is {size}, a prime, so a factor must be 1 x {size}; expected a size "
                    f"with divisors. Exclude the module, give explicit shapes, or accept it with strict=False"
                )
    try:
        shapes = RULES[rule](N, K, r, *arguments)
        if len(shapes) > MAX_R:
            raise ConfigError(f"{len(shapes)} components, expected at most {MAX_R}")
        return tuple(check_shape(N, K, shape, module) for shape in shapes)
    except ConfigError as error:
        raise ConfigError(f"{module}: shapes={kind!r}: {error}".replace(f" {module}:", "", 1)) from error


def parse_rule(field: str, text: str) -> tuple[str, tuple[int, ...]]:
    """Name and arguments of a rule.

    Raises:
        ConfigError: unknown, or too many or too few arguments.
    """
    found = RULE.fullmatch(text)
    name = found[1] if found else ""
    arguments = tuple(int(n) for n in found[2].split(",")) if found and found[2] else ()
    if name not in RULES:
        raise ConfigError(f"{field}: got {text[:80]!r}, expected one of {tuple(RULES)} or a list of shapes")
    parameters = list(inspect.signature(RULES[name]).parameters.values())[3:]
    needed = sum(p.default is p.empty for p in parameters)
    if not needed <= len(arguments) <= len(parameters):
        names = ", ".join(p.name for p in parameters)
        raise ConfigError(f"{field}: got {text[:80]!r}, expected the rule {name} with the numbers ({names})")
    return name, arguments


def _balanced(N: int, K: int, r: int) -> Shapes:
    full, left = divmod(r, len(ASPECTS))
    aspects = ASPECTS * full + ASPECTS_LEFT[:left]
    nearest = tuple(_balanced_shape(N, K, aspect) for aspect in aspects)
    if N % PERIOD or K % PERIOD:
        return nearest
    periodic = tuple(_balanced_shape(N, K, aspect, True) for aspect in aspects)
    most = MOST_FOR_PERIOD * sum(shape.numel for shape in nearest)
    return periodic if sum(shape.numel for shape in periodic) <= most else nearest


@lru_cache(maxsize=1024)
def _balanced_shape(N: int, K: int, aspect: float, periodic: bool = False) -> KronShape:
    """The shape nearest to `ma*na = sqrt(N K)` and, with less weight, `ma/na = aspect sqrt(N/K)`, in logs.

    periodic: of those whose B has powers of two as sides.
    """
    entries, ratio = math.sqrt(N * K), aspect * math.sqrt(N / K)

    def cost(sizes: tuple[int, int]) -> float:
        ma, na = sizes
        return math.log(ma * na / entries) ** 2 + 0.25 * math.log(ma / na / ratio) ** 2

    def sides(size: int) -> list[int]:
        return [d for d in divisors(size) if not periodic or (size // d).bit_count() == 1]

    ma, na = min(((ma, na) for ma in sides(N) for na in sides(K)), key=cost)
    return KronShape(ma, na, N // ma, K // na)


def _identity_shapes(N: int, K: int, r: int) -> tuple[KronShape, ...]:
    sizes = [p for p in divisors(math.gcd(N, K)) if 1 < p < max(N, K)]
    if r > 2 * len(sizes):
        raise ConfigError(
            f"it has {2 * len(sizes)} distinct components for {N} x {K} (identity "
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


def _even(N: int, K: int, r: int) -> Shapes:
    return (_balanced_shape(N, K, 1.0),) * r


def _lora(N: int, K: int, r: int) -> Shapes:
    return (KronShape(N, 1, 1, K),) * r


def _kron_lora(N: int, K: int, r: int, size: int = 16, rank: int = 8) -> Shapes:
    ma, na = _at_most(N, size), _at_most(K, size)
    return (KronShape(ma, na, N // ma, K // na, b=f"lowrank({rank})"),) * r


def _lokr(N: int, K: int, r: int, factor: int = 0, rank: int = 0) -> Shapes:
    ma, na = _lycoris_factor(N, factor), _lycoris_factor(K, factor)
    low = 0 < rank < max(N // ma, K // na) / 2  # as LyCORIS and peft decide
    return (KronShape(ma, na, N // ma, K // na, b=f"lowrank({rank})" if low else "dense"),)


def _compacter(N: int, K: int, r: int, n: int = 4, rank: int = 1) -> Shapes:
    return (_blocks(N, K, n, n, b=f"lowrank({rank})"),) * n


def _gralora(N: int, K: int, r: int, n: int = 2, rank: int = 32) -> Shapes:
    if rank % n or not rank:
        raise ConfigError(f"rank {rank} must be a multiple of the {n} blocks of a side")
    low = f"lowrank({rank // n})"
    return tuple(_blocks(N, K, n, n, f"selector({i},{j})", low) for i in range(n) for j in range(n))


def _melora(N: int, K: int, r: int, n: int = 2, rank: int = 8) -> Shapes:
    return tuple(_blocks(N, K, n, n, f"selector({i},{i})", f"lowrank({rank})") for i in range(n))


def _melora_shared(N: int, K: int, r: int, n: int = 2, rank: int = 8) -> Shapes:
    return (_blocks(N, K, n, n, b=f"lowrank({rank})")._replace(identity=1),)


def _mora(N: int, K: int, r: int, rank: int = 8) -> Shapes:
    size = max(d for d in divisors(math.gcd(N, K)) if d * d <= rank * (N + K) or d == 1)
    return (KronShape(N // size, K // size, size, size, a="ones"),)


def _bone(N: int, K: int, r: int, rank: int = 64) -> Shapes:
    if rank < 1 or K % rank:
        raise ConfigError(
            f"r is {rank}, which does not divide the layer's {K} inputs; expected one of {divisors(K)}"
        )
    return (_blocks(N, K, 1, K // rank, "ones"),)


def _c3a(N: int, K: int, r: int, block: int) -> Shapes:
    return (KronShape(1, 1, N, K, a="ones", b=f"circulant({block})"),)


def _kron_vera(N: int, K: int, r: int) -> Shapes:
    even = _even(N, K, r)
    return tuple(s._replace(a=f"random({i},0)", b=f"random({i},1)") for i, s in enumerate(even))


def _kradapter(N: int, K: int, r: int) -> Shapes:
    # the longer side is the one of products
    kind, size = ("khatri_rao", N) if N > K else ("khatri_rao_rows", K)
    return (KronShape(1, 1, N, K, a="ones", b=f"{kind}({size // _at_most(size, math.isqrt(min(N, K)))})"),)


def _cdka(N: int, K: int, r: int, r1: int = 2, r2: int = 8) -> Shapes:
    _need_divisor(r1, N)
    _need_divisor(r2, K)
    return (KronShape(N // r1, r2, r1, K // r2),) * r


def _qa(N: int, K: int, r: int, group: int = 64) -> Shapes:
    _need_divisor(group, K)
    even = _balanced_shape(N, K // group, 1.0)
    return (even._replace(nb=even.nb * group, b=f"repeat({group})"),) * r


def _blocks(N: int, K: int, ma: int, na: int, a: str = "dense", b: str = "dense") -> KronShape:
    _need_divisor(ma, N)
    _need_divisor(na, K)
    return KronShape(ma, na, N // ma, K // na, a=a, b=b)


def _need_divisor(n: int, *sizes: int) -> None:
    for size in sizes:
        if n < 1 or size % n:
            raise ConfigError(f"{n} does not divide {size}; expected one of {divisors(size)}")


def _at_most(n: int, limit: int) -> int:
    return max(d for d in divisors(n) if d <= max(limit, 1))


def _lycoris_factor(n: int, factor: int) -> int:
    """The smaller part of n: `factor` if that divides it, else the largest one up to it and to sqrt(n), as
    LyCORIS' `factorization` has it; 0 for the most even split."""
    if factor and n % factor == 0:
        return min(factor, n // factor)
    return _at_most(n, min(factor or n, math.isqrt(n)))


#: Name -> function of N, K, r and the rule's own numbers.
RULES: dict[str, Callable[..., Any]] = {
    "balanced": _balanced,
    "identity": _identity_shapes,
    "even": _even,
    "lora": _lora,
    "kron_lora": _kron_lora,
    "lokr": _lokr,
    "compacter": _compacter,
    "gralora": _gralora,
    "melora": _melora,
    "melora_shared": _melora_shared,
    "mora": _mora,
    "bone": _bone,
    "c3a": _c3a,
    "kron_vera": _kron_vera,
    "kradapter": _kradapter,
    "cdka": _cdka,
    "qa": _qa,
}
#: Rules that split both dimensions as evenly as they can.
EVEN = ("balanced", "even", "kron_vera")

"""What a factor is made of: each kind is a small rule that yields a dense matrix `[rows, cols]`.

The kernels know dense and identity factors alone. Every other kind is expanded to a dense matrix by the
functions below, in plain PyTorch, so that autograd carries gradients from the matrix to its parameters. A
kind is written as `name(arguments)`:

    dense                all entries
    identity             the identity, square; the kernels know it, so it is not expanded
    ones                 1 everywhere
    selector(i,j)        1 at row i and column j, else 0
    shift(j)             the cyclic shift (S x)_p = x_(p-j), square
    lowrank(r)           U V with U [rows, r], V [r, cols]
    repeat(q)            each column of a [rows, cols/q] matrix q times: M kron 1_(1 x q)
    circulant(b)         blocks b x b, each circulant: W[I, J, (q-p) mod b] / cols at row (I,p), column (J,q)
    khatri_rao(d)        U[i, j] V[p, j] at row (i, p) and column j, with U [d, cols], V [rows/d, cols]
    khatri_rao_rows(d)   U[i, j] V[i, q] at row i and column (j, q), with U [rows, d], V [rows, cols/d]
    random(i,s)          the i-th frozen random matrix of seed s, its rows times a vector shared by all
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

KIND = re.compile(r"([a-z_]+)(?:\((\d{1,9}(?:,\d{1,9})*)\))?")
Sizes = tuple[tuple[int, int], ...]


class Kind(NamedTuple):
    """One kind of factor.

    Attributes:
        parts: (rows, cols, *arguments) -> the sizes of the matrices that are its parameters; empty for a
            constant. A start at zero sets the first of them to zero.
        build: (parts, each `[factors, ...]`; rows; cols; arguments of each factor; a tensor whose dtype and
            device to use) -> `[factors, rows, cols]`.
        arguments: how many numbers it takes.
        fits: (rows, cols, *arguments) -> whether they make sense.
    """

    parts: Callable[..., Sizes]
    build: Callable[..., Tensor]
    arguments: int = 0
    fits: Callable[..., bool] = lambda *sizes: True


class Run(NamedTuple):
    """Factors of one kind and size that follow one another on one side of a mixture."""

    kind: str
    rows: int
    cols: int
    arguments: tuple[tuple[int, ...], ...]  # of each factor
    parts: Sizes
    numel: int  # parameters of all of them together


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and arguments of a kind.

    Raises:
        ConfigError: unknown, or another number of arguments.
    """
    found = KIND.fullmatch(text)
    name = found[1] if found else ""
    arguments = tuple(int(n) for n in found[2].split(",")) if found and found[2] else ()
    if name not in KINDS or len(arguments) != KINDS[name].arguments:
        known = [f"{n}({','.join('ij'[: k.arguments])})" if k.arguments else n for n, k in KINDS.items()]
        raise ConfigError(f"factor: got {text[:80]!r}, expected one of {known}")
    return name, arguments


def check(text: str, rows: int, cols: int) -> None:
    """Whether a kind can make a factor of this size.

    Raises:
        ConfigError: it cannot, or the kind is unknown.
    """
    name, arguments = parse(text)
    if not KINDS[name].fits(rows, cols, *arguments):
        rule = "its sizes or arguments do not divide"
        if name == "lowrank":
            rule = f"its rank must be at most {max(rows, cols)}; choose a smaller one or larger factors"
        raise ConfigError(f"factor: {text} cannot be {rows} x {cols}; {rule}")


def numel(text: str, rows: int, cols: int) -> int:
    """The number of parameters of a factor."""
    name, arguments = parse(text)
    return sum(p * q for p, q in KINDS[name].parts(rows, cols, *arguments))


def plan(factors: Sequence[tuple[str, int, int]]) -> tuple[Run, ...] | None:
    """How to expand the factors (kind, rows, cols) of one side; None if all are dense already."""
    factors = [factor for factor in factors if factor[0] != "identity"]
    if all(kind == "dense" for kind, _, _ in factors):
        return None
    runs = []
    parsed = [(*parse(kind), rows, cols) for kind, rows, cols in factors]

    def alike(factor: tuple) -> tuple:  # the first random factor has parts for all
        name, arguments, rows, cols = factor
        return name, rows, cols, () if name == "random" else KINDS[name].parts(rows, cols, *arguments)

    for (name, rows, cols, _), group in itertools.groupby(parsed, alike):
        arguments = tuple(factor[1] for factor in group)
        sizes = [KINDS[name].parts(rows, cols, *a) for a in arguments]
        count = sum(p * q for parts in sizes for p, q in parts)
        runs.append(Run(name, rows, cols, arguments, sizes[0], count))
    return tuple(runs)


def expand(flat: Tensor, runs: Sequence[Run] | None) -> Tensor:
    """Parameters of one side `[n]` -> its dense factors, row-major and concatenated; differentiable."""
    if runs is None:
        return flat
    dense, start = [], 0
    for run in runs:
        own = flat[start : start + run.numel]
        dense.append(_build(run, own).flatten())
        start += run.numel
    return dense[0] if len(dense) == 1 else torch.cat(dense)


def split(flat: Tensor, run: Run) -> list[Tensor]:
    """The parts of a run's factors, each `[factors, ...]`: views of its parameters."""
    sizes = [p * q for p, q in run.parts]
    columns = flat.view(-1, sum(sizes)).split(sizes, dim=1)
    return [part.unflatten(1, size) for part, size in zip(columns, run.parts, strict=True)]


@torch.no_grad()
def init_(flat: Tensor, factor: tuple[str, int, int], zero: bool) -> None:
    """Fills the parameters of one factor (kind, rows, cols): U(-b, b) with b = 1/sqrt(columns) for each part,
    or zeros for the first part if `zero`; the vector of random factors starts at 1."""
    if not flat.numel():
        return
    name, arguments = parse(factor[0])
    sizes = KINDS[name].parts(*factor[1:], *arguments)
    for i, part in enumerate(flat.split([p * q for p, q in sizes])):
        if zero and i == 0:
            part.zero_()
        elif name == "random":
            part.fill_(1.0)
        else:
            bound = 1.0 / math.sqrt(sizes[i][1])
            part.uniform_(-bound, bound)


_constants: dict[tuple, Tensor] = {}


def _build(run: Run, flat: Tensor) -> Tensor:
    if not run.parts:
        return constant(*run[:4], flat.dtype, flat.device)
    return KINDS[run.kind].build(split(flat, run), run.rows, run.cols, run.arguments, flat)


def constant(
    kind: str,
    rows: int,
    cols: int,
    arguments: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The matrices `[factors, rows, cols]` of a kind without parameters, or random ones as drawn; all layers
    share one copy per device."""
    build = _random_entries if kind == "random" else KINDS[kind].build
    if torch.compiler.is_compiling():  # part of the graph
        return build([], rows, cols, arguments, torch.empty(0, dtype=dtype, device=device))
    key = kind, rows, cols, arguments, dtype, device
    if key not in _constants:
        with torch.inference_mode(False), torch.no_grad():  # training may use it later
            like = torch.empty(0, dtype=dtype, device=device)
            _constants[key] = build([], rows, cols, arguments, like)
    return _constants[key]


def _dense(parts: list[Tensor], *_: object) -> Tensor:
    return parts[0]


def _ones(parts: object, rows: int, cols: int, arguments: Sequence[object], like: Tensor) -> Tensor:
    return torch.ones(len(arguments), rows, cols, dtype=like.dtype, device=like.device)


def _selector(
    parts: object, rows: int, cols: int, arguments: Sequence[tuple[int, ...]], like: Tensor
) -> Tensor:
    flat = torch.tensor([i * cols + j for i, j in arguments], device=like.device)
    entries = torch.arange(rows * cols, device=like.device)
    return (entries == flat[:, None]).to(like.dtype).view(-1, rows, cols)


def _shift(parts: object, rows: int, cols: int, arguments: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    p = torch.arange(rows, device=like.device)
    j = torch.tensor([shift for (shift,) in arguments], device=like.device)
    return ((p[:, None] - p - j[:, None, None]) % rows == 0).to(like.dtype)


def _lowrank(parts: list[Tensor], *_: object) -> Tensor:
    return parts[0] @ parts[1]


def _repeat(parts: list[Tensor], rows: int, cols: int, *_: object) -> Tensor:
    return parts[0].repeat_interleave(cols // parts[0].shape[2], dim=2)


def _circulant(parts: list[Tensor], rows: int, cols: int, arguments: Sequence[tuple[int, ...]], *_) -> Tensor:
    b = arguments[0][0]
    p = torch.arange(b, device=parts[0].device)
    blocks = parts[0].view(-1, rows // b, cols // b, b)[..., (p - p[:, None]) % b]  # [g, I, J, p, q]
    return blocks.transpose(2, 3).reshape(-1, rows, cols) / cols


def _khatri_rao(parts: list[Tensor], rows: int, cols: int, *_: object) -> Tensor:
    return (parts[0][:, :, None] * parts[1][:, None]).view(-1, rows, cols)


def _khatri_rao_rows(parts: list[Tensor], rows: int, cols: int, *_: object) -> Tensor:
    return (parts[0][..., None] * parts[1][:, :, None]).view(-1, rows, cols)


def _random(
    parts: list[Tensor], rows: int, cols: int, arguments: tuple[tuple[int, ...], ...], like: Tensor
) -> Tensor:
    drawn = constant("random", rows, cols, arguments, like.dtype, like.device)
    return parts[0] * drawn  # [1, rows, 1] * [g, rows, cols]


def _random_entries(
    parts: object, rows: int, cols: int, arguments: Sequence[tuple[int, ...]], like: Tensor
) -> Tensor:
    """U(-b, b) with b = sqrt(3/cols), so of variance 1/cols: a hash of the entry's number, the same on every
    device and in every version, which a generator of PyTorch need not be."""
    numbers = torch.arange(rows * cols, device=like.device)
    start = torch.tensor([[i, seed] for i, seed in arguments], device=like.device)
    keys = _hash(_hash(start[:, :1]) + start[:, 1:])
    uniform = (_hash(keys ^ _hash(numbers)) >> 8).double() / 2.0**24
    return ((2.0 * uniform - 1.0) * math.sqrt(3.0 / cols)).to(like.dtype).view(-1, rows, cols)


def _hash(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers that mixes their bits ("lowbias32" of the hash-prospector project); in
    64 bits, where a product wraps and keeps its lower half."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _divides(*pairs: tuple[int, int]) -> bool:
    return all(d > 0 and n % d == 0 for d, n in pairs)


#: The kinds, in the order of the table above.
KINDS = {
    "dense": Kind(lambda r, c: ((r, c),), _dense),
    "identity": Kind(lambda r, c: (), _ones, 0, lambda r, c: r == c),
    "ones": Kind(lambda r, c: (), _ones),
    "selector": Kind(lambda r, c, i, j: (), _selector, 2, lambda r, c, i, j: i < r and j < c),
    "shift": Kind(lambda r, c, j: (), _shift, 1, lambda r, c, j: r == c),
    "lowrank": Kind(lambda r, c, k: ((r, k), (k, c)), _lowrank, 1, lambda r, c, k: 0 < k <= max(r, c)),
    "repeat": Kind(lambda r, c, q: ((r, c // q),), _repeat, 1, lambda r, c, q: _divides((q, c))),
    "circulant": Kind(
        lambda r, c, b: ((r // b, c),), _circulant, 1, lambda r, c, b: _divides((b, r), (b, c))
    ),
    "khatri_rao": Kind(
        lambda r, c, d: ((d, c), (r // d, c)), _khatri_rao, 1, lambda r, c, d: _divides((d, r))
    ),
    "khatri_rao_rows": Kind(
        lambda r, c, d: ((r, d), (r, c // d)), _khatri_rao_rows, 1, lambda r, c, d: _divides((d, c))
    ),
    # the first of them holds the vector for all
    "random": Kind(lambda r, c, i, seed: ((r, 1),) if i == 0 else (), _random, 2),
}

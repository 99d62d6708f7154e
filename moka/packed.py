"""Factors of an adapter file in 8 or 4 bits: integers, and the largest magnitude of each group of 64 entries.

    q = round(x Q / absmax),  x' = q absmax / Q,  |x - x'| <= absmax / (2 Q)          Q = 127 or 7

before x' is rounded to the dtype of the factors, which for int8 in bf16 can double the error.

A flat factor `moka_A [n]` is stored as two tensors:

    moka_A_int8 [n] I8, or moka_A_int4 [ceil(n/2)] U8: two's complement, the first of two in the high bits,
                        zero bits after an odd n
    moka_A_absmax [ceil(n/64)], in the dtype of the factors

absmax is the magnitude of an entry, so this dtype holds it exactly and that entry returns as it was: what was
loaded is stored as the same bytes again. Groups of 64, as in NF4: an fp32 absmax adds half a bit per entry
(8.5 and 4.5 in all), one per 32 a whole bit, and larger groups widen the steps of 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import algebra, gates
from .errors import CheckpointFormatError
from .factors import expand
from .layout import FACTORS, Layout
from .reference import split_factors

if TYPE_CHECKING:
    from .layers import MokaLinear

GROUP = 64
LARGEST = {"int8": 127, "int4": 7}  # Q; -128 and -8 are not used
Tensors = dict[str, Tensor]


def packed_layout(layout: Layout, scheme: str) -> Layout:
    """The tensors of a file with factors in 8 or 4 bits, from those of one without (`expected_tensors`)."""
    packed: Layout = {}
    for name, (shape, dtype) in layout.items():
        if name.endswith(FACTORS):
            count = shape[0]
            integers = ((count,), torch.int8) if scheme == "int8" else ((-(-count // 2),), torch.uint8)
            packed[f"{name}_{scheme}"] = integers
            packed[f"{name}_absmax"] = (-(-count // GROUP),), dtype
        else:
            packed[name] = shape, dtype
    return packed


def pack(tensors: Tensors, scheme: str) -> Tensors:
    """The tensors of `packed_layout` from those of an adapter, which must be finite."""
    packed: Tensors = {}
    for name, x in tensors.items():
        if name.endswith(FACTORS):
            groups = torch.nn.functional.pad(x.double(), (0, -len(x) % GROUP)).view(-1, GROUP)
            absmax = groups.abs().amax(1)
            steps = groups * LARGEST[scheme] / torch.where(absmax > 0, absmax, 1.0)[:, None]
            q = steps.round().to(torch.int8).flatten()[: len(x)]
            packed[f"{name}_{scheme}"] = q if scheme == "int8" else _join(q)
            packed[f"{name}_absmax"] = absmax.to(x.dtype)
        else:
            packed[name] = x
    return packed


def unpack(packed: Mapping[str, Tensor], layout: Layout, scheme: str, where: str) -> Tensors:
    """The tensors of `layout` from those of `packed_layout`.

    Raises:
        CheckpointFormatError: a negative absmax, an integer beyond Q, bits set after an odd n.
    """
    tensors: Tensors = {}
    for name, (shape, dtype) in layout.items():
        if not name.endswith(FACTORS):
            tensors[name] = packed[name]
            continue
        stored, absmax = packed[f"{name}_{scheme}"], packed[f"{name}_absmax"]
        q = stored if scheme == "int8" else _split(stored)
        wrong = {
            f"{name}_absmax holds a negative number": absmax < 0,
            f"{name}_{scheme} holds an integer below -{LARGEST[scheme]}": q < -LARGEST[scheme],
            f"{name}_{scheme} has bits set after its last entry": q[shape[0] :] != 0,
        }
        for reason, found in wrong.items():
            if found.any():
                raise CheckpointFormatError(f"{where}: {reason}; moka.save_adapter writes none")
        q, scale = q[: shape[0]].double(), absmax.double().repeat_interleave(GROUP)[: shape[0]]
        tensors[name] = (q * scale / LARGEST[scheme]).to(dtype)
    return tensors


def _join(q: Tensor) -> Tensor:
    """int8 `[n]` of 4 bits each -> uint8 `[ceil(n/2)]`."""
    high, low = (torch.nn.functional.pad(q, (0, len(q) % 2)).view(torch.uint8) & 15).view(-1, 2).unbind(1)
    return high << 4 | low


def _split(packed: Tensor) -> Tensor:
    """uint8 `[m]` -> int8 `[2 m]`."""
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()
    return (codes ^ 8).to(torch.int8) - 8


@torch.no_grad()
def update_error(layer: MokaLinear, name: str, exact: Tensors, stored: Tensors) -> float:
    """`|dW - dW'|_F / |dW|_F` of one layer, from the factors; 0 for an update of zero.

    The difference is `sum_i alpha_i ((A_i - A_i') kron B_i + A_i' kron (B_i - B_i'))`. A routed gate, which
    depends on the token, counts as uniform.

    Args:
        layer, name: for the shapes and the kind of gate of this adapter.
        exact, stored: "moka_A", "moka_B", "moka_gate" -> tensors, before and after; the gates are those of
            `exact`.
    """
    config, form = layer.configs[name], layer.forms[name]
    gate = None if config.gate in ("none", "routed") else exact["moka_gate"]
    empty, sides = torch.zeros(0, dtype=torch.float64), []  # no entries: all factors are identities
    for tensors in (exact, stored):
        A, B = (
            expand(tensors.get(side, empty).double(), runs)
            for side, runs in (("moka_A", form.a), ("moka_B", form.b))
        )
        if config.gate == "matrix" and gate is not None:
            A = gates.mix_factors(gate.double(), A)
        sides.append(split_factors(A, B, form.shapes))
    kind = "none" if gate is None else config.gate
    r, scale = len(layer.shapes[name]), layer.scaling[name]
    alpha = gates.scaled_gate(kind, gate, scale, r, config.gate_temperature, empty).double()
    update, rest = [], []
    for a, (A, B), (A_, B_) in zip(alpha, *sides, strict=True):
        update.append((a * A, B))
        rest += [(a * (A - A_), B), (a * A_, B - B_)]
    norm = algebra.norm(update)
    return (algebra.norm(rest) / norm).item() if norm else 0.0

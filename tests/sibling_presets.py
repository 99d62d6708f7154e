"""How a preset's flat parameters are the tensors of its reference (`sibling_references.py`).

Parameters of one side lie one component after the other, those of a low-rank factor U, then V. Nothing here
expands a factor: what is tested is that moka's expansion of the parameters is the reference's update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import sibling_references as ref
import torch
from sibling_base import Sibling
from torch import Tensor, nn

import moka
from moka.inject import adapter_layers
from moka.layers import MokaLinear

Mapped = tuple[Sibling, dict[str, Tensor]]

#: label -> (preset, options, N, K). Scales over r are sums of powers of two: alpha is fp32 for gate="none"
CASES: dict[str, tuple[str, dict, int, int]] = {
    "moka": ("moka", {"r": 7}, 32, 48),
    "moka-s": ("moka-s", {"r": 4}, 32, 48),
    "krona": ("krona", {"alpha": 0.5}, 32, 48),
    "lora": ("lora", {"r": 4}, 32, 48),
    "rslora": ("rslora", {"r": 4}, 32, 48),
    "kron-lora": ("kron-lora", {"size": 4, "rank": 2}, 32, 48),
    "lokr": ("lokr", {"rank": 2}, 32, 48),
    "lokr-factor": ("lokr", {"rank": 2, "factor": 5}, 24, 36),
    "lokr-factor-divides": ("lokr", {"rank": 2, "factor": 4}, 24, 36),
    "lokr-full": ("lokr", {"rank": 4, "alpha": 2.0}, 32, 48),
    "soka": ("soka", {"r": 3}, 32, 48),
    "dota": ("dota", {"r": 3}, 32, 48),
    "cdka": ("cdka", {}, 32, 48),
    "cdka-tall": ("cdka", {"r": 2, "r1": 3, "r2": 4}, 48, 32),
    "compacter": ("compacter", {"n": 4, "rank": 2}, 32, 48),
    "gralora": ("gralora", {"r": 8}, 32, 48),
    "gralora-4": ("gralora", {"r": 8, "blocks": 4, "alpha": 2.0}, 48, 32),
    "melora": ("melora", {"blocks": 4, "rank": 2}, 32, 48),
    "melora-shared": ("melora-shared", {"blocks": 4, "rank": 2}, 32, 48),
    "mora": ("mora", {"rank": 1}, 32, 48),
    "bone": ("bone", {"r": 4}, 32, 48),
    "c3a": ("c3a", {"block": 4}, 32, 48),
    "c3a-tall": ("c3a", {"block": 8}, 48, 32),
    "kradapter": ("kradapter", {}, 16, 48),
    "kradapter-tall": ("kradapter", {}, 48, 16),
    "kron-vera": ("kron-vera", {"r": 3}, 32, 48),
    "lora-xs": ("lora-xs", {"r": 3}, 32, 48),
    "moka-xs": ("moka-xs", {"r": 3}, 32, 48),
    "qa-moka": ("qa-moka", {"r": 3, "group": 4}, 32, 48),
}  # fmt: skip


def layer_of(label: str, dtype: torch.dtype = torch.float64) -> MokaLinear:
    """A layer with the preset of a case, its parameters random and of `dtype`."""
    name, options, N, K = CASES[label]
    model = nn.Sequential(nn.Linear(K, N)).to(dtype)
    moka.inject(model, moka.preset(name, target_modules=["0"], **options))
    layer = adapter_layers(model)["0"]
    for table in layer.tables():
        for key, old in table.items():
            table[key] = nn.Parameter(torch.randn_like(old, dtype=dtype), old.requires_grad)
    return layer


def mapped(label: str, layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor | None) -> Mapped:
    """The reference of a case, and its tensors as differentiable functions of the layer's parameters."""
    name, _, N, K = CASES[label]
    options = {**moka.presets()[name].options, **CASES[label][1]}
    return MAPS[name](options, layer, A, B, gate, N, K)


def cut(flat: Tensor, sizes: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """The matrices of these sizes that lie one after the other."""
    sizes = list(sizes)
    parts = flat.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def sides(layer: MokaLinear, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """A [r, a, b] and B [r, c, d] of components of one shape, a and b."""
    first = layer.shapes["default"][0]
    r = len(layer.shapes["default"])
    return A.view(r, first.ma, first.na), B.view(r, first.mb, -1), first.ma, first.na


def _moka(o, layer, A, B, gate, N, K):
    shapes = layer.shapes["default"]
    parts = {f"A{i}": x for i, x in enumerate(cut(A, [(s.ma, s.na) for s in shapes]))}
    parts |= {f"B{i}": x for i, x in enumerate(cut(B, [(s.mb, s.nb) for s in shapes]))}
    return ref.MoKA(tuple(s[:4] for s in shapes), scale=o["r"]), parts | {"gate": gate}


def _moka_s(o, layer, A, B, gate, N, K):
    shapes = layer.shapes["default"]
    left, right = ([i for i, s in enumerate(shapes) if s.identity == side] for side in (1, 2))
    assert sorted(left + right) == list(range(o["r"]))
    sizes = tuple(shapes[i].ma for i in left), tuple(shapes[i].mb for i in right)
    parts = {f"B{j}": x for j, x in enumerate(cut(B, [(N // p, K // p) for p in sizes[0]]))}
    parts |= {f"A{j}": x for j, x in enumerate(cut(A, [(N // q, K // q) for q in sizes[1]]))}
    return ref.MoKAs(*sizes, scale=o["r"]), parts | {"gate": gate[left + right]}


def _krona(o, layer, A, B, gate, N, K):
    A, B, a, b = sides(layer, A, B)
    return ref.KronA(a, b, scale=o["alpha"]), {"A": A[0], "B": B[0]}


def _lora(rslora: bool) -> Callable[..., Mapped]:
    def tensors(o, layer, A, B, gate, N, K):
        parts = {"lora_A": B.view(o["r"], K), "lora_B": A.view(o["r"], N).T}
        return ref.LoRA(o["r"], o["alpha"], rslora), parts

    return tensors


def _kron_lora(o, layer, A, B, gate, N, K):
    a, b, r = o["size"], o["size"], o["rank"]
    B1, B2 = cut(B, [(N // a, r), (r, K // b)])
    return ref.KronLoRA(a, b, r, o["alpha"]), {"A": A.view(a, b), "B1": B1, "B2": B2}


def _lokr(o, layer, A, B, gate, N, K):
    sibling = ref.LoKr(o["rank"], o["alpha"], o["factor"] or -1)
    names = sibling.tensors(N, K)
    first, *rest = names.values()
    return sibling, dict(zip(names, [*cut(A, [first]), *cut(B, rest)], strict=True))


def _soka(o, layer, A, B, gate, N, K):
    A, B, a, b = sides(layer, A, B)
    return ref.SoKA(a, b, o["r"]), {"U": A, "V": B, "sigma": o["r"] * gate}


def _dota(o, layer, A, B, gate, N, K):
    A, B, a, b = sides(layer, A, B)
    return ref.DoTA(a, b, o["r"]), {"core1": A.permute(1, 2, 0)[None], "core2": B[..., None]}


def _cdka(o, layer, A, B, gate, N, K):
    left, right = A.view(o["r"], N // o["r1"], o["r2"]), B.view(o["r"], o["r1"], K // o["r2"])
    sibling = ref.CDKA(o["r1"], o["r2"], o["r"], scale=o["alpha"] / o["r"])
    parts = {"lora_A": right.transpose(0, 1).flatten(0, 1), "lora_B": left.permute(1, 2, 0).flatten(1)}
    return sibling, parts


def _compacter(o, layer, A, B, gate, N, K):
    n, r = o["n"], o["rank"]
    pairs = cut(B, [(N // n, r), (r, K // n)] * n)
    left, right = (torch.stack([x.T for x in pairs[i::2]]) for i in (1, 0))
    parts = {"phm_rule": A.view(n, n, n).mT, "W_left": left, "W_right": right}
    return ref.Compacter(n, r), parts


def _gralora(o, layer, A, B, gate, N, K):
    k, part = o["blocks"], o["r"] // o["blocks"]
    pairs = cut(B, [(N // k, part), (part, K // k)] * k**2)
    U, V = ([[pairs[2 * (i * k + j) + side] for j in range(k)] for i in range(k)] for side in (0, 1))
    right = torch.stack([torch.cat([V[i][j].T for i in range(k)], 1) for j in range(k)])
    left = torch.stack([torch.cat([U[i][j].T for j in range(k)], 0) for i in range(k)])
    return ref.GraLoRA(o["r"], k, o["alpha"]), {"gralora_A": right, "gralora_B": left}


def _melora(shared: bool) -> Callable[..., Mapped]:
    def tensors(o, layer, A, B, gate, N, K):
        n, r = o["blocks"], o["rank"]
        pairs = cut(B, [(N // n, r), (r, K // n)] * (1 if shared else n))
        parts = {f"lora_B.{i}": x for i, x in enumerate(pairs[::2])}
        parts |= {f"lora_A.{i}": x for i, x in enumerate(pairs[1::2])}
        return ref.MELoRA(n, r, o["alpha"], shared), parts

    return tensors


def _mora(o, layer, A, B, gate, N, K):
    s = math.isqrt(B.numel())
    return ref.MoRA(s), {"M": B.view(s, s)}


def _bone(o, layer, A, B, gate, N, K):
    return ref.MiSS(o["r"]), {"miss_block": B.view(N, o["r"]).T}


def _c3a(o, layer, A, B, gate, N, K):
    b = o["block"]
    return ref.C3A(b), {"c3a_kernel": B.view(N // b, K // b, b)}


def _kradapter(o, layer, A, B, gate, N, K):
    sibling = ref.KRAdapter()
    sizes = sibling.tensors(N, K)
    outer, inner = sizes["v_weight"], sizes["weight"]
    if N <= K:
        v_weight, weight = cut(B, [outer, inner])
    else:
        v_weight, weight = (x.T for x in cut(B, [outer[::-1], inner[::-1]]))
    return sibling, {"v_weight": v_weight, "weight": weight}


def _kron_vera(o, layer, A, B, gate, N, K):
    s = layer.shapes["default"][0]
    sibling = ref.KronVeRA(s.ma, s.na, o["r"])
    sizes = sibling.given(N, K).items()
    frozen = {name: frozen_random(size, seed) for seed, (name, size) in enumerate(sizes)}
    return sibling, frozen | {"scale_a": A, "scale_c": B, "g": o["r"] * gate}


def frozen_random(size: tuple[int, ...], seed: int) -> Tensor:
    """U(-b, b), b = sqrt(3 / columns), from 24 bits of Philox keyed by the matrix' number and a seed."""
    out = np.empty(size)
    for i in range(size[0]):
        bits = np.random.Philox(key=[i, seed]).random_raw(size[1] * size[2]) // 2**40
        out[i] = ((bits / 2**23 - 1) * math.sqrt(3 / size[2])).reshape(size[1:])
    return torch.from_numpy(out)


def _lora_xs(o, layer, A, B, gate, N, K):
    sibling = ref.LoRAXS(o["r"], alpha=o["r"])
    return sibling, {"lora_A": B.view(o["r"], K), "lora_B": A.view(o["r"], N).T, "R": gate}


def _moka_xs(o, layer, A, B, gate, N, K):
    A, B, a, b = sides(layer, A, B)
    return ref.MoKAXS(a, b, o["r"]), {"A": A, "B": B, "M": gate}


def _qa_moka(o, layer, A, B, gate, N, K):
    A, B, a, b = sides(layer, A, B)
    return ref.QAMoKA(a, b, o["group"], o["r"], scale=o["r"]), {"A": A, "B": B, "gate": gate}


#: preset -> its reference and tensors
MAPS: dict[str, Callable[..., Mapped]] = {
    "moka": _moka,
    "moka-s": _moka_s,
    "krona": _krona,
    "lora": _lora(False),
    "rslora": _lora(True),
    "kron-lora": _kron_lora,
    "lokr": _lokr,
    "soka": _soka,
    "dota": _dota,
    "cdka": _cdka,
    "compacter": _compacter,
    "gralora": _gralora,
    "melora": _melora(False),
    "melora-shared": _melora(True),
    "mora": _mora,
    "bone": _bone,
    "c3a": _c3a,
    "kradapter": _kradapter,
    "kron-vera": _kron_vera,
    "lora-xs": _lora_xs,
    "moka-xs": _moka_xs,
    "qa-moka": _qa_moka,
}

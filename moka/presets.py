"""The Kronecker family: published adapters that are gated sums of Kronecker products, by name.

    moka.inject(model, moka.preset("gralora", r=32, blocks=2, target_modules=["q_proj"]))

A preset is a `MokaConfig`, so that everything (training, files, merging, peft) works as for MoKA itself.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .config import MokaConfig, nearest_name
from .errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """One member of the family.

    Attributes:
        name: for `moka.preset`.
        source: where it was published.
        formula: the update of a layer of m outputs and n inputs.
        parameters: trained entries of one layer, in closed form.
        rank: the largest rank of the update.
        build: its own options, with defaults -> fields of `MokaConfig`.
    """

    name: str
    source: str
    formula: str
    parameters: str
    rank: str
    build: Callable[..., dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        """The preset's own options and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}


def preset(name: str, **options: Any) -> MokaConfig:
    """The configuration of a published sibling of MoKA.

    Args:
        name: one of `moka.presets()`.
        options: the preset's own (`moka.presets()[name].options`), and any field of `MokaConfig`, which takes
            the place of the preset's.

    Raises:
        ConfigError: an unknown name or option, with the nearest valid one; or a bad value.

    Example:
        >>> moka.preset("lora", r=16, alpha=32, target_modules=["q_proj"]).shapes
        'lora'
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"preset: got {name!r}, the nearest is {nearest!r}; expected one of {list(PRESETS)}"
        )
    found = PRESETS[name]
    own = {key: options.pop(key) for key in found.options if key in options}
    known = [*found.options, *(f.name for f in fields(MokaConfig))]
    for key in options:
        if key not in known:
            nearest = nearest_name(key, known)
            raise ConfigError(
                f"preset {name!r}: unknown option {key!r}; the nearest valid one is {nearest!r}"
            )
    for key, value in own.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"preset {name!r}: {key}: got {value!r}, expected a number above 0")
    return MokaConfig(**{**found.build(**own), **options})


def presets() -> dict[str, Preset]:
    """Every preset, by name."""
    return dict(PRESETS)


def _fixed(scale: float, **values: Any) -> dict[str, Any]:
    """Components without a gate: each has the weight scale/r."""
    return {"gate": "none", "scale": float(scale), **values}


def _moka(r: int = 10) -> dict[str, Any]:
    return {"r": r}


def _moka_s(r: int = 10) -> dict[str, Any]:
    return {"r": r, "shapes": "identity"}


def _kron_lora(size: int = 16, rank: int = 8, alpha: float = 8.0) -> dict[str, Any]:
    return _fixed(alpha / rank, r=1, shapes=f"kron_lora({size},{rank})")


def _krona(alpha: float = 1.0) -> dict[str, Any]:
    return _fixed(alpha, r=1, shapes="even")


def _lokr(rank: int = 8, alpha: float = 8.0, factor: int = 0) -> dict[str, Any]:
    return _fixed(alpha / rank, r=1, shapes=f"lokr({factor},{rank})")


def _compacter(n: int = 4, rank: int = 1) -> dict[str, Any]:
    return _fixed(n, r=n, shapes=f"compacter({n},{rank})", tie="A")


def _soka(r: int = 10) -> dict[str, Any]:
    return {"r": r, "shapes": "even", "gate": "linear", "scale": 1.0, "init": "residual"}


def _lora(r: int = 8, alpha: float = 8.0) -> dict[str, Any]:
    return _fixed(alpha, r=r, shapes="lora")


def _rslora(r: int = 8, alpha: float = 8.0) -> dict[str, Any]:
    return _fixed(alpha * math.sqrt(r), r=r, shapes="lora")


def _dota(r: int = 10) -> dict[str, Any]:
    return _fixed(r, r=r, shapes="even", init="residual")


def _gralora(r: int = 32, blocks: int = 2, alpha: float = 64.0) -> dict[str, Any]:
    return _fixed(blocks * blocks * alpha / r, r=blocks * blocks, shapes=f"gralora({blocks},{r})")


def _melora(blocks: int = 2, rank: int = 8, alpha: float = 16.0) -> dict[str, Any]:
    return _fixed(blocks * alpha / rank, r=blocks, shapes=f"melora({blocks},{rank})")


def _melora_shared(blocks: int = 2, rank: int = 8, alpha: float = 16.0) -> dict[str, Any]:
    return _fixed(alpha / rank, r=1, shapes=f"melora_shared({blocks},{rank})")


def _mora(rank: int = 8) -> dict[str, Any]:
    return _fixed(1.0, r=1, shapes=f"mora({rank})")


def _bone(r: int = 64) -> dict[str, Any]:
    return _fixed(1.0, r=1, shapes=f"bone({r})")


def _c3a(block: int = 64) -> dict[str, Any]:
    return _fixed(1.0, r=1, shapes=f"c3a({block})")


def _kron_vera(r: int = 64) -> dict[str, Any]:
    return {"r": r, "shapes": "kron_vera", "gate": "linear"}


def _lora_xs(r: int = 16) -> dict[str, Any]:
    return {"r": r, "shapes": "lora", "gate": "matrix", "init": "svd", "train": ("gate",), "scale": 1.0}


def _moka_xs(r: int = 16) -> dict[str, Any]:
    return {**_lora_xs(r), "shapes": "even"}


def _kradapter() -> dict[str, Any]:
    return _fixed(2.0, r=1, shapes="kradapter")


def _cdka(r: int = 4, r1: int = 2, r2: int = 8, alpha: float = 4.0) -> dict[str, Any]:
    return _fixed(alpha, r=r, shapes=f"cdka({r1},{r2})")


def _qa_moka(r: int = 10, group: int = 64) -> dict[str, Any]:
    return {"r": r, "shapes": f"qa({group})"}


# fmt: off
#: The family; a x b and c x d are the sizes of A and B, so that m = ac and n = bd.
PRESETS: dict[str, Preset] = {p.name: p for p in (
    Preset("moka", "MoKA, arXiv 2508.03527", "r sum_i softmax(g)_i A_i kron B_i",
           "sum_i (a_i b_i + c_i d_i) + r", "sum_i rk A_i rk B_i", _moka),
    Preset("moka-s", "MoKA_s, arXiv 2508.03527", "r sum_i softmax(g)_i I kron B_i or A_i kron I",
           "sum_i m n / p_i^2 + r", "min(m, n)", _moka_s),
    Preset("kron-lora", "Kron-LoRA, arXiv 2508.01961", "alpha/rank A kron B1 B2", "a b + rank (c + d)",
           "rank rk A", _kron_lora),
    Preset("krona", "KronA, arXiv 2212.10650", "alpha A kron B", "a b + c d", "rk A rk B", _krona),
    Preset("lokr", "LoKr (LyCORIS), arXiv 2309.14859", "alpha/rank W1 kron W2a W2b", "a b + rank (c + d)",
           "rank rk W1", _lokr),
    Preset("compacter", "Compacter, arXiv 2106.04647", "sum_i A_i kron s_i t_i, A_i shared by all layers",
           "rank (m + n), and n^3 in all", "min(m, n, n^2 rank)", _compacter),
    Preset("soka", "SoKA, arXiv 2506.15251", "sum_i sigma_i A_i kron B_i", "r (a b + c d + 1)",
           "sum_i rk A_i rk B_i", _soka),
    Preset("lora", "LoRA, arXiv 2106.09685", "alpha/r sum_i b_i kron a_i", "r (m + n)", "r", _lora),
    Preset("rslora", "rsLoRA, arXiv 2312.03732", "alpha/sqrt(r) sum_i b_i kron a_i", "r (m + n)", "r",
           _rslora),
    Preset("dota", "DoTA with two cores, arXiv 2412.20891", "sum_i A_i kron B_i", "r (a b + c d)",
           "sum_i rk A_i rk B_i", _dota),
    Preset("gralora", "GraLoRA, arXiv 2505.20355", "alpha/r sum_ij E_ij kron B_ij A_ij", "r (m + n)",
           "blocks r", _gralora),
    Preset("melora", "MELoRA, arXiv 2402.17263", "alpha/rank sum_i E_ii kron B_i A_i", "rank (m + n)",
           "blocks rank", _melora),
    Preset("melora-shared", "MELoRA, arXiv 2402.17263, with one block for all", "alpha/rank I kron B A",
           "rank (m + n) / blocks", "blocks rank", _melora_shared),
    Preset("mora", "MoRA with sharing, arXiv 2405.12130", "1 kron M", "s^2, at most rank (m + n)", "s",
           _mora),
    Preset("bone", "Bone (MiSS), arXiv 2409.15371", "1_(1 x n/r) kron C", "m r", "r", _bone),
    Preset("c3a", "C3A, arXiv 2407.19342", "1/n sum_j W_j kron S^j, S the cyclic shift", "m n / block",
           "min(m, n)", _c3a),
    Preset("kron-vera", "VeRA, arXiv 2310.11454, for Kronecker products", "r sum_i g_i D_a A_i kron D_c B_i",
           "a + c + r", "min(m, n)", _kron_vera),
    Preset("lora-xs", "LoRA-XS, arXiv 2405.17604", "U M S V^T, with U S V^T the leading part of W", "r^2",
           "r", _lora_xs),
    Preset("moka-xs", "LoRA-XS, arXiv 2405.17604, for Kronecker products", "sum_ij M_ij A_i kron B_j", "r^2",
           "min(m, n)", _moka_xs),
    Preset("kradapter", "KRAdapter, arXiv 2508.00230", "2 sum_j (u_j kron v_j) e_j^T, or its transpose",
           "min(m, n) (d + max(m, n)/d)", "min(m, n)", _kradapter),
    Preset("cdka", "CDKA, arXiv 2602.01267", "alpha/r sum_i B_i kron A_i, B_i m/r1 x r2, A_i r1 x n/r2",
           "r (m r2 / r1 + n r1 / r2)", "r min(m/r1, r2) min(r1, n/r2)", _cdka),
    Preset("qa-moka", "QA-LoRA, arXiv 2309.14717, for Kronecker products",
           "r sum_i softmax(g)_i A_i kron (B_i kron 1_(1 x group))", "sum_i (a_i b_i + c_i d_i / group) + r",
           "min(m, n / group)", _qa_moka),
)}
# fmt: on

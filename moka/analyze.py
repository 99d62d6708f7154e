"""`analyze`: what an adapter has learned: which components of a layer matter, how far its weight moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import algebra
from .layers import MokaLinear
from .nf4 import NF4Weight
from .rank import find_adapter


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer of an adapter.

    Attributes:
        path: where it is.
        shapes: of the components, such as "64x64*64x64".
        importance: the norm of each component, `s_i = |alpha_i| |A_i|_F |B_i|_F`.
        energy_share: `s_i^2 / sum s^2`; components may overlap, so these are no shares of `|dW|^2`.
        effective_components: exp of the entropy of these shares, 1 to r; 0 for an update of zero.
        gate: of each component, without the scale.
        gate_entropy: of the absolute gates, in nats; log r if they are uniform.
        norm, relative_norm: `|dW|_F`, and `|dW|_F / |W|_F`.
        row_change_mean, row_change_max: of `| |W_n + dW_n| / |W_n| - 1 |` over the rows.
        effective_rank: exp of the entropy of the squared singular values of dW; None where that is costly.
    """

    path: str
    shapes: tuple[str, ...]
    importance: tuple[float, ...]
    energy_share: tuple[float, ...]
    effective_components: float
    gate: tuple[float, ...]
    gate_entropy: float
    norm: float
    relative_norm: float
    row_change_mean: float
    row_change_max: float
    effective_rank: float | None


def analyze(model: nn.Module, adapter_name: str = "default", max_svd: int = 1024) -> list[LayerAnalysis]:
    """Figures of each layer of an adapter; one dense weight is held at a time.

    Args:
        model: with an adapter of `moka.inject` or peft, not merged.
        adapter_name: which adapter.
        max_svd: the singular values of an update of several components are computed if its smaller side is at
            most this.

    Raises:
        StateError: no such adapter; it is merged, on the meta device or split; or the model is wrapped.

    Example:
        >>> max(moka.analyze(model), key=lambda layer: layer.relative_norm).path          # doctest: +SKIP
    """
    layers = find_adapter(model, adapter_name, "moka.analyze").layers
    return [_analyze(path, layer, adapter_name, max_svd) for path, layer in layers.items()]


def to_dict(layers: list[LayerAnalysis]) -> dict[str, Any]:
    """The figures as JSON types: those of each layer, and totals."""
    return {
        "components": sum(len(layer.shapes) for layer in layers),
        "norm": sum(layer.norm**2 for layer in layers) ** 0.5,
        "layers": [asdict(layer) for layer in layers],
    }


@torch.no_grad()
def _analyze(path: str, layer: MokaLinear, name: str, max_svd: int) -> LayerAnalysis:
    update, alpha = algebra.terms(layer, name), layer.alpha(name).double()
    base, delta = layer.base_weight(), layer.delta_weight(name)
    weight = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base.float()
    rows = weight.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    change = ((weight + delta).norm(dim=1) / rows - 1).abs()
    importance, gate = algebra.importance(update), alpha.abs() / alpha.abs().sum()
    energy = importance.square()
    rank = None
    if len(update) == 1:
        rank = algebra.effective_rank(algebra.spectrum(*update[0]))
    elif min(delta.shape) <= max_svd:
        rank = algebra.effective_rank(torch.linalg.svdvals(delta))
    return LayerAnalysis(
        path=path,
        shapes=tuple(map(str, layer.shapes[name])),
        importance=tuple(importance.tolist()),
        energy_share=tuple((energy / energy.sum().clamp(min=1e-300)).tolist()),
        effective_components=algebra.effective_rank(importance),
        gate=tuple((alpha / layer.scaling[name]).tolist()),
        gate_entropy=torch.special.entr(gate.nan_to_num()).sum().item(),
        norm=algebra.norm(update).item(),
        relative_norm=(algebra.norm(update) / weight.double().norm()).item(),
        row_change_mean=change.mean().item(),
        row_change_max=change.max().item(),
        effective_rank=rank,
    )

"""A weighted sum of adapters, as an adapter of its own.

sum_k w_k sum_i alpha_ki (A_ki kron B_ki)        is a mixture of all components, with the gates w_k alpha_ki
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .config import MokaConfig
from .errors import ConfigError
from .gates import at_least_fp32
from .layers import MokaLinear
from .shapes import explicit_shapes


def combination_config(
    layers: Mapping[str, MokaLinear], adapters: Sequence[str], weights: Sequence[float]
) -> MokaConfig:
    """The configuration of the sum: every component explicit, with a "linear" gate of scale 1.

    Args:
        layers: path -> layer of the model.
        adapters: their names.
        weights: a finite factor for each.

    Raises:
        ConfigError: unknown or repeated names, weights that do not match them, more components than allowed.
    """
    known = list(dict.fromkeys(name for layer in layers.values() for name in layer.configs))
    if not adapters or len(set(adapters)) != len(adapters) or not set(adapters) <= set(known):
        raise ConfigError(f"adapters: got {list(adapters)}, expected different ones of {known}")
    special = [name for name in adapters if any(_has_no_sum(layer, name) for layer in layers.values())]
    if special:
        raise ConfigError(f"adapters: {special} have a gate or a magnitude that rules out a sum")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights: got {list(weights)}, expected {len(adapters)} finite numbers")
    shapes = {
        path: [shape for name in adapters if name in layer.shapes for shape in layer.shapes[name]]
        for path, layer in layers.items()
        if any(name in layer.configs for name in adapters)
    }
    paths = {
        config.path for layer in layers.values() for name, config in layer.configs.items() if name in adapters
    }
    return MokaConfig(
        target_modules=list(shapes),
        shapes=explicit_shapes(shapes),
        gate="linear",
        scale=1.0,
        path=paths.pop() if len(paths) == 1 else "auto",
        strict=False,
    )


def _has_no_sum(layer: MokaLinear, name: str) -> bool:
    return name in layer.moka_magnitude or (
        name in layer.configs and layer.configs[name].gate in ("matrix", "routed")
    )


@torch.no_grad()
def combine_(
    layers: Mapping[str, MokaLinear], adapters: Sequence[str], weights: Sequence[float], into: str
) -> None:
    """Fills the adapter `into`, made from `combination_config`, with the weighted sum."""
    for layer in layers.values():
        if into not in layer.configs:
            continue
        parts = [
            (name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.configs
        ]
        for table in (layer.moka_A, layer.moka_B):
            table[into].copy_(torch.cat([at_least_fp32(table[name]) for name, _ in parts]))
        layer.moka_gate[into].copy_(torch.cat([weight * layer.alpha(name) for name, weight in parts]))

"""Rules for training: learning rates from the shapes of factors, and the balance of routed gates.

A contracts over its columns (na), B over its own (nb), and a step of Adam changes every entry by the learning
rate, so that equal changes of the output need  lr_A : lr_B = 1/na : 1/nb  (the fan-in argument of muP, arXiv
2203.03466; for LoRA's shape, na = 1 and nb = K, it is the rule of LoRA+, arXiv 2402.12354).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, StateError
from .inject import adapter_layers
from .layers import MokaLinear

#: equal: one rate for all. fan_in: see above.
RATES = ("equal", "fan_in")


def param_groups(
    model: nn.Module,
    lr: float,
    rates: str = "fan_in",
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    max_ratio: float = 16.0,
) -> list[dict[str, Any]]:
    """Every trainable parameter in groups for an optimizer, one for each learning rate.

    Args:
        model: with adapters.
        lr: of everything that is not a factor; of factors the geometric mean of the rates of A and B.
        rates: "fan_in" gives A the rate `lr sqrt(nb/na)` and B `lr sqrt(na/nb)`, in a layer of several shapes
            by their geometric mean; the paper's shapes come in pairs for which both are `lr`. "equal": all
            `lr`.
        gate_lr: of the gates; None for `lr`.
        weight_decay: of everything but gates.
        max_ratio: the largest ratio of the two rates; LoRA+ found 16 better than the n of its argument.

    Raises:
        ConfigError: an unknown rule, or a rate that is not above 0.
        StateError: nothing is trainable.

    Example:
        >>> config = moka.preset("lora", target_modules=["0"])
        >>> model = moka.inject(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
        >>> [group["lr"] for group in moka.param_groups(model, 1e-3)]
        [0.004, 0.00025]
    """
    if rates not in RATES:
        raise ConfigError(f"rates: got {rates!r}, expected one of {RATES}")
    gate_lr = lr if gate_lr is None else gate_lr
    for name, value in (("lr", lr), ("gate_lr", gate_lr), ("max_ratio", max_ratio)):
        if not value > 0:
            raise ConfigError(f"{name}: got {value!r}, expected a number above 0")
    settings: dict[int, tuple[float, float]] = {}
    for layer in adapter_layers(model).values():
        for name in layer.configs:
            ratio = _ratio(layer, name, max_ratio) if rates == "fan_in" else 1.0
            for table, own in ((layer.moka_A, lr * ratio), (layer.moka_B, lr / ratio)):
                settings.setdefault(id(table[name]), (own, weight_decay))
            if name in layer.moka_gate:
                settings[id(layer.moka_gate[name])] = gate_lr, 0.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(settings.get(id(parameter), (lr, weight_decay)), []).append(parameter)
    if not groups:
        raise StateError("nothing is trainable; call moka.inject or moka.set_adapter first")
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def _ratio(layer: MokaLinear, name: str, max_ratio: float) -> float:
    """lr_A / lr, which is lr / lr_B."""
    logs = [math.log(s.nb / s.na) for s in layer.shapes[name] if s.a_numel and s.b_numel]
    limit = math.log(max_ratio) / 2
    return math.exp(max(-limit, min(limit, sum(logs) / len(logs) / 2))) if logs else 1.0


def routing_loss(model: nn.Module) -> Tensor:
    """How unevenly routed gates used their components in the last forward pass in training mode; to be added
    to the loss with a small weight. 1 if all are used alike, r if one gets everything.

    r sum_i f_i P_i, with f_i the share of tokens whose largest weight is i's and P_i its mean weight (Switch
    Transformer, arXiv 2101.03961), averaged over the layers.

    Raises:
        StateError: no layer has a routed gate that ran in training mode.

    Example:
        >>> loss = loss + 0.01 * moka.routing_loss(model)          # doctest: +SKIP
    """
    losses = []
    for layer in adapter_layers(model).values():
        if layer.routing is not None:
            weights = layer.routing.flatten(0, -2)
            r = weights.shape[1]
            share = torch.bincount(weights.argmax(1), minlength=r) / len(weights)
            losses.append(r * (share * weights.mean(0)).sum())
    if not losses:
        raise StateError("no layer has a routed gate that ran in training mode; train with gate='routed'")
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

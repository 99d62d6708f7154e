"""Pictures of a training run: the loss, and the gates of every adapted layer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .inject import adapter_layers


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install moka[plot]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display needed
    return figure


def plot_loss(history: Sequence[dict[str, float]], path: str | os.PathLike, smooth: int = 10) -> None:
    """Loss against step, each step and its mean over the last `smooth` steps.

    Args:
        history: entries with "step" and "loss".
    """
    steps = [entry["step"] for entry in history]
    losses = [entry["loss"] for entry in history]
    figure = _figure(7, 4)
    axes = _loss_axes(figure)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps, _means(losses, smooth), color="C0", linewidth=2, label=f"mean of {smooth} steps")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_losses(curves: Mapping[str, Sequence[float]], path: str | os.PathLike, smooth: int = 10) -> None:
    """Losses of several runs against the step, each the mean over the last `smooth` steps.

    Args:
        curves: name -> loss of each step, from step 1 on.
    """
    figure = _figure(7, 4)
    axes = _loss_axes(figure)
    for (name, losses), style in zip(curves.items(), itertools.cycle(("-", "--", ":"))):
        axes.plot(range(1, len(losses) + 1), _means(losses, smooth), style, linewidth=2, label=name)
    axes.legend(title=f"mean of {smooth} steps")
    figure.savefig(path, dpi=120)


def _means(losses: Sequence[float], smooth: int) -> list[float]:
    return [sum(losses[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(losses))]


def _loss_axes(figure: Any) -> Any:
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.grid(alpha=0.3)
    return axes


@torch.no_grad()
def plot_gates(model: nn.Module, path: str | os.PathLike) -> None:
    """Each gate times r, one row per layer and one column per component; 1 is where a uniform gate starts."""
    gates = []
    for layer in adapter_layers(model).values():
        for name in layer.used_adapters():
            alpha = layer.alpha(name).float().cpu()
            gates.append(alpha / alpha.abs().mean().clamp(min=torch.finfo(torch.float32).tiny))
    columns = max(len(gate) for gate in gates)
    grid = torch.full((len(gates), columns), float("nan"))
    for row, gate in zip(grid, gates, strict=True):
        row[: len(gate)] = gate
    spread = max((grid[~grid.isnan()] - 1).abs().max().item(), 1e-3)
    figure = _figure(6, max(3.0, 0.09 * len(gates) + 1.5))
    axes = figure.add_subplot()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread)
    axes.set_xlabel("component")
    axes.set_ylabel("adapted layer, from the input on")
    axes.set_title("gate relative to uniform")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)

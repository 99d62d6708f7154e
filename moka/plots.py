"""Pictures: the loss of a training run, and the gates and components of every adapted layer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .analyze import LayerAnalysis
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
    spread = max((torch.cat(gates) - 1).abs().max().item(), 1e-3)
    _save_grid(gates, path, "gate relative to uniform", "RdBu_r", (1 - spread, 1 + spread))


def plot_energy(layers: Sequence[LayerAnalysis], path: str | os.PathLike) -> None:
    """`energy_share` of `moka.analyze`, one row per layer and one column per component."""
    rows = [torch.tensor(layer.energy_share) for layer in layers]
    _save_grid(rows, path, "share of the squared norms of a layer's components", "viridis", (0, None))


def _save_grid(
    rows: Sequence[Tensor],
    path: str | os.PathLike,
    title: str,
    colors: str,
    limits: tuple[float, float | None],
) -> None:
    """A picture of one row of values per layer; rows may differ in length."""
    grid = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=float("nan"))
    figure = _figure(6, max(3.0, 0.09 * len(rows) + 1.5))
    axes = figure.add_subplot()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1])
    axes.set_xlabel("component")
    axes.set_ylabel("adapted layer, from the input on")
    axes.set_title(title)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)

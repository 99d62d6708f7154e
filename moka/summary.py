"""`summary`: what is adapted in a model, with which shapes and at what cost, as data and as a table."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .bases import NF4Linear, base_kind, is_linear4bit
from .errors import StateError
from .inject import adapter_layers, saved_modules
from .layers import MokaLinear
from .shapes import KronShape, is_prime


@dataclass(frozen=True)
class LayerSummary:
    """One adapter on one layer.

    Attributes:
        path: where the layer is.
        adapter: its name.
        base: "linear", "bitsandbytes" or "nf4".
        shape: (out_features, in_features).
        shapes: of the components.
        parameters: trained entries, factors and gate.
        gate, path_choice, dtype: gate kind, "auto", "merged" or "factored", dtype of the factors.
        compute_dtype: of the base's products: a dtype, or "input" for that of the input.
        device: of the factors.
        notes: what deserves attention: other paths of a shared layer, a prime dimension, an adapter that is
            not active.
    """

    path: str
    adapter: str
    base: str
    shape: tuple[int, int]
    shapes: tuple[KronShape, ...]
    parameters: int
    gate: str
    path_choice: str
    dtype: str
    compute_dtype: str
    device: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The adapted layers of a model.

    Attributes:
        layers: one entry per adapter and layer.
        saved: path of a module trained in full -> its parameters.
        trainable: parameters that require a gradient.
        total: all parameters, a 4-bit weight counted by its entries.
    """

    layers: tuple[LayerSummary, ...]
    saved: dict[str, int]
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable parameters per hundred."""
        return 100.0 * self.trainable / self.total

    def __str__(self) -> str:
        """A table; layers that differ in their number alone share a line."""
        groups: dict[tuple[str, ...], list[LayerSummary]] = {}
        for layer in self.layers:
            groups.setdefault(_columns(layer), []).append(layer)
        header = (
            "layer",
            "count",
            "adapter",
            "base",
            "out x in",
            "r",
            "parameters",
            "gate",
            "path",
            "factors",
        )
        rows = [header] + [(key[0], str(len(group)), *key[1:-1]) for key, group in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"shapes of {key[0]}: {key[-1]}" for key in groups]
        for layer in self.layers:
            lines += [f"note: {layer.path}: {note}" for note in layer.notes]
        lines += [f"trained in full: {path}, {count:,} parameters" for path, count in self.saved.items()]
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.percent:.4f}%)")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What is adapted in the model; `print` it for a table.

    Raises:
        StateError: the model holds no adapter.

    Example:
        >>> print(moka.summary(model))          # doctest: +SKIP
    """
    layers = adapter_layers(model)
    if not layers:
        raise StateError("the model holds no adapter; call moka.inject first")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    rows = [_summarize(layer, name, paths[layer]) for layer in layers.values() for name in layer.configs]
    saved = {
        path: sum(p.numel() for module in copy.modules_to_save.values() for p in module.parameters())
        for path, copy in saved_modules(model).items()
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Summary(tuple(rows), saved, trainable, count_parameters(model))


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, shared ones once; a 4-bit weight counts its entries, not its bytes."""
    counts = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, NF4Linear) or is_linear4bit(module):
            key = id(module) if isinstance(module, NF4Linear) else id(module.weight)
            counts[key] = int(module.out_features) * int(module.in_features)  # pyright: ignore
    return sum(counts.values())


def _summarize(layer: MokaLinear, name: str, paths: list[str]) -> LayerSummary:
    config, base = layer.configs[name], layer.base_layer
    sizes = {"out_features": layer.out_features, "in_features": layer.in_features}
    notes = [f"also reached as {', '.join(paths[1:])}"] if len(paths) > 1 else []
    notes += [f"{side} {n} is prime, so a factor is 1 x {n}" for side, n in sizes.items() if is_prime(n)]
    if name in layer.merged_adapters:
        notes.append(f"adapter {name} is merged into the base weight")
    elif name not in layer.active_adapters:
        notes.append(f"adapter {name} is not active")
    tables = layer.tables()
    compute_dtype = getattr(base, "compute_dtype", None) if is_linear4bit(base) else None
    return LayerSummary(
        path=paths[0],
        adapter=name,
        base=base_kind(base) or type(base).__name__,
        shape=(layer.out_features, layer.in_features),
        shapes=layer.shapes[name],
        parameters=sum(table[name].numel() for table in tables if name in table),
        gate=config.gate,
        path_choice=config.path,
        dtype=str(layer.moka_A[name].dtype).removeprefix("torch."),
        compute_dtype=str(compute_dtype).removeprefix("torch.") if compute_dtype else "input",
        device=str(layer.moka_A[name].device),
        notes=tuple(notes),
    )


def _columns(layer: LayerSummary) -> tuple[str, ...]:
    """What the table shows of a layer, its shapes last."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.path)
    base = layer.base + (f" ({layer.compute_dtype})" if layer.compute_dtype != "input" else "")
    shapes = ", ".join(f"{shape} ({count})" for shape, count in Counter(layer.shapes).items())
    return (
        pattern,
        layer.adapter,
        base,
        f"{layer.shape[0]} x {layer.shape[1]}",
        str(len(layer.shapes)),
        f"{layer.parameters:,}",
        layer.gate,
        layer.path_choice,
        f"{layer.dtype} on {layer.device}",
        shapes,
    )

"""Mixed batches: each row of a batch goes through an adapter of its own, or through the base alone.

y[row] = W x[row] + b + sum_i alpha_i (A_i kron B_i) x[row]          with the mixture named for the row
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .errors import ConfigError, StateError
from .inject import adapter_layers, saved_modules
from .rows import Rows


@contextlib.contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], repeats: int = 1) -> Iterator[nn.Module]:
    """Within the block each row of the batch goes through the adapter named for it.

    Gradients flow as ever; which adapters are active does not matter, but a disabled model stays its base.

    Args:
        model: with adapters from `moka.inject` or peft.
        adapter_names: one per row; "__base__" for the base model alone.
        repeats: the rows may also come this many times each, as `generate` repeats them in beam search.

    Raises:
        ConfigError: an unknown name, or an adapter with `modules_to_save`.
        StateError: an adapter is merged; another such block is running; or gradient checkpointing is on in
            training, which would run the forward pass again outside the block.

    Example:
        >>> with moka.mixed_batch(model, ["default", "__base__"]):          # doctest: +SKIP
        ...     logits = model(two_rows).logits
    """
    if isinstance(adapter_names, str):
        raise ConfigError(f"adapter_names: got {adapter_names!r}, expected a list with a name for each row")
    rows, layers = Rows(adapter_names, repeats), list(adapter_layers(model).values())
    known = list(dict.fromkeys(name for layer in layers for name in layer.configs))
    if not adapter_names or (unknown := [name for name in rows.names if name not in known]):
        got = unknown if adapter_names else list(adapter_names)
        raise ConfigError(f"adapter_names: got {got}, expected one of {[*known, rows.BASE]} for each row")
    if any(layer.replaced is not None for layer in layers):
        raise StateError("adapter_names: init='residual' changed the base, which all rows would share")
    if directed := [n for n in rows.names if any(n in layer.moka_magnitude for layer in layers)]:
        raise ConfigError(f"adapter_names: {directed} set the norm of each row (magnitude), one for all rows")
    copies = [n for n in rows.names if any(n in m.modules_to_save for m in saved_modules(model).values())]
    if copies:
        raise ConfigError(f"adapter_names: {copies} have modules_to_save, which cannot be mixed in a batch")
    if any(layer.rows is not None for layer in layers):
        raise StateError("adapter_names: another mixed batch is running on this model; one at a time")
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise StateError(f"adapters {merged} are merged into the base weights; unmerge them first")
    if torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise StateError(
            "adapter_names with gradient checkpointing: the backward pass would run the layers again without "
            "them; call model.gradient_checkpointing_disable(), or train one adapter at a time"
        )
    try:
        for layer in layers:
            layer.rows = rows
        yield model
    finally:
        for layer in layers:
            layer.rows = None

"""Replacing an adapter's values in a running model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights

from ...errors import CheckpointMismatchError, StateError
from ...inject import adapter_layers
from ...layout import check_fields
from .config import MokaConfig
from .model import MokaModel


@torch.no_grad()
def hotswap_adapter(model: Any, model_id: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Copies the values of a saved adapter over those of one in the model: the same parameters stay, so that
    a compiled model runs on without compiling again. An error leaves the model as it was.

    Args:
        model: a `PeftModel` (or its compiled form) with a MoKA adapter.
        model_id: folder or hub id of the new adapter, of the same kind and the same layers.
        adapter_name: the adapter to replace.
        kwargs: for `PeftConfig.from_pretrained` and `load_peft_weights`, such as `revision`.

    Raises:
        StateError: no such adapter, or it is merged.
        CheckpointMismatchError: another kind, other layers or other shapes; naming them.

    Example:
        >>> hotswap_adapter(model, "out/second")          # doctest: +SKIP
    """
    model = getattr(model, "_orig_mod", model)
    existing = model.peft_config.get(adapter_name)
    if existing is None:
        raise StateError(f"adapter {adapter_name!r} does not exist; the model has {list(model.peft_config)}")
    if any(adapter_name in layer.merged_adapters for layer in adapter_layers(model).values()):
        raise StateError(f"adapter {adapter_name!r} is merged into the base weights; unmerge it first")
    config = PeftConfig.from_pretrained(model_id, **kwargs)
    if not isinstance(config, MokaConfig):
        raise CheckpointMismatchError(f"{model_id}: got an adapter of {config.peft_type}, expected MoKA")
    check_fields(str(model_id), config.to_moka(), existing.to_moka())
    state = MokaModel._remap_adapter_state_dict_for_load(
        model, config, adapter_name, load_peft_weights(model_id, device="cpu", **kwargs)
    )
    current = {name: tensor for name, tensor in model.state_dict().items() if name in state}
    shapes = {name: list(current[name].shape) if name in current else None for name in state}
    wrong = [f"{n} {list(t.shape)} ({shapes[n]})" for n, t in state.items() if list(t.shape) != shapes[n]]
    if wrong:
        raise CheckpointMismatchError(
            f"{model_id}: tensors of another shape (expected): {', '.join(wrong[:5])}"
        )
    for name, tensor in state.items():
        current[name].copy_(tensor)

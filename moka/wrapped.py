"""Models inside others: compiled, or wrapped for training on several processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import StateError

INNER = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}  # attribute with the model
#: Wrappers that take over a model's parameters or forward: adapters go in before them.
WRAPPERS = (*INNER, "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s or DistributedDataParallel's; an adapter's file holds its names."""
    inner: Any = model
    while type(inner).__name__ in INNER:
        inner = getattr(inner, INNER[type(inner).__name__])
    return inner


def refuse_wrapped(model: nn.Module, call: str = "moka.inject") -> None:
    """Parameters are made before anything takes hold of them.

    Raises:
        StateError: the model is compiled, or wrapped for training on several processes.
    """
    for path, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)
        if kind is None and getattr(module, "_compiled_call_impl", None) is not None:
            kind = "compiled"
        if kind is not None:
            raise StateError(
                f"{path or 'the model'} is wrapped already ({kind}); call {call} first, then "
                f"torch.compile, DistributedDataParallel or fully_shard"
            )

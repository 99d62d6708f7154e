"""`accelerate`: bitsandbytes' 4-bit layers on moka's kernels, with peft's adapters on them or none.

    y = W x + b,   dx = W^T dy          W in NF4, read in place

and peft's LoRA layers on them as one operation (`moka.accelerated`). The layers stay the objects that they
are: only their class changes, to a subclass of its own that has another `forward`. Weights, state dict,
quantization state, moves between devices and merging are bitsandbytes' and peft's own.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import nn

from . import bases, nf4
from .accelerated import Accelerated, FusedLora, can_be_fused, lora_class
from .errors import StateError
from .ops import built_with_cuda, require_native
from .substitute import Substitute, has_own_forward, restore, substitute, was_replaced

logger = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")  # where moka has kernels
MAX_NAMES = 10  # in a message


def accelerate(model: nn.Module, strict: bool = True) -> nn.Module:
    """Runs every bitsandbytes `Linear4bit` of a model on moka's kernels, forward and backward, in place.

    The numbers are the same to a rounding error. Nothing else changes: the modules stay the same objects and
    instances of the same classes, with the same weights; peft's wrappers around them keep working, and so do
    saving, merging, moving and `torch.compile`. Layers that are accelerated already are left alone.

    peft's LoRA layers on them become one operation, `y = W x + b + s (x A^T) B^T`, wherever they are just
    that: one active adapter, no dropout in training, no variant such as DoRA. Otherwise peft's own forward
    runs. Call it after `get_peft_model`, or again.

    Args:
        model: holds `Linear4bit` layers in NF4, bare or under the adapters of peft or of `moka.inject`.
        strict: refuse a model with a layer that cannot be accelerated; False leaves such layers to
            bitsandbytes, with a warning that lists them.

    Returns:
        The same model. `accelerated_layers` lists the layers; the counts go to the log (level INFO).

    Raises:
        StateError: no layer can be accelerated, or (strict) not all: FP4, not quantized yet, repacked by an
            evaluation on the CPU, a forward of its own. The model is as it was.
        NativeError: moka's extension is missing.

    Example:
        >>> model = moka.accelerate(peft.get_peft_model(model, lora_config))       # doctest: +SKIP
    """
    require_native()
    layers = {path: module for path, module in model.named_modules() if bases.is_linear4bit(module)}
    if not layers:
        raise StateError(
            "the model holds no Linear4bit layer of bitsandbytes, so there is nothing to accelerate; load it "
            "with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )
    reasons = {path: _obstacle(layer) for path, layer in layers.items()}
    refused = {path: reason for path, reason in reasons.items() if reason}
    if refused and (strict or len(refused) == len(layers)):
        advice = "" if len(refused) == len(layers) else ". strict=False leaves these to bitsandbytes"
        raise StateError(f"{_listed(refused)}{advice}")
    if refused:
        warnings.warn(f"left to bitsandbytes: {_listed(refused)}", stacklevel=2)
    new = [m for path, m in layers.items() if path not in refused and not isinstance(m, Accelerated)]
    for layer in new:
        substitute(layer, Accelerated)
    logger.info("%d of %d Linear4bit layers accelerated", len(new), len(layers))
    _fuse_adapters(model)
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Gives every accelerated layer its original class back; undoes `accelerate`.

    Raises:
        StateError: no layer is accelerated, or one was wrapped since; the model is as it was.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Substitute)}
    if not layers:
        raise StateError("the model holds no accelerated layer; nothing to decelerate")
    for path, layer in layers.items():
        if was_replaced(layer):
            raise StateError(
                f"{path}: its class was replaced since moka.accelerate, by {type(layer).__name__}; undo that "
                f"first"
            )
    count = sum(isinstance(layer, Accelerated) for layer in layers.values())
    for layer in layers.values():
        restore(layer)
    logger.info("%d Linear4bit layers decelerated", count)
    return model


def accelerated_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> accelerated `Linear4bit`; a shared layer is listed once, under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Accelerated)}


def _fuse_adapters(model: nn.Module) -> None:
    """Gives the LoRA layers of peft their fused forward; those that have a forward of their own keep it."""
    adapters = [module for module in model.modules() if lora_class(module) is not None]
    new = [m for m in adapters if not isinstance(m, FusedLora) and can_be_fused(m)]
    for module in new:
        substitute(module, FusedLora)
    if adapters:
        logger.info("%d of %d LoRA layers of peft fused with their base", len(new), len(adapters))


def _obstacle(layer: Any) -> str | None:
    """Why a layer cannot be accelerated; None if it can."""
    kind: Any = type(layer)
    if not issubclass(kind, Accelerated):
        expected: Any = bases.linear4bit_class(layer)
        if has_own_forward(layer, expected):
            return f"{kind.__name__} has a forward of its own, expected that of bitsandbytes' Linear4bit"
    try:
        device = nf4.bitsandbytes_args(layer)[0].device.type
    except StateError as error:
        return str(error)
    if device not in DEVICES:
        return f"its weight is on {device}, expected one of {DEVICES}"
    if device == "cuda" and not built_with_cuda():
        return "its weight is on cuda, and moka was built without CUDA kernels; install it beside nvcc"
    return None


def _listed(refused: dict[str, str]) -> str:
    """The refused layers, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in refused.items():
        by_reason.setdefault(reason, []).append(path or "the model")
    parts = []
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else ""
        parts.append(f"{', '.join(paths[:MAX_NAMES])}{more}: {reason}")
    return "; ".join(parts)

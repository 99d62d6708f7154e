"""`accelerate`: bitsandbytes' 4-bit layers on moka's kernels, with peft's adapters on them or none.

    y = W x + b,   dx = W^T dy          W in NF4, read in place

The layers stay the objects that they are: only their class changes, to a subclass of its own that has another
`forward`. Weights, state dict, quantization state, moves between devices and merging are bitsandbytes' own.
"""

from __future__ import annotations

import functools
import logging
import types
import warnings
from typing import Any

from torch import Tensor, nn

from . import bases, functional, nf4
from .errors import StateError
from .ops import built_with_cuda, require_native

logger = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")  # where moka has kernels
MAX_NAMES = 10  # in a message


class Accelerated:
    """The forward of an accelerated layer; its class derives from this and from the layer's original class.

    Attributes:
        original_class: what `decelerate` restores.
    """

    original_class: type[nn.Module]

    def forward(self: Any, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]` in x's dtype; the product runs in the compute dtype, as before."""
        if not self.compute_type_is_set:  # bitsandbytes' rule for a layer that was given no compute dtype
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = bases.compute_dtype(self, x)
        bias = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        y = functional.linear(x.to(dtype), bases.op_args(self), bias, functional.NO_MIXTURE, "auto")
        return y.to(x.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies are made by way of the original class, which can be found by its name
        _, _, *state = super().__reduce_ex__(protocol)  # pyright: ignore[reportAssignmentType]
        return _new, (self.original_class,), *state


def accelerate(model: nn.Module, strict: bool = True) -> nn.Module:
    """Runs every bitsandbytes `Linear4bit` of a model on moka's kernels, forward and backward, in place.

    The numbers are the same to a rounding error. Nothing else changes: the modules stay the same objects and
    instances of the same classes, with the same weights; peft's wrappers around them keep working, and so do
    saving, merging, moving and `torch.compile`. Layers that are accelerated already are left alone.

    Args:
        model: holds `Linear4bit` layers in NF4, bare or under the adapters of peft or of `moka.inject`.
        strict: refuse a model with a layer that cannot be accelerated; False leaves such layers to
            bitsandbytes, with a warning that lists them.

    Returns:
        The same model. `accelerated_layers` lists what was changed; the count goes to the log (level INFO).

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
        _set_class(layer, accelerated_class(type(layer)))
    logger.info("%d of %d Linear4bit layers accelerated", len(new), len(layers))
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Gives every accelerated layer its original class back; undoes `accelerate`.

    Raises:
        StateError: no layer is accelerated, or one was wrapped since; the model is as it was.
    """
    layers = accelerated_layers(model)
    if not layers:
        raise StateError("the model holds no accelerated layer; nothing to decelerate")
    for path, layer in layers.items():
        if type(layer) is not accelerated_class(layer.original_class):
            raise StateError(
                f"{path}: its class was replaced since moka.accelerate, by {type(layer).__name__}; undo that "
                f"first"
            )
    for layer in layers.values():
        _set_class(layer, layer.original_class)
    logger.info("%d Linear4bit layers decelerated", len(layers))
    return model


def accelerated_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> accelerated layer; a shared layer is listed once, under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Accelerated)}


@functools.cache
def accelerated_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original`, a kind of `Linear4bit`, whose instances run on moka's kernels."""
    members = {"original_class": original, "__module__": __name__}
    return type(f"Accelerated{original.__name__}", (Accelerated, original), members)


def _new(original: type[nn.Module]) -> nn.Module:
    return object.__new__(accelerated_class(original))


def _obstacle(layer: Any) -> str | None:
    """Why a layer cannot be accelerated; None if it can."""
    kind: Any = type(layer)
    if not issubclass(kind, Accelerated):
        expected: Any = bases.linear4bit_class(layer)
        bound = vars(layer).get("_old_forward", vars(layer).get("forward"))  # accelerate's hooks set these
        own = bound is not None and getattr(bound, "__func__", None) is not expected.forward
        if own or kind.forward is not expected.forward:
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


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of a layer, and of its `forward` where accelerate's hooks keep it bound."""
    old = type(layer).forward
    for name in ("forward", "_old_forward"):
        if getattr(vars(layer).get(name), "__func__", None) is old:
            setattr(layer, name, types.MethodType(kind.forward, layer))
    layer.__class__ = kind


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

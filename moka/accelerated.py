"""The layers of an accelerated model: bitsandbytes' `Linear4bit`, and peft's LoRA on one as one operation.

    y = W x + b,   y = W x + b + s (x A^T) B^T          W in NF4, A [r, K], B [N, r]

peft's own `forward` takes a dozen operations, most of them passes over x or y. It is kept for whatever is not
this formula; which of the two runs is decided at each call, from the layer's state at that time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import bases, functional
from .substitute import Substitute, has_own_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Accelerated(Substitute):
    """The forward of an accelerated `Linear4bit`; the class derives from this and from the original one."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]` in x's dtype; the product runs in the compute dtype, as before."""
        dtype, weight, bias = self.product_args(x)
        y = functional.linear(x.to(dtype), weight, bias, functional.NO_MIXTURE, "auto")
        return y.to(x.dtype)

    def product_args(self: Any, x: Tensor) -> tuple[torch.dtype, tuple, Tensor | None]:
        """The dtype of the product with x, the weight as operators take it, and the bias in that dtype."""
        if not self.compute_type_is_set:  # bitsandbytes' rule for a layer that was given no compute dtype
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = bases.compute_dtype(self, x)
        bias = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return dtype, bases.op_args(self), bias


class FusedLora(Substitute):
    """The forward of a LoRA layer on an accelerated one; the class derives from this and from peft's."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x `[..., K]` -> `[..., N]` in x's dtype."""
        update = None if args or kwargs else _plain_update(self, x)
        if update is None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        dtype, weight, bias = self._modules["base_layer"].product_args(x)
        return functional.nf4_lora(x, weight, bias, *update, dtype)


class Update(NamedTuple):
    """A [r, K], B [N, r] and their scale."""

    A: Tensor
    B: Tensor
    scale: float


#: Which of them peft takes depends on whether the model says that it is loaded in 4 bits.
LORA_CLASSES = (("peft.tuners.lora.bnb", "Linear4bit"), ("peft.tuners.lora.layer", "Linear"))


def lora_class(module: Any) -> type[nn.Module] | None:
    """peft's LoRA class if a module is one on a `Linear4bit`; peft is not imported to find out."""
    for kind in type(module).__mro__:
        if (kind.__module__, kind.__name__) in LORA_CLASSES and bases.is_linear4bit(module.base_layer):
            return kind
    return None


def can_be_fused(module: Any) -> bool:
    """Whether a LoRA layer of peft is on an accelerated layer and runs peft's own `forward`."""
    kind = lora_class(module)
    return kind is not None and not has_own_forward(module, kind) and _is_accelerated(module.base_layer)


def _plain_update(layer: Any, x: Tensor) -> Update | None:
    """The update, if it is what all of the layer amounts to for x; None leaves the call to peft."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    modules = layer._modules  # a fraction of the time that attributes of a module take
    all_A = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in all_A]
    if len(names) != 1 or names[0] in layer.lora_variant:  # variants are DoRA, aLoRA and others
        return None
    (name,) = names
    A, B = all_A[name], modules["lora_B"]._modules[name]
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[name]
    if not (_is_plain_linear(A) and _is_plain_linear(B) and _is_accelerated(base) and _does_nothing(dropout)):
        return None
    scale = layer.scaling[name]
    if (
        _is_hooked(base)
        or not isinstance(scale, (int, float))
        or not _dtypes_fit(layer, x, A.weight, B.weight)
    ):
        return None
    return Update(A.weight, B.weight, scale)


def _is_plain_linear(module: Any) -> bool:
    """Whether a module is a product with a weight that it holds whole, not split over processes."""
    if type(module) is not nn.Linear or module.bias is not None or _is_hooked(module):
        return False
    return type(module.weight) in (Tensor, nn.Parameter)


def _is_accelerated(base: nn.Module) -> bool:
    return isinstance(base, Accelerated) and type(base).forward is Accelerated.forward


def _does_nothing(dropout: Any) -> bool:
    kind = type(dropout)
    off = kind is nn.Identity or (kind is nn.Dropout and not (dropout.training and dropout.p))
    return off and not _is_hooked(dropout)


def _is_hooked(module: Any) -> bool:
    """Whether something else than its class's `forward` runs at a call."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__)


def _dtypes_fit(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether peft gives y in x's dtype, and its product runs in the autocast dtype or else in that of A."""
    low, device = A.dtype, x.device.type
    if low not in DTYPES or B.dtype != low:
        return False
    if torch.is_autocast_enabled(device):
        cast = (torch.float32, torch.get_autocast_dtype(device))
        return x.dtype in cast and low in cast
    return x.dtype == low or layer.cast_input_dtype_enabled

"""The layers that can be adapted: `nn.Linear`, bitsandbytes `Linear4bit`, and moka's own `NF4Linear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, nf4
from .errors import ConfigError, StateError
from .nf4 import NF4Weight

#: The dtypes that weights can be merged into.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergedBase:
    """What a layer's base was before an adapter was merged into it, or its start taken out.

    Attributes:
        original: the base layer before, whole: the layer holds both weights.
        error: |applied - delta| / |delta| in the Frobenius norm, what rounding took from the update.
    """

    original: nn.Module
    error: float


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is held in NF4, in bitsandbytes' layout; differentiable in its
    input.

    Args:
        weight: `[N, K]` from `moka.nf4.quantize`.
        bias: `[N]` or None; frozen.

    Example:
        >>> layer = NF4Linear.from_linear(torch.nn.Linear(64, 32))
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocksize, self.blocksize2, self.weight_dtype = weight.blocksize, weight.blocksize2, weight.dtype
        for name in ("packed", "absmax", "absmax2", "code2", "offset"):
            self.register_buffer(name, getattr(weight, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = False) -> NF4Linear:
        """Quantizes the weight of a dense layer."""
        return cls(nf4.quantize(linear.weight, blocksize, double_quant), linear.bias)

    def nf4_weight(self) -> NF4Weight:
        """The weight as the functions of moka take it; shares the buffers."""
        return NF4Weight.from_op_args(self.op_args(), self.weight_dtype)

    def op_args(self) -> tuple:
        """The weight as the operators take it."""
        t = self._buffers  # a fifth of the time that five attributes of a module take
        packed = t["packed"] if "packed" in t else self._parameters["packed"]
        tensors = packed, t["absmax"], t["absmax2"], t["code2"], t["offset"]
        return (*tensors, self.blocksize, self.blocksize2, self.out_features, self.in_features)

    def hold_as_parameter(self, dtype: torch.dtype) -> None:
        """Makes `packed` a frozen parameter of the same name and bytes: FSDP2 splits those and leaves buffers
        whole. The operators take any dtype; bytes that do not fill one stay a buffer.
        """
        packed = self._buffers.get("packed")
        if packed is not None and packed.nbytes % dtype.itemsize == 0:
            del self._buffers["packed"]
            self.register_parameter("packed", nn.Parameter(packed.view(dtype), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]` in x's dtype (the autocast dtype under autocast)."""
        return functional.linear(x, self.op_args(), self.bias, functional.NO_MIXTURE, "auto")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # model.to(bfloat16) must not round the quantization constants, nor packed bytes that are held as
        # floats: they move, and keep their dtype
        held = [self.packed, *self.buffers(recurse=False)]

        def apply(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            cast = new.dtype != tensor.dtype and any(tensor is kept for kept in held)
            return tensor.to(new.device) if cast else new

        super()._apply(apply, recurse)
        return self

    def extra_repr(self) -> str:
        """Sizes and quantization."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}, "
            f"double_quant={self.absmax2 is not None}"
        )


def linear4bit_class(module: nn.Module) -> type[nn.Module] | None:
    """bitsandbytes' `Linear4bit` if a module is one; bitsandbytes is not imported to find out."""
    for kind in type(module).__mro__:
        if kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes"):
            return kind
    return None


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is a bitsandbytes `Linear4bit`."""
    return linear4bit_class(module) is not None


def base_kind(module: nn.Module) -> str | None:
    """The kind of a layer that can be adapted: "linear", "bitsandbytes" or "nf4"; None for any other."""
    if isinstance(module, NF4Linear):
        return "nf4"
    if is_linear4bit(module):
        return "bitsandbytes"
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return None
    # A subclass with a forward of its own computes something else; and MultiheadAttention reads the weight of
    # its out_proj (a NonDynamicallyQuantizableLinear) without calling it, so an adapter there would do
    # nothing.
    plain = type(module).forward is nn.Linear.forward
    return "linear" if plain and type(module).__name__ != "NonDynamicallyQuantizableLinear" else None


def weight_of(layer: Any) -> NF4Weight | Tensor:
    """The weight `[N, K]`; read it anew at each call, since moving a `Linear4bit` replaces its tensors."""
    if isinstance(layer, NF4Linear):
        return layer.nf4_weight()
    return nf4.from_bitsandbytes(layer) if is_linear4bit(layer) else layer.weight


def dense_of(layer: Any) -> Tensor:
    """The weight `[N, K]` in fp32, dequantized."""
    weight = weight_of(layer)
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.detach().float()


def with_weight(layer: Any, weight: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A frozen layer like `layer` with another weight `[N, K]`, which has 4 bits again where that has 4 bits,
    unless a dtype is given."""
    base = weight_of(layer)
    if isinstance(base, NF4Weight) and dtype is None:
        packed = nf4.quantize(weight, base.blocksize, base.double_quant)
        four_bit = NF4Linear(replace(packed, dtype=base.dtype), layer.bias)
        four_bit._parameters["bias"] = layer.bias
        return four_bit
    linear = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    # accelerate's init_empty_weights, within which peft may call this, would make them empty
    linear._parameters["weight"] = nn.Parameter(weight.to(dtype or base.dtype), requires_grad=False)
    if layer.bias is not None:
        linear._parameters["bias"] = nn.Parameter(layer.bias.detach().to(linear.weight.dtype), False)
    return linear


def check_into(into: torch.dtype | None) -> None:
    """Accepts what weights can be merged into.

    Raises:
        ConfigError: with the choices.
    """
    if into is not None and into not in DTYPES:
        raise ConfigError(
            f"into: got {into!r}, expected one of {DTYPES}, or None to keep the kind of each layer"
        )


def op_args(layer: Any) -> tuple:
    """The weight as `functional.linear` takes it."""
    if isinstance(layer, NF4Linear):
        return layer.op_args()
    return nf4.bitsandbytes_args(layer) if is_linear4bit(layer) else (layer.weight,)


def device_of(layer: Any) -> torch.device:
    """Where the weight is."""
    return layer.packed.device if isinstance(layer, NF4Linear) else layer.weight.device


def moved(layer: nn.Module, device: torch.device) -> nn.Module:
    """The layer, moved if it is elsewhere: moving a `Linear4bit` to where it is would copy it."""
    return layer if device_of(layer) == device else layer.to(device)


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The dtype of the layer's product with x: the compute dtype a `Linear4bit` was given, or that of
    autocast in its place; else x's."""
    dtype = layer.compute_dtype if is_linear4bit(layer) else None
    if dtype is None:
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def guard_save_pretrained(model: Any) -> None:
    """Makes the model's `save_pretrained` an error as long as what it holds would not be saved, or could not
    be loaded; called whenever that may have changed.
    """
    if not hasattr(model, "save_pretrained"):
        return
    vars(model).pop("save_pretrained", None)
    if hasattr(model, "_moka_base"):  # from moka.inject to moka.eject
        model.save_pretrained = _refuse_to_leave_out_adapters
    elif any(isinstance(module, NF4Linear) for module in model.modules()):
        model.save_pretrained = _refuse_to_save_nf4


def _refuse_to_leave_out_adapters(*args: Any, **kwargs: Any) -> None:
    raise StateError(
        "model.save_pretrained would not save the adapters of moka.inject; call moka.save_adapter (as "
        "MokaTrainer does, unlike transformers.Trainer), or moka.merge and moka.eject first"
    )


def _refuse_to_save_nf4(*args: Any, **kwargs: Any) -> None:
    raise StateError(
        "model.save_pretrained would write the 4-bit weights of moka.quantize, which from_pretrained cannot "
        "read; keep the original model and quantize it again, save adapters by moka.save_adapter, or merge "
        "them into 16 bits by moka.merge and moka.eject, both with into=torch.bfloat16, or by the command "
        "moka merge"
    )

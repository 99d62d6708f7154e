"""`quantize` turns a model's dense linear layers into NF4 layers, to the same bits as bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bases import NF4Linear, base_kind, guard_save_pretrained, is_linear4bit
from .errors import ConfigError, InjectionError, StateError
from .nf4 import BLOCKSIZES, from_bitsandbytes
from .targets import matches, no_match, output_embedding, walk


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did; kept as `model.moka_quantization`.

    Attributes:
        blocksize, double_quant: as given.
        quantized: paths of the layers now in NF4.
        skipped: path -> why a linear layer stayed as it was.
        bytes_before, bytes_after: of the quantized layers' weights.
    """

    blocksize: int
    double_quant: bool
    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """One line, and one per skipped layer."""
        double = "on" if self.double_quant else "off"
        head = (
            f"{len(self.quantized)} layers in NF4 (blocksize {self.blocksize}, double quantization "
            f"{double}): {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        )
        return "\n".join([head] + [f"skipped {path}: {why}" for path, why in self.skipped.items()])


def quantize(
    model: nn.Module,
    blocksize: int = 64,
    double_quant: bool = True,
    exclude_modules: str | Sequence[str] = (),
) -> nn.Module:
    """Replaces each `nn.Linear` of the model by an `NF4Linear`, in place and one at a time, so that memory
    stays low.

    As with transformers and bitsandbytes, the output embedding and every layer that shares its weight with an
    embedding stay dense. `model.moka_quantization` says what was done and what was skipped, and why.

    Args:
        model: any module; not adapted yet.
        blocksize: entries that share one absmax.
        double_quant: keep absmax in 8 bits (QLoRA section 3).
        exclude_modules: suffixes of paths, or a regular expression, of layers to leave dense.

    Returns:
        The same model; its `save_pretrained` is an error from now on: `from_pretrained` could not read it.

    Raises:
        StateError: the model holds adapters; quantize before `moka.inject`.
        InjectionError: the model has no dense linear layer to quantize.
        ConfigError: the blocksize is not supported.

    Example:
        >>> model = moka.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> model.moka_quantization.quantized
        ('0',)
    """
    if getattr(model, "moka_config", {}):
        raise StateError("the model holds adapters; call moka.quantize first, then moka.inject")
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize: got {blocksize}, expected one of {BLOCKSIZES}")
    groups, skipped = layers_to_quantize(model, exclude_modules)
    if not groups:
        if any(map(_in_four_bits, model.modules())):
            raise InjectionError(f"{type(model).__name__} is in 4 bits already; call moka.inject")
        why = skipped or "it holds no nn.Linear"
        raise InjectionError(f"{type(model).__name__} has no dense linear layer to quantize: {why}")
    root: Any = model  # nn.Module declares no attributes but tensors and modules
    before = after = 0
    for paths in groups:
        before += root.get_submodule(paths[0]).weight.nbytes
        after += _quantize_layer(model, paths, blocksize, double_quant)
    quantized = tuple(path for paths in groups for path in paths)
    report = QuantizationReport(blocksize, double_quant, quantized, skipped, before, after)
    root.moka_quantization = report
    guard_save_pretrained(root)
    return model


def layers_to_quantize(
    model: nn.Module, exclude_modules: str | Sequence[str] = ()
) -> tuple[list[list[str]], dict[str, str]]:
    """The paths of each dense layer to quantize (several for a shared one), and path -> reason of those that
    stay.

    Only paths are returned, since a reference to a dense layer would keep it alive after its replacement.
    """
    modules = dict(walk(model))
    if exclude_modules and not any(matches(path, exclude_modules) for path in modules):
        regex = isinstance(exclude_modules, str)
        first = exclude_modules if regex else exclude_modules[0]
        raise InjectionError(no_match(f"exclude_modules: {exclude_modules!r}", first, list(modules), regex))
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    output = output_embedding(model)
    groups: dict[int, list[str]] = {}
    skipped = {}
    for path, module in modules.items():
        if not isinstance(module, nn.Linear) or is_linear4bit(module):
            continue
        if matches(path, exclude_modules):
            skipped[path] = "excluded"
        elif module is output:
            skipped[path] = "output embedding"
        elif id(module.weight) in embeddings:
            skipped[path] = "shares its weight with an embedding"
        elif base_kind(module) is None:
            skipped[path] = f"{type(module).__name__} is not a plain nn.Linear"
        else:
            groups.setdefault(id(module), []).append(path)
    return list(groups.values()), skipped


def _quantize_layer(model: Any, paths: list[str], blocksize: int, double_quant: bool) -> int:
    """Replaces the layer that all `paths` reach; returns the bytes of its new weight."""
    linear = model.get_submodule(paths[0])
    layer = NF4Linear.from_linear(linear, blocksize, double_quant).train(linear.training)
    for path in paths:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = layer
    return layer.nf4_weight().nbytes


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Replaces every 4-bit layer by an `nn.Linear` of its dequantized weight, in place, and gives every
    parameter this dtype; buffers keep theirs, since models compute positions from some in fp32."""
    places: dict[Any, list[tuple[nn.Module, str]]] = {}  # a shared layer has several
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and _in_four_bits(child):
                places.setdefault(child, []).append((parent, name))
    while places:  # lets each 4-bit layer go before the next one
        child, owners = places.popitem()
        weight = child.nf4_weight() if isinstance(child, NF4Linear) else from_bitsandbytes(child)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        linear.register_parameter("bias", child.bias)
        for parent, name in owners:
            parent._modules[name] = linear
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    guard_save_pretrained(model)
    forget_quantization(model)


def forget_quantization(model: Any) -> None:
    """Takes away what says that transformers loaded the model in 4 bits, if no layer is in 4 bits any more.

    It would save it as a quantized model, which it could not load, and refuse to cast it.
    """
    if not getattr(model, "is_loaded_in_4bit", False) or any(map(_in_four_bits, model.modules())):
        return
    model.hf_quantizer, model.is_quantized = None, False
    for owner, name in (
        (model, "is_loaded_in_4bit"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        vars(owner).pop(name, None)


def _in_four_bits(module: nn.Module) -> bool:
    return isinstance(module, NF4Linear) or is_linear4bit(module)

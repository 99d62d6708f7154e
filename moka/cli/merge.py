"""`moka merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from .common import DtypeOption, ModelOption, QuantizeOption, load, parse_dtype
from .console import out


def merge(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model into.")],
    model: ModelOption = None,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "bfloat16",
) -> None:
    """Write a plain 16-bit model with the adapter in its weights.

    What is saved is the base the adapter was trained on, dequantized, plus the update.
    """
    from ..inject import eject
    from ..merge import merge as merge_update

    into = parse_dtype(dtype) or torch.bfloat16
    loaded, tokenizer = load(model, adapter, quantize, "auto")
    merged: Any = eject(merge_update(loaded, into=into))
    dequantize(merged, into)
    merged.to(into).save_pretrained(output)
    tokenizer.save_pretrained(output)
    out.print(f"merged {adapter} into {output} ({dtype})", highlight=False)


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Replaces every 4-bit layer by an `nn.Linear` of its dequantized weight, in place."""
    from ..bases import NF4Linear, is_linear4bit
    from ..nf4 import from_bitsandbytes

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, NF4Linear) and not is_linear4bit(child):
                continue
            weight = child.nf4_weight() if isinstance(child, NF4Linear) else from_bitsandbytes(child)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
            linear.register_parameter("bias", child.bias)
            setattr(parent, name, linear)
    # transformers would otherwise save it as a quantized model
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

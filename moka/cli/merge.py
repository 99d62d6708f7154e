"""`moka merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

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
    from ..checkpoint import CONFIG
    from ..errors import ConfigError
    from ..inject import active_adapters, adapter_layers, eject
    from ..merge import merge_layers

    if (output / CONFIG).exists():
        raise ConfigError(
            f"output: {output} holds an adapter ({CONFIG}), which transformers would load on top of the "
            f"merged model; choose another folder"
        )
    into = parse_dtype(dtype) or torch.bfloat16
    loaded, tokenizer = load(model, adapter, quantize, "auto", text=False)
    merge_layers(adapter_layers(loaded), active_adapters(loaded), into, force=False, fix="--dtype float32")
    merged: Any = eject(loaded, into)
    merged.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    out.print(f"merged {adapter} into {output} ({dtype})", highlight=False)

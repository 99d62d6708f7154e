"""`moka export-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DtypeOption, ModelOption, QuantizeOption, load
from .console import out


def export_lora(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a saved adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the LoRA into.")],
    model: ModelOption = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank. Default: whatever is exact.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each layer's update to keep, by the smallest rank: 0.99.")
    ] = None,
    rank_pattern: Annotated[
        bool,
        typer.Option("--rank-pattern", help="A rank of its own for each layer."),
    ] = False,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "auto",
) -> None:
    """Write an adapter as a LoRA in peft's format, for servers that know no other kind.

    Prints the share of each layer's update that the rank leaves out. Serve it with the base that the adapter
    was trained on, in the same 4 bits.
    """
    from ..export_lora import export_lora as write

    loaded, _ = load(model, adapter, quantize, dtype, text=False)
    export = write(loaded, output, rank=rank, energy=energy, rank_pattern=rank_pattern)
    out.print(str(export), highlight=False, soft_wrap=True)
    out.print(f"exported {adapter} into {output}", highlight=False)

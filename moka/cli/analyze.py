"""`moka analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from .common import DtypeOption, ModelOption, QuantizeOption, load
from .console import out, print_json


def analyze(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a saved adapter.")],
    model: ModelOption = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the components' shares here.")] = None,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "auto",
) -> None:
    """Show what an adapter has learned: which components matter, and how far each layer's weights moved."""
    from ..analyze import analyze as measure
    from ..analyze import to_dict
    from ..plots import plot_energy

    loaded, _ = load(model, adapter, quantize, dtype, text=False)
    layers = measure(loaded)
    layer_column = Column("layer", overflow="fold")  # whole, also in a narrow terminal or a pipe
    table = Table("r", "used", "gates", "rank", "|dW|/|W|", "rows", layer_column, box=None, pad_edge=False)
    for y in layers:
        rank = "" if y.effective_rank is None else f"{y.effective_rank:.1f}"
        count, effective, gates = str(len(y.shapes)), f"{y.effective_components:.2f}", f"{y.gate_entropy:.2f}"
        table.add_row(
            count, effective, gates, rank, f"{y.relative_norm:.2%}", f"{y.row_change_mean:.2%}", y.path
        )
    out.print(table)
    out.print("used, rank: exp of entropy; gates: their entropy; rows: mean change of norms", highlight=False)
    if json:
        print_json(to_dict(layers), json, show=False)
    if plot:
        plot_energy(layers, plot)

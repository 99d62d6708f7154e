"""`moka eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AdapterOption, DtypeOption, ModelOption, QuantizeOption, load
from .console import print_json, progress


def evaluate(
    data: Annotated[
        list[str], typer.Argument(help="JSON Lines files, or embedded:TASK for its validation split.")
    ] = ["embedded:arc_easy"],  # noqa: B006 (typer copies it)
    model: ModelOption = None,
    adapter: AdapterOption = None,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first rows of each file only.")] = None,
    max_length: Annotated[int, typer.Option(min=16, help="Tokens per window or row.")] = 512,
    details: Annotated[bool, typer.Option("--details", help="Include the scores of every row.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
) -> None:
    """Score a model: accuracy for rows with options, perplexity for rows with text or answers."""
    from ..evaluate import evaluate_rows
    from ..train import load_rows

    rows = {source: load_rows(source, "validation")[:limit] for source in data}
    loaded, tokenizer = load(model, adapter, quantize, dtype)
    results = {}
    for source, part in rows.items():
        with progress(source) as update:
            results[source] = evaluate_rows(loaded, tokenizer, part, max_length, update, details)
    print_json(
        {"model": loaded.name_or_path, "adapter": adapter and str(adapter), "results": results}, output
    )

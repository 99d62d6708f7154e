"""`moka train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .common import quiet_libraries
from .config import read_config
from .console import err, out, progress

EXIT_SIGTERM = 143  # 128 + SIGTERM, as a shell reports it
EPILOG = (
    "Example: moka train data=my.jsonl output=run1 learning_rate=3e-3 adapter.r=10 "
    "'adapter.target_modules=[q_proj, v_proj]'. Exit code 143: stopped by SIGTERM after saving a checkpoint; "
    "the same command with resume=true goes on. On several GPUs: torchrun --nproc_per_node 8 -m moka.cli "
    "train ...; shard=true splits a model that outgrows one of them."
)


def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration and stop.")] = False,
) -> None:
    """Fine-tune a model with MoKA: adapter, metrics and plots go into the output folder."""
    from ..train import RunConfig, run

    config = read_config(RunConfig, arguments or [])
    first = (
        os.environ.get("RANK", "0") == "0"
    )  # set by torchrun and accelerate launch; the others keep silent
    out.quiet = not first
    if show:
        out.print(config.to_yaml(), end="", highlight=False)
        return
    from torch import distributed

    quiet_libraries()
    if first:
        err.print(f"training {config.model} on {config.data}", highlight=False)
    try:
        with progress("training") as on_step, progress("evaluation") as on_eval:
            metrics = run(config, on_step if first else None, on_eval if first else None)
    except KeyboardInterrupt:
        if first:
            err.print(_after_interrupt(Path(config.output)), highlight=False)
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()
    folder = Path(config.output)
    out.print(
        f"loss {metrics['loss']:.3f} after {metrics['steps']} steps; results are in {folder}", highlight=False
    )
    for name, value in metrics.get("eval", {}).items():
        out.print(f"  {name}: {value:.4g}", highlight=False)
    if metrics["interrupted"]:
        if first:
            err.print("stopped by SIGTERM; go on with resume=true", highlight=False)
        raise typer.Exit(EXIT_SIGTERM)


def _after_interrupt(output: Path) -> str:
    """What is left of a run that Ctrl-C ended."""
    if any(output.glob("checkpoint-*")):
        return "interrupted; the same command with resume=true goes on from the last checkpoint"
    return (
        "interrupted before the first checkpoint, so nothing was saved; save_steps=N makes one every N steps"
    )

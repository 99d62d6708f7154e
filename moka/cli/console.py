"""Output of the commands: results on stdout, everything else on stderr; progress as a bar, or lines in a
log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..safefile import write_atomic

out = Console()
err = Console(stderr=True)
LINE_SECONDS = 15.0  # between two lines of progress where there is no terminal


class Update(Protocol):
    """Tells a progress bar how far the work is; `figures` are shown behind it."""

    def __call__(self, done: int, total: int, figures: dict[str, float] | None = None, /) -> None: ...


@contextmanager
def progress(what: str) -> Iterator[Update]:
    """A progress bar on a terminal; elsewhere a line every 15 seconds and at the end."""
    if err.is_terminal:
        with _bar() as bar:
            task = bar.add_task(what, total=None, figures="")
            yield lambda done, total, figures=None, /: bar.update(
                task, completed=done, total=total, figures=_format(figures)
            )
        return
    last = time.monotonic()

    def line(done: int, total: int, figures: dict[str, float] | None = None, /) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            err.print(f"{what}: {done}/{total} {_format(figures)}".rstrip(), highlight=False)

    yield line


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, console=err)


def _format(figures: dict[str, float] | None) -> str:
    return f"loss {figures['loss']:.3f}" if figures and "loss" in figures else ""


def print_json(values: dict[str, Any], path: Path | None = None, show: bool = True) -> None:
    """Results as JSON on stdout, and in a file if one is named."""
    if show:
        out.print_json(json.dumps(values))
    if path is not None:
        write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())

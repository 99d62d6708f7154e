"""CSV rows in, Markdown out: what the table scripts share."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, str]]


def read(name: str, optional: bool = False) -> Rows:
    """The rows of one CSV; none if it is optional and was not measured."""
    path = RESULTS / name
    if optional and not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    header = list(header)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def number(text: str) -> str:
    """Three significant digits, without an exponent."""
    value = float(text)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}"

"""Runs every scenario for LoRA, LoKr and MoKA, and rewrites the table of docs/peft.md."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft_cases import BASES, METHODS, Case, Skip, Wrong
from peft_scenarios import SCENARIOS


def outcome(name: str, method: str, base: str) -> str:
    """What the table says: yes, -, or what happened."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            SCENARIOS[name](Case(method, base, Path(folder)))
        except Skip:
            return "-"
        except Wrong as error:
            return f"**{error}**"
        except AssertionError:
            return "**wrong**"
        except Exception as error:
            return type(error).__name__
    return "yes"


def table() -> str:
    columns = [(m, b) for m in METHODS for b in BASES if b != "nf4" or m == "MoKA"]
    shown = {"float": "float", "bitsandbytes": "bnb NF4", "nf4": "moka NF4"}
    head = " | ".join(f"{m}, {shown[b]}" for m, b in columns)
    rows = [f"| | {head} |", "| --- |" + " --- |" * len(columns)]
    for name in SCENARIOS:
        cells = [outcome(name, method, base) for method, base in columns]
        print(name, *cells, sep=" | ", file=sys.stderr, flush=True)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    page = Path(__file__).parent.parent / "docs" / "peft.md"
    start, end = "<!-- table: scenarios -->\n", "<!-- end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{start}{table()}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

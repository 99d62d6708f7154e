"""Writes the tables of README.md, docs/peft.md and docs/family.md between markers, most of them from CSVs.

    python benchmarks/tables.py            rewrite the pages
    python benchmarks/tables.py --check    exit 1 and name the tables when a page differs from the CSVs

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES, or of ELSEWHERE.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tables_cuda
import tables_family
from table_format import Rows, markdown, number, read

from moka.rules import plan_shapes
from moka.shapes import KronShape

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "peft.md", ROOT / "docs" / "family.md")
ELSEWHERE = ("scenarios", "presets")  # written by tests/peft_table.py and tests/family_table.py
LEFT_OUT = ("4",)  # token counts that are in the CSV alone, to keep README short
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def layer_table(op: str, variants: dict[str, str]) -> str:
    """One operation of layer.csv: a line per size and token count, the baseline's time, then ratios to it.

    Args:
        op: the `op` column.
        variants: variant -> column title; variants that were not measured are left out.
    """
    rows = [row for row in read("layer.csv") if row["op"] == op and row["M"] not in LEFT_OUT]
    cases: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["N"], row["K"], row["M"]), {})[row["variant"]] = row
    shown = [name for name in variants if any(name in case for case in cases.values())]
    header = ["layer (N x K)", "tokens", "torch, ms", *(variants[name] for name in shown)]
    lines = []
    for (N, K, M), case in cases.items():
        baseline = case[next(iter(case.values()))["baseline"]]
        ratios = (f"{float(case[name]['ratio']):.2f}" for name in shown)
        lines.append([f"{N} x {K}", M, number(baseline["median_ms"]), *ratios])
    return markdown(header, lines) + machine(rows)


def ops_table() -> str:
    """The operators at the largest size: milliseconds, moka beside its peers."""
    rows = read("ops.csv")
    largest = max(int(row["N"]) * int(row["K"]) for row in rows)
    rows = [row for row in rows if int(row["N"]) * int(row["K"]) == largest]
    columns = ("moka", "bitsandbytes", "torch", "torch-dequantize", "plain")
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["M"]), {})[row["variant"]] = number(row["median_ms"])
    header = [f"{rows[0]['N']} x {rows[0]['K']}, ms", "tokens", *columns]
    converted = ("nf4_quantize", "nf4_dequantize")  # no tokens in these
    lines = [
        [f"`{op}`", "" if op in converted else M, *(case.get(name, "") for name in columns)]
        for (op, M), case in cases.items()
    ]
    return markdown(header, lines) + machine(rows)


def train_table() -> str:
    """train.csv: a training step of a whole model."""
    rows = read("train.csv")
    names = {"frozen": "frozen", "plain-moka": "MoKA in plain PyTorch", "moka": "moka"}
    header = [f"training step, {rows[0]['M']} tokens", "ms", "ratio to frozen", "tokens/s"]
    lines = []
    for row in rows:
        ms = float(row["median_ms"])
        lines.append(
            [
                names[row["variant"]],
                f"{ms:.0f}",
                f"{float(row['ratio']):.2f}",
                f"{1e3 * int(row['M']) / ms:.0f}",
            ]
        )
    return markdown(header, lines) + machine(rows)


def demo_table() -> str:
    """demo.csv: what `make demo` reports, a line per seed."""
    header = ["seed", "accuracy before, %", "after, %", "rows", "minutes", "peak GB"]
    fields = ("seed", "accuracy_before", "accuracy_after", "rows", "minutes", "peak_gb")
    return markdown(header, ([row[field] for field in fields] for row in read("demo.csv")))


def trl_table() -> str:
    """trl_sft.csv: a measure per line, a variant per column."""
    rows = read("trl_sft.csv")
    shown = {
        "trainable parameters": "trainable", "seconds per step": "s_step",
        "training loss, first 5 steps": "loss_first5", "last 5 steps": "loss_last5",
        "held-out loss, base": "held_out_base", "after training": "held_out",
        "stopped in the middle, resumed in a new process": "held_out_resumed",
        "reloaded in a new process": "held_out_reloaded", "merged in 4 bits": "held_out_merged-4bit",
        "merged into bf16": "held_out_merged-bfloat16", "merged into fp32": "held_out_merged-float32",
        "largest difference of a step's loss after the resumption": "loss_difference_after_resume",
        "largest relF of a tensor, resumed to uninterrupted": "weights_relF_resumed",
    }  # fmt: skip
    header = [f"{rows[0]['steps']} steps", *(row["variant"] for row in rows)]
    lines = [[title, *(row[column] or "-" for row in rows)] for title, column in shown.items()]
    return markdown(header, lines) + machine([{**rows[0], "dtype": "bfloat16"}])


def parameters_table() -> str:
    """Trained parameters on the q and v projections, gates included; planned, not measured."""
    models = {  # layers, shapes [N, K] of q and v
        "LLaMA2-7B": (32, ((4096, 4096), (4096, 4096))),
        "LLaMA3-8B": (32, ((4096, 4096), (1024, 4096))),
        "SmolLM2-135M": (30, ((576, 576), (192, 576))),
    }

    def count(shapes: Iterable[KronShape]) -> int:
        return sum(shape.numel + 1 for shape in shapes)

    lines = []
    for name, (layers, sizes) in models.items():
        balanced, identity = (
            layers * sum(count(plan_shapes(N, K, r=10, kind=kind)) for N, K in sizes)
            for kind in ("balanced", "identity")
        )
        lora = layers * sum(16 * (N + K) for N, K in sizes)
        lines.append([name, *(f"{value:,}".replace(",", " ") for value in (balanced, identity, lora))])
    return markdown(["q and v projections", "MoKA, r = 10", "MoKA_s, r = 10", "LoRA, r = 16"], lines)


def machine(rows: Rows) -> str:
    """Where the rows were measured, as a line below the table."""
    row = rows[0]
    return (
        f"\n{row['machine']}, {row['threads']} threads, {row['isa']}; torch {row['torch']}, bitsandbytes "
        f"{row['bitsandbytes']}; {row['dtype']}; commit {row['commit']}, {row['date']}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "layer-forward": lambda: layer_table(
        "layer_forward",
        {
            "moka-auto": "moka",
            "moka-frozen": "moka, no adapter",
            "bitsandbytes": "bitsandbytes",
            "bitsandbytes-unpacked": "bitsandbytes, fp32",
            "plain-moka": "MoKA in plain PyTorch",
            "lora-r16": "peft LoRA r=16",
        },
    ),
    "layer-step": lambda: layer_table(
        "layer_step",
        {
            "moka-auto": "moka",
            "moka-frozen": "moka, no adapter",
            "bitsandbytes-unpacked": "bitsandbytes, no adapter",
            "plain-moka": "MoKA in plain PyTorch",
            "lora-r16": "peft LoRA r=16",
        },
    ),
    "ops": ops_table,
    "parameters": parameters_table,
    "train": train_table,
    "trl-sft": trl_table,
    **tables_cuda.TABLES,
    **tables_family.TABLES,
}


def generate(text: str) -> tuple[str, list[str]]:
    """`text` with every marked table regenerated, and the names of those that changed.

    Raises:
        KeyError: a marker names a table that does not exist.
    """
    changed = []

    def replace(match: re.Match[str]) -> str:
        if match[2] in ELSEWHERE:
            return match[0]
        new = f"{match[1]}{TABLES[match[2]]()}{match[3]}"
        if new != match[0]:
            changed.append(match[2])
        return new

    return MARKED.sub(replace, text), changed


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 when a page is out of date"
    )
    args = options.parse_args()
    for page in PAGES:
        text, changed = generate(page.read_text(encoding="utf-8"))
        if args.check and changed:
            sys.exit(f"{page.name}: tables differ from benchmarks/results: {', '.join(changed)}; "
                     f"run `python benchmarks/tables.py`")  # fmt: skip
        if not args.check:
            page.write_text(text, encoding="utf-8")
            print(f"{page}: {len(changed)} tables changed")


if __name__ == "__main__":
    main()

"""Collects the results of `make demo` runs into benchmarks/results/demo.csv, for README's first table.

    for seed in 0 1 2; do make demo SEED=$seed; done
    python benchmarks/collect_demo.py runs/demo-0 runs/demo-1 runs/demo-2

Accuracies are in percent of `rows` validation questions, `minutes` is wall time after downloads, `peak_gb`
the largest resident memory in 1e9 bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from results import FOLDER


def row(folder: Path) -> dict[str, object]:
    """One line of demo.csv from one run's demo.json."""
    result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return {
        "seed": result["seed"],
        "accuracy_before": f"{100 * result['before']['accuracy']:.1f}",
        "accuracy_after": f"{100 * result['after']['accuracy']:.1f}",
        "rows": result["after"]["rows"],
        "minutes": f"{result['seconds'] / 60:.1f}",
        "peak_gb": f"{result['peak_memory_bytes'] / 1e9:.1f}",
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folders", type=Path, nargs="+", help="outputs of make demo")
    options.add_argument("--out", type=Path, default=FOLDER / "demo.csv", help="default: %(default)s")
    args = options.parse_args()
    rows = [row(folder) for folder in args.folders]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out}; now run benchmarks/tables.py")


if __name__ == "__main__":
    main()

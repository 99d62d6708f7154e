"""Runs every benchmark and regenerates the tables of README.md: `make bench`, five minutes on two cores.

    python benchmarks/run.py [--quick] [--threads 2] [--device cpu]

Options go to each script; see their docstrings for what is measured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("bench_ops.py", "bench_layer.py", "bench_train.py")


def main() -> None:
    folder = Path(__file__).parent
    for script in SCRIPTS:
        subprocess.run([sys.executable, folder / script, *sys.argv[1:]], check=True)
    subprocess.run([sys.executable, folder / "tables.py"], check=True)


if __name__ == "__main__":
    main()

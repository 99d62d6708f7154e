"""Command line, machine facts and CSV rows shared by the benchmark scripts.

A row is one variant of one case: where it ran, what was computed, the time, the rates and the error.

    gb_s      bytes that must move (weight as stored, activations) per second
    gflop_s   operations of the base products (2 M N K each), for the mixture alone of its factors, per second
    ratio     median over the baseline's median in the same run
    relF      |y - r|_F / |r|_F against float64
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch
from timing import Timing

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a CSV; the field order is the column order."""

    commit: str
    date: str
    machine: str
    cores: int
    threads: int
    isa: str
    torch: str
    bitsandbytes: str
    op: str
    N: int
    K: int
    M: int
    dtype: str
    variant: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_s: float
    gflop_s: float
    baseline: str
    ratio: float
    relF: float


@dataclass(frozen=True)
class Case:
    """What one set of variants computes: operation, weight `[N, K]`, M tokens, operations in 1e9."""

    op: str
    N: int
    K: int
    M: int
    gflop: float


def gemm_gflop(N: int, K: int, M: int) -> float:
    """Operations of one matrix product, in 1e9."""
    return 2e-9 * M * N * K


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options every benchmark script has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cpu", help="cpu or cuda[:index]")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options.add_argument(
        "--quick", action="store_true", help="small sizes and few repeats: a check, not a measurement"
    )
    options.add_argument("--out", type=Path, default=FOLDER / out, help="CSV to write (default: %(default)s)")
    return options


def prepare(args: argparse.Namespace) -> torch.device:
    """Applies the options, before bitsandbytes is imported, and seeds."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by libraries that are loaded later
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return torch.device(args.device)


def device_guard(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device current; nothing on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_rows(
    args: argparse.Namespace,
    case: Case,
    timings: dict[str, Timing],
    nbytes: dict[str, float],
    error: dict[str, float],
    baseline: str,
) -> list[Row]:
    """One row per variant; `nbytes` moved by one call of each, `error` its relF."""
    facts, rows = machine_facts(args), []
    for name, t in timings.items():
        rows.append(
            Row(
                **facts,
                op=case.op,
                N=case.N,
                K=case.K,
                M=case.M,
                dtype=args.dtype,
                variant=name,
                median_ms=_round(t.median_ms),
                p20_ms=_round(t.p20_ms),
                p80_ms=_round(t.p80_ms),
                gb_s=_round(nbytes[name] / t.median_ms / 1e6),
                gflop_s=_round(case.gflop / t.median_ms * 1e3),
                baseline=baseline,
                ratio=_round(t.median_ms / timings[baseline].median_ms),
                relF=float(f"{error[name]:.2e}"),
            )
        )
    show(rows)
    return rows


def machine_facts(args: argparse.Namespace) -> dict[str, str | int]:
    """The columns that are the same for all rows of a run."""
    device = torch.device(args.device)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        machine, isa = _cpu_model(), torch.backends.cpu.get_cpu_capability()
    return {
        "commit": _commit(), "date": datetime.date.today().isoformat(), "machine": machine,
        "cores": os.cpu_count() or 1, "threads": args.threads, "isa": isa, "torch": torch.__version__,
        "bitsandbytes": metadata.version("bitsandbytes"),
    }  # fmt: skip


def write(rows: Iterable[Row], path: Path) -> None:
    """Writes the CSV, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"wrote {path}")


def show(rows: list[Row]) -> None:
    """Prints one case, a line per variant."""
    first = rows[0]
    print(f"\n{first.op} {first.N}x{first.K} M={first.M} {first.dtype}, ratio to {first.baseline}")
    for row in rows:
        spread = row.p80_ms / max(row.p20_ms, 1e-9)
        print(
            f"  {row.variant:24s} {row.median_ms:10.3f} ms  ratio {row.ratio:6.2f}  p80/p20 {spread:5.2f}"
            f"  {row.gb_s:7.1f} GB/s  {row.gflop_s:7.1f} GFLOP/s  relF {row.relF:.1e}",
            flush=True,
        )


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """relF of `actual` against a float64 `reference`."""
    return ((actual.detach().cpu().double() - reference).norm() / reference.norm()).item()


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the checkout, `+` when the sources differ from it; `unknown` outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    differs = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "../csrc", "../moka", "../setup.py"]
    ).returncode
    return head.stdout.strip() + ("+" if differs else "")

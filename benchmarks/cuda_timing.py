"""Timing on one GPU: single calls with a cold L2, CUDA graphs over many weights, and the rates of the device.

Variants take turns, so that a change of clocks falls on all of them; what is reported are medians.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import Timing, summary
from torch import Tensor

Call = Callable[[], Any]
CALLS = 20  # in one turn


def cold_calls(
    variants: Mapping[str, Call], leaves: Iterable[Tensor] = (), seconds: float = 0.3
) -> dict[str, Timing]:
    """Times single calls; before each, outside the timed span, the L2 is overwritten and gradients dropped.

    Variants take turns of several calls, none waited for, so that the host runs ahead where it can. A call
    whose host work takes longer than its kernels shows the host's time.

    Args:
        variants: name -> what to call.
        leaves: tensors whose `.grad` is set to None before each call.
        seconds: for all variants together; at least 2 turns, at most 4.
    """
    leaves = list(leaves)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def turn(call: Call, count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for start, end in pairs:
            for leaf in leaves:
                leaf.grad = None
            flush.zero_()
            start.record()
            call()
            end.record()
        return pairs

    for call in variants.values():
        turn(call, 3)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in variants.values():
        turn(call, CALLS)
    torch.cuda.synchronize()
    turns = min(4, max(2, round(seconds / (time.perf_counter() - began))))
    taken = {name: [] for name in variants}
    for _ in range(turns):
        for name, call in variants.items():
            with torch.cuda.nvtx.range(name):
                taken[name] += turn(call, CALLS)
    torch.cuda.synchronize()
    return {name: summary([a.elapsed_time(b) for a, b in pairs]) for name, pairs in taken.items()}


def graph_calls(variants: Mapping[str, Sequence[Call]], rounds: int = 15) -> dict[str, Timing]:
    """Time per call of sequences of calls, each captured in one CUDA graph: no launch gaps.

    Each call of a sequence should have weights of its own, more in all than the L2 holds.
    """
    graphs = {name: capture(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.nvtx.range(name):
                start.record()
                graph.replay()
                end.record()
            end.synchronize()
            if i:  # the first replay uploads the graph
                times[name].append(start.elapsed_time(end) / len(variants[name]))
    return {name: summary(samples) for name, samples in times.items()}


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def steps(call: Call, count: int, warmup: int = 3) -> Timing:
    """Wall-clock times of whole steps, host included, each ended by a synchronization."""
    samples = []
    for i in range(warmup + count):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= warmup:
            samples.append(1e3 * (time.perf_counter() - began))
    return summary(samples)


def ceilings() -> dict[str, float]:
    """What this device reaches now: TB/s of a copy of 4 GiB, TFLOP/s of an 8192^3 bf16 product."""
    a = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = cold_calls({"copy": lambda: b.copy_(a)}, seconds=0.1)["copy"]
    x, y = (a[i << 26 : (i + 1) << 26].view(8192, 8192) for i in range(2))
    product = cold_calls({"matmul": lambda: x @ y}, seconds=0.1)["matmul"]
    return {
        "copy_tb_s": round(2 * a.nbytes / copy.median_ms / 1e9, 3),
        "matmul_tflop_s": round(2 * 8192**3 / product.median_ms / 1e9, 1),
    }


def facts(*packages: str) -> dict[str, str | float]:
    """The columns that are the same in all rows of a run."""
    versions: dict[str, str] = {}
    for package in ("bitsandbytes", *packages):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "torch": torch.__version__, **versions,
        "commit": commit(), "date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def commit() -> str:
    """MOKA_COMMIT if set, for a source tree without its history; else what git describes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    told = os.environ.get("MOKA_COMMIT")
    return told or subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


class Table:
    """A CSV that is written row by row, so that an interrupted run keeps what it has; rows are printed too.

    Args:
        path: the file, replaced.
        about: columns that are the same in all rows.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer: csv.DictWriter | None = None
        self.about = about

    def add(self, **row: Any) -> None:
        """Writes one row."""
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, [*row, *self.about], lineterminator="\n")
            self.writer.writeheader()
        self.writer.writerow(row | dict(self.about))
        self.file.flush()
        print("  ".join(str(value) for value in row.values()), flush=True)

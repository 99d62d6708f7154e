"""Nsight Compute on moka's kernels: what share of the device's measured ceilings each reaches.

    python benchmarks/profile_cuda.py FOLDER

Runs the operations of a 4096 x 4096 layer once under `ncu` (caches flushed before each kernel, clocks as they
are), beside a pass over 4 GiB and an 8192^3 bf16 product. Writes FOLDER/profile.csv, one row per kernel:

    memory_share    bytes read from DRAM and written, per second, over those of the copy
    tensor_share    activity of the tensor cores over that of the product
    issue_share     share of cycles in which a scheduler issued an instruction

Where Nsight Systems (`nsys`) is installed, its summary of kernels and ranges is printed as well.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cuda_timing import Table, facts

from moka import functional, nf4
from moka.shapes import flatten_shapes

SIZE, TOKENS = 4096, 4096
METRICS = {
    "ns": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "lts__t_sectors_op_write.sum",  # to the L2, which may keep them past the kernel's end
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
}


def operations() -> dict[str, Callable[[], object]]:
    """Name -> what is profiled; the first two are the ceilings."""
    from cuda_peers import DTYPE, linear4bit, operands, with_moka  # the profiling process needs no peers

    a = torch.randn(1 << 31, dtype=DTYPE, device="cuda")
    b, square = torch.empty_like(a), a[: 1 << 26].view(8192, 8192)
    w4, mixture = operands(with_moka(linear4bit(SIZE, SIZE)))
    A, B, alpha, shapes = mixture
    x, dy = (a[i << 24 : (i + 1) << 24].view(TOKENS, SIZE) for i in range(2))
    w = a[: SIZE * SIZE].view(SIZE, SIZE)
    flat, wanted = flatten_shapes(shapes), (True, True, True)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: torch.neg(a, out=b),  # a kernel; what copies is none
        "matmul": lambda: square @ square,
        "quantize": lambda: nf4.quantize(w),
        "dequantize": lambda: w4.dequantize(DTYPE),
        "dequantize, mixture merged in": lambda: w4.dequantize(DTYPE, mixture),
        "gradients of the mixture, 4096 tokens": lambda: torch.ops.moka.kron_mix_grad(
            x, dy, A, B, alpha, flat, *wanted
        ),
        "mixture alone, 4096 tokens": lambda: functional.kron_mixture(x, *mixture),
    }
    for tokens in (1, 16, 64, 256):
        few = x[:tokens].contiguous()
        calls[f"linear, {tokens} tokens"] = lambda few=few: functional.nf4_linear(few, w4)
        calls[f"linear and mixture, {tokens} tokens"] = lambda few=few: functional.moka_linear(
            few, w4, None, *mixture
        )
    return calls


@torch.no_grad()
def work() -> None:
    """What runs under the profiler: each operation once, in a range of its name, after a warm-up."""
    calls = operations()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for name, call in calls.items():
        with torch.cuda.nvtx.range(f"@{name}@"):
            call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_ncu() -> str:
    """ncu's CSV of all launches of `work`."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--nvtx", "--profile-from-start", "off", "--metrics", ",".join(METRICS.values())]
    done = subprocess.run([*command, *child()], capture_output=True, text=True)
    if '"Kernel Name"' not in done.stdout:
        sys.exit(f"ncu printed no table:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def kernels(text: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(operation, kernel, metrics) of each launch in ncu's CSV, which follows what the program printed."""
    for row in csv.DictReader(text[text.index('"ID"') :].splitlines()):
        if not row["ID"].isdigit():
            continue  # units, messages
        kernel = row.pop("Kernel Name")
        operation = re.search("@([^@]+)@", " ".join(value for value in row.values() if value))
        values = {key: float(row[metric].replace(",", "")) for key, metric in METRICS.items()}
        yield operation[1] if operation else "", short_name(kernel), values


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    kernel = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|\(int\)|\(bool\)", "", kernel)
    return re.sub(r"[<(].*", "", kernel).rpartition("::")[2]


def systems() -> None:
    """Prints Nsight Systems' summaries."""
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report")
        profile = ["nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "-o", report]
        subprocess.run([*profile, *child()], check=True)
        tables = ["--report", "cuda_gpu_kern_sum", "--report", "nvtx_gpu_proj_sum"]
        subprocess.run(["nsys", "stats", *tables, f"{report}.nsys-rep"], check=True)


def child() -> list[str]:
    """This script as the profiled program."""
    return [sys.executable, __file__, "--work"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?")
    options.add_argument("--work", action="store_true", help="run the operations; under a profiler")
    args = options.parse_args()
    if args.work:
        return work()
    if args.folder is None:
        options.error("folder is missing")
    launches = list(kernels(run_ncu()))
    copy, matmul = (
        max((m for operation, _, m in launches if operation == name), key=lambda m: m["ns"])
        for name in ("copy", "matmul")
    )
    # The counter of written sectors sees some of them on both halves of the L2: a copy, which writes what it
    # reads, says how many bytes one count stands for.
    written = copy["read"] / copy["written"]
    bandwidth = lambda m: (m["read"] + written * m["written"]) / m["ns"]  # noqa: E731  # GB/s
    table = Table(args.folder / "profile.csv", facts())
    for operation, kernel, m in launches:
        table.add(
            operation=operation, kernel=kernel, us=round(m["ns"] / 1e3, 2),
            read_mb=round(m["read"] / 1e6, 2), written_mb=round(written * m["written"] / 1e6, 2),
            memory_share=round(bandwidth(m) / bandwidth(copy), 3),
            tensor_share=round(m["tensor"] / matmul["tensor"], 3),
            issue_share=round(m["issue"] / 100, 3), registers=int(m["registers"]),
        )  # fmt: skip
    if shutil.which("nsys"):
        systems()
    else:
        print("Nsight Systems is not installed: no timeline")


if __name__ == "__main__":
    main()

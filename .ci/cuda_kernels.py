"""Compiles csrc/kernels/*.cu with nvcc alone; fails on warnings and on register spills that it does not list.

For the two ends of the release list: no source distinguishes 86 and 89 from 80. Without nvcc it says so and
passes. The registers and spills of every kernel go to build/cuda_kernels.txt.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_backend"))

from cuda_build import find_cuda_home, gencode_flags  # noqa: E402

ARCHS = ("80", "90a")
FLAGS = ["-O3", "-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
FLAGS += ["-diag-suppress=177"]  # unused: what only the code for another architecture uses
#: (architectures, pattern of the kernel's name, most bytes spilled, reason)
ALLOWED: list[tuple[str, str, int, str]] = [
    (
        "80 90a",
        "build_lora_kernel<.*, 4, true, 2>",
        72,
        "capped at 128 registers, so that two blocks hide each other's loads; only for ranks above 16",
    ),
    ("90a", "kron_grad_kernel<", 56, "of eleven roles in a kernel, each has what setmaxnreg leaves it"),
]
FUNCTION = re.compile(
    r"Function properties for (\w+)\n"
    r"\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:\nptxas info\s+: Used (\d+) registers)?"
)


class Kernel(NamedTuple):
    """What ptxas reports of one function."""

    arch: str
    name: str
    registers: int
    stored: int
    loaded: int


def functions(report: str, arch: str) -> list[Kernel]:
    """What ptxas said, with -v, of each function."""
    found = FUNCTION.findall(report)
    mangled = "\n".join(name for name, *_ in found)
    names = subprocess.run(["c++filt", "-p"], input=mangled, capture_output=True, text=True, check=True)
    return [
        Kernel(arch, name.removeprefix("moka::cuda::"), int(registers or 0), int(stored), int(loaded))
        for name, (_, stored, loaded, registers) in zip(names.stdout.splitlines(), found, strict=True)
    ]


def compile_one(nvcc: Path, source: Path, arch: str) -> tuple[str, list[Kernel]]:
    """The compiler's complaint, if any, and the functions of `source` for `arch`."""
    with tempfile.NamedTemporaryFile(suffix=".o") as out:
        command = [nvcc, *FLAGS, *gencode_flags([arch]), f"-I{ROOT / 'csrc'}", "-c", source, "-o", out.name]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stderr + done.stdout
    return (f"{source.name} for sm_{arch}:\n{text}", []) if done.returncode else ("", functions(text, arch))


def unlisted(kernels: list[Kernel]) -> list[str]:
    """A sentence per spill that ALLOWED does not have."""
    problems = []
    for k in kernels:
        allowed = [
            most for archs, name, most, _ in ALLOWED if k.arch in archs.split() and re.search(name, k.name)
        ]
        if k.stored + k.loaded > 0 and k.stored > max(allowed, default=-1):
            problems.append(f"sm_{k.arch}: {k.stored} bytes spilled, {k.loaded} loaded: {k.name}")
    return problems


def main() -> int:
    home = find_cuda_home()
    if home is None:
        print("moka: the CUDA kernels were not compiled: there is no CUDA toolkit (set CUDA_HOME to use one)")
        return 0
    jobs = list(product(sorted((ROOT / "csrc" / "kernels").glob("*.cu")), ARCHS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_one(Path(home, "bin", "nvcc"), *job), jobs))
    problems = [complaint for complaint, _ in results if complaint]
    kernels = [kernel for _, found in results for kernel in found]
    report = ROOT / "build" / "cuda_kernels.txt"
    report.parent.mkdir(exist_ok=True)
    lines = [f"sm_{k.arch} {k.registers} registers, {k.stored} bytes spilled: {k.name}\n" for k in kernels]
    report.write_text("".join(lines))
    problems = problems or unlisted(kernels)
    for problem in problems:
        print(f"moka: {problem}", file=sys.stderr)
    spilled = sum(k.stored > 0 for k in kernels)
    print(
        f"moka: {len(kernels)} CUDA kernels for sm_{', sm_'.join(ARCHS)}, {spilled} spill registers: {report}"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

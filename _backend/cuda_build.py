"""Decisions about the CUDA part of the build, apart from setup.py so that tests can call them."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

RELEASE_ARCHS = ("80", "86", "89", "90a")  # A100, A10 and RTX 30, L4 and RTX 40, H100 and H200
ARCH_PATTERN = re.compile(r"(sm_)?(\d{2,3}[af]?)")


def find_cuda_home() -> str | None:
    """The first folder that holds nvcc and the runtime's headers; a lone wrapper on PATH does not count."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).parents[1])]
    for home in filter(None, [*named, "/usr/local/cuda"]):
        if Path(home, "bin", "nvcc").is_file() and Path(home, "include", "cuda_runtime.h").is_file():
            return home
    return None


def fallback_headers(torch_package: Path) -> list[str]:
    """Flags with which nvcc finds, in torch's CUDA packages, headers that a small toolkit lacks."""
    folders = sorted(torch_package.parent.glob("nvidia/*/include"))
    return [f"-Xcompiler=-idirafter,{folder}" for folder in folders]


def nvcc_release(version_text: str) -> str:
    """`13.0` from the output of `nvcc --version`."""
    match = re.search(r"release (\d+\.\d+)", version_text)
    if match is None:
        raise ValueError(f"nvcc --version: expected 'release X.Y' in its output, got {version_text!r}")
    return match[1]


def check_cuda_major(nvcc: str, torch_cuda: str) -> None:
    """Raises when nvcc and torch are of different CUDA majors: their runtimes cannot share one process."""
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc is CUDA {nvcc} but this torch was built for CUDA {torch_cuda}: "
            f"point CUDA_HOME at a toolkit of major {torch_cuda.split('.')[0]}, install a torch built for "
            f"CUDA {nvcc.split('.')[0]}, or set MOKA_CUDA=0 for a build without CUDA"
        )


def choose_archs(requested: str | None, visible: Sequence[tuple[int, int]]) -> list[str]:
    """Architectures to compile for, such as `["80", "90a"]`.

    Args:
        requested: MOKA_CUDA_ARCHS, such as `80;90a` or `sm_80,sm_90a`; None or empty to choose.
        visible: compute capabilities of this machine's GPUs; without any, the release list is taken.
    """
    if requested:
        archs = re.split(r"[,;\s]+", requested.strip())
    else:
        native = [f"{major}{minor}" + ("a" if major == 9 else "") for major, minor in visible]
        archs = native or list(RELEASE_ARCHS)
    wrong = [arch for arch in archs if not ARCH_PATTERN.fullmatch(arch)]
    if wrong:
        raise ValueError(f"MOKA_CUDA_ARCHS: got {wrong[0]!r}, expected architectures such as 80;86;89;90a")
    unique = {arch.removeprefix("sm_") for arch in archs}
    return sorted(unique, key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's flags for native code of each architecture."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]

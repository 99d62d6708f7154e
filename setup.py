"""Compiles `moka._C` against the torch of the target environment; everything static is in pyproject.toml.

Environment: MOKA_CUDA=0 builds without CUDA, MOKA_CUDA_ARCHS chooses architectures (`80;90a`), MOKA_WERROR=1
makes warnings errors, MAX_JOBS limits parallel compilation.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_backend"))

import cuda_build  # noqa: E402
from moka_build import require_torch  # noqa: E402

CXX_FLAGS = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
# at::parallel_for is an OpenMP loop in a header. It is compiled but not linked with OpenMP: its symbols then
# come from the runtime that torch has loaded, and torch.set_num_threads governs its one thread pool.
CXX_FLAGS += ["-fopenmp"]


def git_commit() -> str:
    """The commit being built, with `+` when the tree differs from it; empty outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_facts(facts: dict[str, str]) -> Path:
    """Writes the header that csrc/build_info.cpp includes; when nothing changed, it is left alone."""
    header = ROOT / "build" / "generated" / "build_facts.h"
    text = "".join(f'#define MOKA_{name} "{value}"\n' for name, value in facts.items())
    if not header.is_file() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header


def cuda_archs(torch, sources: list[str]) -> list[str]:
    """The architectures to compile CUDA sources for; empty for a build without CUDA."""
    if not sources or torch.version.cuda is None or os.environ.get("MOKA_CUDA") == "0":
        return []
    cuda_home = cuda_build.find_cuda_home()
    if cuda_home is None:
        print("moka: building without CUDA, because there is no CUDA toolkit (set CUDA_HOME to use one)")
        return []
    os.environ["CUDA_HOME"] = cuda_home  # read when torch.utils.cpp_extension is imported
    shown = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True)
    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    try:
        cuda_build.check_cuda_major(cuda_build.nvcc_release(shown.stdout), torch.version.cuda)
        return cuda_build.choose_archs(os.environ.get("MOKA_CUDA_ARCHS"), visible)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"moka: {error}") from error


def extension() -> dict:
    """setup()'s arguments for `moka._C`."""
    require_torch()
    import torch

    def find(suffix: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}"))

    archs = cuda_archs(torch, find(".cu"))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    facts = {"TORCH_VERSION": torch.__version__, "CUDA_ARCHS": " ".join(archs), "GIT_COMMIT": git_commit()}
    facts["CUDA_VERSION"] = torch.version.cuda if archs else ""
    # The torch version is part of every command line, so another torch recompiles every file.
    flags = [*CXX_FLAGS, "-DMOKA_TORCH_" + re.sub(r"\W", "_", torch.__version__)]
    if os.environ.get("MOKA_WERROR") == "1":
        flags.append("-Werror")
    nvcc_flags = ["-O3", "-lineinfo", "-Xcompiler=-fopenmp", *cuda_build.gencode_flags(archs)]
    nvcc_flags += cuda_build.fallback_headers(Path(torch.__file__).parent)

    class KeepObjects(BuildExtension):
        """Compiles into build/ in every case: an editable install would throw the objects away."""

        def finalize_options(self) -> None:
            objects = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"
            self.build_temp = self.build_temp or str(objects)
            super().finalize_options()

    kind = CUDAExtension if archs else CppExtension
    module = kind(
        "moka._C",
        find(".cpp") + (find(".cu") if archs else []),
        include_dirs=[str(ROOT / "csrc"), str(write_facts(facts).parent)],
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        define_macros=[("MOKA_WITH_CUDA", "1")] if archs else [],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": KeepObjects}}


# A source archive and the metadata need no compiler and no torch.
compiles = {"sdist", "egg_info", "dist_info"}.isdisjoint(sys.argv)
setup(**(extension() if compiles else {}))

"""What is installed and what the extension was built with."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import ops
from ._native import built_for, extension_path
from .errors import NativeError

# As Linux names them, x86 and then Arm.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
                "amx_tile", "amx_bf16", "asimd", "sve", "bf16")  # fmt: skip
PACKAGES = ("transformers", "accelerate", "bitsandbytes", "safetensors", "numpy")


@dataclass(frozen=True)
class Info:
    """The answer of `moka.info()`; `str()` of it is what `moka info` prints.

    Attributes:
        moka, python, torch: versions.
        torch_cuda: the CUDA version torch was built for; None for a CPU build.
        gpus: names of the visible GPUs.
        extension: `"loaded"`, or why the compiled extension is not usable.
        built: what the extension was built with (torch, cuda, cuda_archs, compiler, git_commit); of one that
            does not load, only torch is known.
        cpu_isa: the instruction set the CPU kernels use: avx512, avx2 or scalar; None without the extension.
        cpu_features: those of `CPU_FEATURES` that this CPU has.
        packages: versions of the packages moka works with; None for an absent one.
    """

    moka: str
    python: str
    torch: str
    torch_cuda: str | None
    gpus: tuple[str, ...]
    extension: str
    built: dict[str, str]
    cpu_isa: str | None
    cpu_features: tuple[str, ...]
    packages: dict[str, str | None]

    def __str__(self) -> str:
        archs = self.built.get("cuda_archs") or "none (CPU build)"
        rows = {
            "moka": self.moka,
            "python": self.python,
            "torch": f"{self.torch} ({'CUDA ' + self.torch_cuda if self.torch_cuda else 'CPU build'})",
            "extension": self.extension,
            "built for torch": self.built.get("torch") or "unknown",
            "compiler": self.built.get("compiler") or "unknown",
            "git commit": self.built.get("git_commit") or "unknown",
            "CUDA archs": archs,
            "GPUs": ", ".join(self.gpus) or "none",
            "CPU kernels": self.cpu_isa or "none",
            "CPU features": " ".join(self.cpu_features) or "unknown",
            **{name: version or "not installed" for name, version in self.packages.items()},
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def info() -> Info:
    """Versions, the state of the extension, what this machine offers; never raises on a broken build.

    Example:
        >>> print(moka.info())                                  # doctest: +SKIP
    """
    try:
        ops.require_native()
    except NativeError as error:
        path = extension_path()
        version = built_for(path) if path else None
        extension, built, cpu_isa = str(error), {"torch": version} if version else {}, None
    else:
        from . import _C

        extension, built, cpu_isa = "loaded", _C.build_info(), _C.cpu_isa()
    return Info(
        moka=_version("moka") or "not installed",
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        extension=extension,
        built=built,
        cpu_isa=cpu_isa,
        cpu_features=_cpu_features(),
        packages={name: _version(name) for name in PACKAGES},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_features() -> tuple[str, ...]:
    """Empty where there is no /proc/cpuinfo, that is, outside Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    found = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return tuple(name for name in CPU_FEATURES if name in found)

"""Builds moka's extension. Everything static is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
setup(
    ext_modules=[CppExtension("moka._C", sources, extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-Wall"])],
    cmdclass={"build_ext": BuildExtension},
)

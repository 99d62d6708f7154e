"""Build backend: setuptools, compiling against the torch of the environment that moka is installed into.

Under pip's build isolation `sys.executable` is still the target environment's Python; only `sys.path` is
replaced. So that environment's site-packages are appended here (the isolated ones keep precedence)
and its torch is used. A second torch is never fetched: an extension compiled against another would not load.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

NO_TORCH = (
    "moka compiles against the torch it will run with, and found none in this environment ({python}): "
    "install torch first, then moka again "
    "(add --no-build-isolation if torch is there but your installer hides it)."
)
OLD_TORCH = "moka needs torch 2.9 or newer, got {version}: upgrade it first, then install moka again"
OLD_SETUPTOOLS = (
    "moka builds with setuptools 77 or newer, got {version}: upgrade it, or leave out --no-build-isolation"
)
PRINT_PATH = "import json, sys; print(json.dumps([p for p in sys.path if p.endswith('-packages')]))"


def require_torch() -> None:
    """Makes the target environment's torch importable, or stops the build with one sentence."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(OLD_SETUPTOOLS.format(version=setuptools.__version__))
    if importlib.util.find_spec("torch") is None:
        # -I: ignore PYTHONPATH, through which pip replaced the path.
        command = [sys.executable, "-I", "-c", PRINT_PATH]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        sys.path += [path for path in json.loads(shown.stdout) if path not in sys.path]
        importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(NO_TORCH.format(python=sys.executable))
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return  # a source tree on the path
    if tuple(map(int, version.split(".")[:2])) < (2, 9):  # pip would replace it after moka was compiled
        raise SystemExit(OLD_TORCH.format(version=version))


def get_requires_for_build_sdist(config_settings=None):
    return []


def get_requires_for_build_wheel(config_settings=None):
    require_torch()
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    require_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    require_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    require_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel

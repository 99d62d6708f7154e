"""Loads the compiled extension, or explains why it does not load.

An extension built for another torch may fail with a raw undefined symbol, or load and then crash. So the
release it was built for is read from the file's bytes (csrc/build_info.cpp puts it there) and compared with
torch's before anything is loaded.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import re
from pathlib import Path

import torch

from .errors import NativeError

REBUILD = "pip install --no-deps --force-reinstall ."


def extension_path() -> Path | None:
    """The extension's file for this Python; None when it was not built."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    candidates = (Path(__file__).with_name("_C" + suffix) for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def built_for(path: Path) -> str | None:
    """The torch version that an extension file says it was built for, read without loading it."""
    match = re.search(rb"moka-built-for-torch=([\w.+]+);", path.read_bytes())
    return match[1].decode() if match else None


def load() -> NativeError | None:
    """Loads `moka._C`, which registers `torch.ops.moka`; returns the error to raise on first use, if any."""
    fix = f"Rebuild it in moka's source folder with: {REBUILD}"
    path = extension_path()
    if path is None:
        return NativeError(f"moka's compiled extension is missing (torch found: {torch.__version__}). {fix}")
    version = built_for(path)
    versions = f"built for torch {version or 'unknown'}, found torch {torch.__version__}"
    # The C++ ABI is kept within a minor release.
    if version is not None and version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return NativeError(f"moka's compiled extension does not fit this torch: {versions}. {fix}")
    try:
        importlib.import_module("moka._C")
    except ImportError as error:
        message = f"moka's compiled extension does not load: {versions}. {fix}\nThe loader said: {error}"
        failure = NativeError(message)
        failure.__cause__ = error
        return failure
    return None

"""What several commands share: loading a model with its adapter."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import ConfigError

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="embedded, a directory, a .gguf file or a hub id. Default: the adapter's."
    ),
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", "-a", help="Folder of a saved adapter.")]
QuantizeOption = Annotated[str, typer.Option("--quantize", "-q", help="nf4, bitsandbytes or none.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | None, adapter: Path | None, quantize: str, dtype: str, text: bool = True
) -> tuple[Any, Any]:
    """The model, with the adapter in it if there is one, and its tokenizer; None if `text` is false and there
    is none."""
    from ..checkpoint import load_adapter
    from ..loading import EMBEDDED, load_model

    quiet_libraries()
    name = model or (base_of(adapter) if adapter else EMBEDDED)
    loaded, tokenizer = load_model(name, quantize, parse_dtype(dtype), text=text)
    return (load_adapter(loaded, adapter) if adapter else loaded), tokenizer


def base_of(adapter: Path) -> str:
    """The model an adapter was trained on, as its `adapter_config.json` names it."""
    path = adapter / "adapter_config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); expected the folder of a saved adapter"
        ) from None
    if not name:
        raise ConfigError(f"{path}: names no base model; pass --model")
    return name


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of a `--dtype` option; None for "auto"."""
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {name!r}, expected one of {tuple(DTYPES)}")
    return DTYPES[name]


def quiet_libraries() -> None:
    """Turns off the progress bars of transformers, before it is imported; moka has its own. And the advice of
    bitsandbytes to install kernels for its layers on a CPU, which run on moka's here.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ImportError("this command needs transformers; install moka[hf]") from error
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

"""Loads a causal language model and its tokenizer from wherever it is, in 4 bits if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .embedded import model_file
from .errors import ConfigError
from .quantize import quantize as quantize_nf4

EMBEDDED = "embedded"
QUANTIZERS = ("nf4", "bitsandbytes", "none")


def load_model(
    name: str = EMBEDDED,
    quantize: str = "nf4",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    double_quant: bool = True,
    text: bool = True,
) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer.

    Args:
        name: "embedded" (SmolLM2-135M-Instruct), a directory of `save_pretrained`, a `.gguf` file, or a hub
            id.
        quantize: "nf4" by `moka.quantize`, "bitsandbytes", or "none".
        dtype: of all that is not in 4 bits; None is float32 on a CPU, where it is fastest, else bfloat16.
        device: None is the GPU if there is one.
        double_quant: absmax in 8 bits.
        text: the model is to read text; without, a folder without a tokenizer will do, and None is returned
            in its place.

    Raises:
        ConfigError: the name leads to no model, or to one without the tokenizer that `text` needs, or the
            options do not go together.
        DownloadError: the embedded model cannot be obtained.
        ImportError: transformers is not installed.

    Example:
        >>> model, tokenizer = moka.loading.load_model("embedded")       # doctest: +SKIP
    """
    if quantize not in QUANTIZERS:
        raise ConfigError(f"quantize: got {quantize!r}, expected one of {QUANTIZERS}")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
    except ImportError as error:
        raise ImportError("loading a model needs transformers; install moka[hf]") from error
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    path = model_file() if name == EMBEDDED else Path(name)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if quantize == "bitsandbytes":
            raise ConfigError("quantize: a GGUF file cannot be loaded by bitsandbytes; use quantize=nf4")
        source, files = str(path.parent), {"gguf_file": path.name}
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        source, files = name, {}
        if quantize == "bitsandbytes":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": str(device)}
    bare = _is_bare(Path(source))
    if bare and text:
        raise ConfigError(
            f"model: {name!r} has no tokenizer; save one beside it with tokenizer.save_pretrained({name!r})"
        )
    try:
        tokenizer = None if bare else AutoTokenizer.from_pretrained(source, **files)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **files, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {name!r} could not be loaded ({str(error).strip().splitlines()[0]}); "
            "expected 'embedded', a model directory, a .gguf file or a reachable hub id"
        ) from error
    if quantize == "nf4":
        model = quantize_nf4(model, double_quant=double_quant)
    if quantize != "bitsandbytes":
        model = model.to(device)
    model.name_or_path = model.config.name_or_path = name  # what an adapter records as its base
    return model.eval(), tokenizer


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds a model and nothing that could be a tokenizer's."""
    patterns = ("tokenizer*", "vocab*", "merges*", "*.model", "*.gguf")
    return (folder / "config.json").exists() and not any(
        file for pattern in patterns for file in folder.glob(pattern)
    )

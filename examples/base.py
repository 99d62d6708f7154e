"""The base model of the examples, as a folder or hub id that transformers can load in 4 bits."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from moka.embedded import cache_dir
from moka.loading import EMBEDDED, load_model

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # what a CPU computes fastest in
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=DTYPE,
)


def model_source(name: str) -> str:
    """`name` itself, or for "embedded" a folder of SmolLM2-135M-Instruct: bitsandbytes reads no GGUF file."""
    if name != EMBEDDED:
        return name
    folder = cache_dir() / "embedded-bfloat16"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            whole = Path(scratch, "model")
            for part in load_model(EMBEDDED, quantize="none", dtype=torch.bfloat16, device="cpu"):
                part.save_pretrained(whole)
            os.replace(whole, folder)  # never a folder with half a model
    return str(folder)

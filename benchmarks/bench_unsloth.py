"""The step of bench_model.py under Unsloth, which patches transformers and so needs a process of its own.

    python benchmarks/bench_unsloth.py FOLDER [--layers 8] [--steps 8]

Writes FOLDER/model_unsloth.csv. As in Unsloth's examples: adapters in fp32, autocast to bf16.
"""

import os

os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"} | dict(os.environ)
os.environ["UNSLOTH_COMPILE_DISABLE"] = os.environ.get("UNSLOTH_COMPILE_DISABLE", "1")

import unsloth  # isort: skip  # pyright: ignore[reportMissingImports]  # before transformers

import argparse
import tempfile
from pathlib import Path
from typing import Any

import bench_model
import torch
from cuda_timing import Table, ceilings, facts
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def save_base(folder: str, layers: int) -> None:
    """The random bf16 model and a tokenizer, as Unsloth loads from a folder alone."""
    bench_model.dense(layers).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def load(layers: int, r: int) -> Any:
    """Unsloth's QLoRA model, ready to train."""
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    with tempfile.TemporaryDirectory() as folder:
        save_base(folder, layers)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=bench_model.LENGTH, dtype=torch.bfloat16, load_in_4bit=True,
            local_files_only=True,
        )  # fmt: skip
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=r, lora_alpha=16, lora_dropout=0, bias="none", target_modules=targets,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    return model.train()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--steps", type=int, default=8, help="timed steps of each row")
    args = options.parse_args()
    about = facts("peft", "transformers", "unsloth", "unsloth_zoo", "trl", "triton") | ceilings()
    table = Table(args.folder / "model_unsloth.csv", about)
    model = load(args.layers, r=16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        figures = bench_model.measure(model, args.steps)
    tokens = bench_model.BATCH * bench_model.LENGTH
    table.add(run="Unsloth QLoRA, all linear, r=16", liger=0, layers=args.layers, tokens=tokens, **figures)


if __name__ == "__main__":
    main()

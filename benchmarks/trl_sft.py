"""The QLoRA script of TRL's documentation, with LoraConfig and with one line changed to moka's MokaConfig.

    python benchmarks/trl_sft.py DATA FOLDER [--steps 60] [--threads 1] [--model embedded] [--out FILE.csv]

The settings are those of "Using QLoRA with TRL" (huggingface.co/docs/trl/peft_integration): NF4 with double
quantization, bf16, r=32, lora_alpha=16, lora_dropout=0.05, learning rate 2e-4, and TRL's defaults otherwise.
DATA is a .jsonl file of rows with "instruction", "input" and "output"; the last ones are held out.

Each stage is a process of its own: an uninterrupted run, a run that stops in the middle, its resumption, the
base, the reloaded adapter, and merged models. FOLDER keeps adapters and one .json per stage; a stage that has
one is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from results import FOLDER, machine_facts
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from base import model_source

CONFIGS = {  # the one line that differs: from MODULE import NAME as LoraConfig
    "LoRA": ("peft", "LoraConfig"),
    "MoKA": ("moka.integrations.peft", "MokaConfig"),
}
HELD_OUT = 32
LENGTH = 256


def lora_config(variant: str) -> Any:
    """The configuration of the documentation's script, of the variant's class."""
    module, name = CONFIGS[variant]
    LoraConfig = getattr(import_module(module), name)
    return LoraConfig(r=32, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")


def quantization() -> Any:
    """NF4 with double quantization and bf16 products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


def conversations(data: Path) -> tuple[list[dict], list[dict]]:
    """Rows in TRL's conversational format: those to train on, and the held-out ones."""
    rows = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        rows.append({"messages": turns})
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def held_out_loss(model: Any, tokenizer: Any, rows: list[dict]) -> float:
    """Mean loss per token over whole conversations, as TRL trains on them."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=False)
        ids = ids[:, :LENGTH].to(model.device)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return total / count


def answer(model: Any, tokenizer: Any, row: dict) -> str:
    """The first 16 tokens of the model's greedy answer to a row."""
    inputs = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Clock(TrainerCallback):
    """Seconds of each step; ends the run after step `stop`."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.seconds = stop, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        control.should_training_stop |= state.global_step == self.stop


def train(args: argparse.Namespace, name: str, stop: bool = False, resume: bool = False) -> dict:
    """The documentation's script; `stop` ends it after half of the steps, `resume` goes on from there."""
    set_seed(0)  # the adapter starts at random, before the trainer seeds
    rows, held_out = conversations(args.data)
    base = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization(), device_map="auto"
    )
    clock = Clock(args.steps // 2 if stop else None)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(args.folder / name),
            learning_rate=args.learning_rate,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            max_length=LENGTH,
            logging_steps=1,
            save_steps=args.steps // 2,
            report_to="none",
            use_cpu=args.device == "cpu",
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(args.variant),
        callbacks=[clock],
    )
    model: Any = trainer.model  # with the adapter
    trainer.train(resume_from_checkpoint=resume or None)
    first, last = args.steps // 2 if resume else 0, args.steps // 2 if stop else args.steps
    if len(clock.seconds) != last - first:  # from the start the losses would be the same
        raise RuntimeError(f"{name}: ran {len(clock.seconds)} steps, expected {first} to {last}")
    adapter = args.folder / name / "adapter"
    trainer.save_model(str(adapter))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "losses": losses,
        "trainable": trained,
        "file_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "s_step": statistics.median(clock.seconds),
        "held_out": held_out_loss(model, AutoTokenizer.from_pretrained(args.model), held_out),
    }


def reload(args: argparse.Namespace, merge: str | None = "", base: bool = False) -> dict:
    """Loads the adapter of the uninterrupted run as a user does; `merge`: a dtype, or None for 4 bits.

    Each model is scored in a process of its own: on some CPUs bitsandbytes rearranges its weights at the
    first evaluation, and merging LoRA after that is wrong.
    """
    import_module(CONFIGS[args.variant][0])  # peft knows MoKA from here on
    _, held_out = conversations(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoPeftModelForCausalLM.from_pretrained(
        args.folder / "whole" / "adapter", quantization_config=quantization(), device_map="auto"
    )
    if base:
        with model.disable_adapter():
            return {"held_out": held_out_loss(model, tokenizer, held_out)}
    if merge != "":
        model = model.merge_and_unload(**{"into": getattr(torch, merge)} if merge else {})
    answered = answer(model, tokenizer, held_out[0])
    return {"held_out": held_out_loss(model, tokenizer, held_out), "answer": answered}


STAGES = {
    "whole": lambda args: train(args, "whole"),
    "half": lambda args: train(args, "halves", stop=True),
    "resumed": lambda args: train(args, "halves", resume=True),
    "base": lambda args: reload(args, base=True),
    "reloaded": reload,
    "merged-4bit": lambda args: reload(args, merge=None),
    "merged-bfloat16": lambda args: reload(args, merge="bfloat16"),
    "merged-float32": lambda args: reload(args, merge="float32"),
}


def stages(variant: str) -> list[str]:
    """Those that the variant has: LoRA merges into 4 bits alone, what MoKA refuses."""
    absent = ("merged-bfloat16", "merged-float32") if variant == "LoRA" else ("merged-4bit",)
    return [name for name in STAGES if name not in absent]


def weights_relF(first: Path, second: Path) -> float:
    """Largest |a - b|_F / |a|_F over the tensors of two adapter files; 0 when they are equal bit for bit."""
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (first, second))
    assert a.keys() == b.keys()
    return max(((a[k].double() - b[k].double()).norm() / a[k].double().norm()).item() for k in a)


def row(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of the CSV from the stages' files of one variant."""
    names = stages(args.variant)
    found = {name: json.loads((args.folder / f"{name}.json").read_text()) for name in names}
    whole, resumed = found["whole"], found["resumed"]
    # `resumed` logs the steps of the first half too: they are in its checkpoint
    differences = [abs(a - b) for a, b in zip(whole["losses"], resumed["losses"], strict=True)]
    middle = args.steps // 2
    return {
        "variant": args.variant,
        "steps": args.steps,
        "trainable": whole["trainable"],
        "file_bytes": whole["file_bytes"],
        "s_step": f"{whole['s_step']:.2f}",
        "loss_first5": f"{statistics.mean(whole['losses'][:5]):.4f}",
        "loss_last5": f"{statistics.mean(whole['losses'][-5:]):.4f}",
        "held_out_base": f"{found['base']['held_out']:.5f}",
        "held_out": f"{whole['held_out']:.5f}",
        "held_out_resumed": f"{resumed['held_out']:.5f}",
        "held_out_reloaded": f"{found['reloaded']['held_out']:.5f}",
        **{f"held_out_{name}": f"{found[name]['held_out']:.5f}" if name in found else ""
           for name in STAGES if name.startswith("merged")},
        "loss_difference_before_stop": f"{max(differences[:middle]):.1e}",
        "loss_difference_after_resume": f"{max(differences[middle:]):.1e}",
        "weights_relF_resumed": f"{weights_relF(args.folder / 'whole', args.folder / 'halves'):.1e}",
        "answers_equal": int(len({found[name]["answer"] for name in names if "answer" in found[name]}) == 1),
        **facts,
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("data", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--model", default="embedded", help="a folder, a hub id, or 'embedded'")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--learning-rate", type=float, default=2e-4)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=FOLDER / "trl_sft.csv")
    options.add_argument("--variant", choices=CONFIGS, help="with --stage: run that alone")
    options.add_argument("--stage", choices=STAGES)
    args = options.parse_args()
    if args.stage:
        (args.folder / f"{args.stage}.json").write_text(json.dumps(STAGES[args.stage](args)))
        return
    versions = {name: metadata.version(name) for name in ("transformers", "peft", "trl")}
    facts, rows, top = machine_facts(args) | versions, [], args.folder
    for args.variant in CONFIGS:
        args.folder = top / args.variant
        args.folder.mkdir(parents=True, exist_ok=True)
        for stage in stages(args.variant):
            if (args.folder / f"{stage}.json").exists():
                continue
            command = [sys.executable, __file__, str(args.data), str(args.folder), "--stage", stage]
            command += ["--variant", args.variant, "--model", model_source(args.model)]
            command += ["--steps", str(args.steps), "--device", args.device]
            command += ["--learning-rate", str(args.learning_rate)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        rows.append(row(args, facts))
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

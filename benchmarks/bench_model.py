"""A whole training step on one GPU: Llama-3-8B's shape cut to 8 layers, 4 x 1024 tokens, beside peers.

    python benchmarks/bench_model.py FOLDER [--layers 8] [--steps 8] [--only TEXT ...]

Forward and backward, no optimizer, no checkpointing, sdpa attention, random weights; every row has a model of
its own. The embeddings' output requires a gradient in every row, so that each computes all of dx. Times are
wall-clock medians, host included. Every row runs without and with Liger's kernels (RMSNorm, rotary embedding,
SwiGLU, fused linear cross entropy), which patch transformers for the rest of the process and so come second.

Writes FOLDER/model.csv.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from cuda_timing import Table, ceilings, facts, steps
from peers import cast_trained
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moka

BATCH, LENGTH = 4, 1024
QV = ["q_proj", "v_proj"]
AUTOCAST = "fp32 under autocast"  # rows with peft's and Trainer's defaults


def config(layers: int) -> LlamaConfig:
    """Llama-3-8B with fewer layers."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, use_cache=False,
        attn_implementation="sdpa", torch_dtype=torch.bfloat16,
    )  # fmt: skip


def dense(layers: int) -> Any:
    """The model in bf16, frozen."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config(layers))
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).train()


def bitsandbytes(model: Any) -> Any:
    """The model with its linear layers, but for the output's, in bitsandbytes' NF4."""
    model.is_loaded_in_4bit = True  # as transformers says it, for peft to choose its classes
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        shape = module.in_features, module.out_features
        layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.cuda())
    return model


def lora(model: Any, targets: Any, r: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """peft's QLoRA, adapters in a dtype."""
    adapter = peft.LoraConfig(r=r, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter)
    cast_trained(model, dtype)
    return model


def accelerated_lora(model: Any, *settings: Any) -> Any:
    """The same on moka's kernels: all 4-bit layers, adapted or not."""
    return moka.accelerate(lora(bitsandbytes(model), *settings))


def mixture(model: Any, targets: Any) -> Any:
    """moka, r = 10."""
    return moka.inject(model, moka.MokaConfig(target_modules=targets, r=10))


#: Name -> what makes the row's model of a dense one.
ROWS: dict[str, Callable[[Any], Any]] = {
    "frozen bf16": lambda model: model,
    "frozen NF4, bitsandbytes": bitsandbytes,
    "bitsandbytes + moka.accelerate": lambda model: moka.accelerate(bitsandbytes(model)),
    "frozen NF4, moka": moka.quantize,
    "peft QLoRA, q and v, r=64": lambda model: lora(bitsandbytes(model), QV, 64),
    "peft QLoRA, q and v, r=64, accelerated": lambda model: accelerated_lora(model, QV, 64),
    "peft QLoRA, all linear, r=16": lambda model: lora(bitsandbytes(model), "all-linear", 16),
    "peft QLoRA, all linear, r=16, accelerated": lambda model: accelerated_lora(model, "all-linear", 16),
    f"peft QLoRA, all linear, r=16, {AUTOCAST}": lambda model: lora(
        bitsandbytes(model), "all-linear", 16, torch.float32
    ),
    f"peft QLoRA, all linear, r=16, {AUTOCAST}, accelerated": lambda model: accelerated_lora(
        model, "all-linear", 16, torch.float32
    ),
    "moka, q and v, bitsandbytes base": lambda model: mixture(bitsandbytes(model), QV),
    "moka, q and v, moka base": lambda model: mixture(moka.quantize(model), QV),
    "moka, all linear, bitsandbytes base": lambda model: mixture(bitsandbytes(model), "all-linear"),
    "moka, all linear, moka base": lambda model: mixture(moka.quantize(model), "all-linear"),
}


def planned_gib(model: Any) -> float | None:
    """What `moka.plan` expects of a moka row in place of `peak_gib`; None for the others."""
    adapters = getattr(model, "moka_config", None)
    if not adapters:
        return None
    plan = moka.plan(model.config, adapters["default"], batch=BATCH, sequence=LENGTH, optimizer="sgd")
    return round(plan.total_bytes / 2**30, 2)


def measure(model: Any, count: int, held: int = 0) -> dict[str, Any]:
    """Time, memory and size of one model's training step; `held`: bytes in use that are not the model's."""
    model.enable_input_require_grads()
    ids = torch.randint(0, 128000, (BATCH, LENGTH), device="cuda")
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(input_ids=ids, labels=ids).loss.backward()

    torch.cuda.reset_peak_memory_stats()
    t = steps(step, count)
    return {
        "ms": round(t.median_ms, 2), "p20_ms": round(t.p20_ms, 2), "p80_ms": round(t.p80_ms, 2),
        "tokens_s": round(BATCH * LENGTH / t.median_ms * 1e3),
        "peak_gib": round((torch.cuda.max_memory_allocated() - held) / 2**30, 2),
        "planned_gib": planned_gib(model), "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def release() -> None:
    """Gives back the memory of models no longer in use."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--steps", type=int, default=8, help="timed steps of each row")
    options.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    options.add_argument("--liger", choices=("both", "no", "yes"), default="both")
    args = options.parse_args()
    about = facts("peft", "transformers", "liger-kernel", "triton") | ceilings()
    table = Table(args.folder / "model.csv", about)
    failed: list[str] = []
    for liger in {"both": (False, True), "no": (False,), "yes": (True,)}[args.liger]:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        original = dense(args.layers)
        held = torch.cuda.memory_allocated()
        for name, make in ROWS.items():
            if not any(text in name for text in args.only):
                continue
            try:
                model = make(copy.deepcopy(original))
                autocast = torch.autocast("cuda", torch.bfloat16, enabled=AUTOCAST in name)
                with torch.cuda.nvtx.range(name), autocast:
                    figures = measure(model, args.steps, held)
                if liger:
                    figures["planned_gib"] = None  # the plan is of transformers' own modules
                table.add(run=name, liger=int(liger), layers=args.layers, tokens=BATCH * LENGTH, **figures)
            except Exception as error:  # the other rows are worth having
                failed.append(f"{name}: {error}")
            model = None
            release()
        del original
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()

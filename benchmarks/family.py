"""Starts, learning rates, pruning and small files: the embedded model (or another) after a few dozen steps.

    python benchmarks/family.py starts DATA FOLDER [--steps 60] [--seeds 3]
    python benchmarks/family.py rates DATA FOLDER [--steps 30] [--seeds 3]
    python benchmarks/family.py prune DATA FOLDER [--steps 60] [--seeds 3]
    python benchmarks/family.py quantized DATA FOLDER [--steps 60] [--seeds 3]
    python benchmarks/family.py layers - FOLDER [--sizes 4096x4096] [--tokens 512]

DATA is a .jsonl[.gz] file. The loss of a model is that on rows of the training set, the same in all runs.

starts  every method of starting, for each seed with the same data in the same order: after how many steps the
        loss is below the one that the zero start ends with (family_starts.csv)
rates   mixtures of 1, 4 and 16 components of one shape, scale="sqrt" and None, over learning rates
        (family_rates.csv)
prune   the zero start's loss without the components of least energy, or of least sensitivity (by gradients of
        half the batches), that hold 1 % of the energy together (family_prune.csv)
quantized  the zero start's adapter saved in fp32, int8 and int4 and loaded again: bytes of the file, relative
        error of the layers' updates, loss (family_quantized.csv)
layers  a training step (forward and backward) of one bitsandbytes NF4 layer: frozen, under peft's LoRA of
        rank 8, and under presets of moka, in turns (family_layers.csv)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_timing import Table, facts
from parity import evaluate
from peers import cast_trained
from timing import measure
from torch import Tensor

import moka
from moka.checkpoint import WEIGHTS
from moka.data import Collator, TextDataset, read_jsonl
from moka.loading import load_model

TARGETS = ["q_proj", "v_proj"]
PROBE = 8  # rows for the loss
EVERY = 10  # steps between two measurements
Batches = list[dict[str, Tensor]]
#: For the steps of one layer: Kron-LoRA's claim is a quarter of the parameters of a LoRA of rank 8.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # presets and their settings
    "lora": ("lora", {"r": 8}),
    "kron-lora": ("kron-lora", {}),
    "kron-lora, size=64": ("kron-lora", {"size": 64}),
    "lokr": ("lokr", {}),
    "moka": ("moka", {"r": 10}),
}


class Task:
    """Model and data; `batches` gives those of a seed."""

    def __init__(self, options: argparse.Namespace):
        self.base, tokenizer = load_model(options.model, dtype=torch.float32)
        rows = read_jsonl(options.data)[: options.steps * options.batch + PROBE]
        self.dataset = TextDataset(rows, tokenizer, options.length)
        self.collate = Collator(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
        self.size, self.count = options.batch, len(rows)

    def batches(self, seed: int) -> Batches:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return self._batches(order.tolist())

    def probe(self) -> Batches:
        return self._batches(list(range(PROBE)))

    def _batches(self, indices: list[int]) -> Batches:
        groups = (indices[i : i + self.size] for i in range(0, len(indices), self.size))
        batches = (self.collate([self.dataset[i] for i in group]) for group in groups)
        return [{k: v.to(self.base.device) for k, v in batch.items()} for batch in batches]

    def adapted(self, seed: int, **fields: Any) -> Any:
        torch.manual_seed(seed)
        return moka.inject(copy.deepcopy(self.base), moka.MokaConfig(target_modules=TARGETS, **fields))


def train(model: Any, batches: Batches, probe: Batches, lr: float) -> tuple[list[float], list[int]]:
    """AdamW at a constant rate after a short warm-up; losses, and after how many steps they were measured."""
    optimizer = torch.optim.AdamW(moka.param_groups(model, lr), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, steps = [evaluate(model, probe)], [0]
    for step, batch in enumerate(batches, 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / 4)
        model.train()
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVERY == 0 or step == len(batches):
            losses.append(evaluate(model, probe))
            steps.append(step)
    return losses, steps


def steps_to(losses: list[float], steps: list[int], goal: float) -> float | None:
    """After how many steps the loss is `goal`, between two measurements on the line through them."""
    for i in range(1, len(losses)):
        if losses[i] <= goal:
            part = (losses[i - 1] - goal) / max(losses[i - 1] - losses[i], 1e-12)
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return None


def starts(task: Task, options: argparse.Namespace) -> None:
    table = Table(options.folder / "family_starts.csv", facts("transformers"))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        batches, probe, goal = task.batches(seed)[: options.steps], task.probe(), None
        for method in options.methods:
            model = task.adapted(seed, **({"init": "residual"} if method == "residual" else {}), r=10)
            began = time.perf_counter()
            if method in ("gradient", "activation"):
                moka.start(model, method, batches[:4], norm=options.norm, seed=seed)
            spent = time.perf_counter() - began
            losses, steps = train(model, batches, probe, options.lr)
            goal = losses[-1] if goal is None else goal  # the zero start comes first
            reached = steps_to(losses, steps, goal)
            table.add(
                method=method, norm=options.norm, seed=seed, lr=options.lr, steps=steps[-1],
                first_loss=round(losses[0], 5), last_loss=round(losses[-1], 5),
                steps_to_zero_starts_loss=reached and round(reached, 1),
                share=reached and round(reached / steps[-1], 3), start_seconds=round(spent, 1),
                losses=" ".join(f"{loss:.4f}" for loss in losses),
            )  # fmt: skip
            del model


def prune(task: Task, options: argparse.Namespace) -> None:
    table = Table(options.folder / "family_prune.csv", facts("transformers"))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        batches, probe, model = task.batches(seed)[: options.steps], task.probe(), task.adapted(seed, r=10)
        (*_, loss), _ = train(model, batches, probe, options.lr)
        energy = {path: s.square() for path, s in moka.importance(model).items()}
        for batch in batches[: options.steps // 2]:
            model(**batch, use_cache=False).loss.backward()
        for rule, scores in (("energy", energy), ("sensitivity", moka.importance(model, sensitivity=True))):
            order = torch.cat(list(scores.values())).argsort()
            held = torch.cat(list(energy.values()))[order].cumsum(0)
            removed = int((held <= 0.01 * held[-1]).sum())
            own = copy.deepcopy(model)
            kept = sum(moka.prune(own, keep=len(order) - removed, scores=scores).values())
            pruned = evaluate(own, probe)
            table.add(
                rule=rule, seed=seed, components=len(order), kept=kept,
                energy_lost=f"{held[removed - 1] / held[-1]:.2e}", loss=round(loss, 6),
                loss_pruned=round(pruned, 6), change=f"{pruned / loss - 1:.2e}",
            )  # fmt: skip


def rates(task: Task, options: argparse.Namespace) -> None:
    table = Table(options.folder / "family_rates.csv", facts("transformers"))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, scale, k, lr in itertools.product(seeds, options.scales, (1, 4, 16), options.rates):
        batches, probe = task.batches(seed)[: options.steps], task.probe()
        model = task.adapted(seed, r=k, shapes="even", scale=None if scale == "r" else scale)
        losses, steps = train(model, batches, probe, lr)
        table.add(
            scale=scale, seed=seed, k=k, lr=lr, steps=steps[-1], first_loss=round(losses[0], 5),
            last_loss=round(losses[-1], 5),
        )  # fmt: skip


def quantized(task: Task, options: argparse.Namespace) -> None:
    table = Table(options.folder / "family_quantized.csv", facts("transformers"))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        probe, model = task.probe(), task.adapted(seed, r=10)
        losses, steps = train(model, task.batches(seed)[: options.steps], probe, options.lr)
        size = loss = None
        for scheme in (None, "int8", "int4"):
            with tempfile.TemporaryDirectory() as folder:
                errors = moka.save_adapter(model, folder, quantize=scheme).values()
                loaded = moka.load_adapter(copy.deepcopy(task.base), folder)
                own_size, own_loss = os.path.getsize(Path(folder, WEIGHTS)), evaluate(loaded, probe)
            size, loss = size or own_size, loss or own_loss  # fp32 comes first
            table.add(
                factors=scheme or "fp32", seed=seed, lr=options.lr, steps=steps[-1], bytes=own_size,
                share_of_fp32=round(own_size / size, 4),
                mean_error=f"{sum(errors) / max(len(errors), 1):.2e}",
                max_error=f"{max(errors, default=0.0):.2e}", base_loss=round(losses[0], 6),
                loss=round(own_loss, 6), change=f"{own_loss / loss - 1:.2e}",
            )  # fmt: skip


def layers(options: argparse.Namespace) -> None:
    import bitsandbytes
    import peft

    import moka.integrations.peft

    table = Table(options.folder / "family_layers.csv", facts("peft"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the fastest there, for peft's factors too
    for size in options.sizes:
        N, K = map(int, size.split("x"))
        torch.manual_seed(0)
        base = torch.nn.Sequential(
            bitsandbytes.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=dtype)
        ).to(device)
        models = {"frozen": base}
        lora = peft.LoraConfig(target_modules=["0"], r=8)
        models["peft LoRA r=8"] = peft.get_peft_model(copy.deepcopy(base), lora)
        cast_trained(models["peft LoRA r=8"], dtype)
        for name, (preset, fields) in VARIANTS.items():
            own = moka.preset(preset, target_modules=["0"], **fields)
            models[f"moka {name}"] = moka.inject(copy.deepcopy(base), own)
        x = torch.randn(options.tokens, K, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(options.tokens, N, device=device, dtype=dtype)
        calls = {name: partial(_step, model, x, grad) for name, model in models.items()}
        times = measure(calls, torch.device(device), repeat_s=options.seconds)
        for name, model in models.items():
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            own, peer = times[name], times["peft LoRA r=8"]
            table.add(
                N=N, K=K, M=options.tokens, variant=name, dtype=str(dtype)[6:], trained=trained,
                median_ms=round(own.median_ms, 2), p20_ms=round(own.p20_ms, 2), p80_ms=round(own.p80_ms, 2),
                ratio_to_peft_lora=round(own.median_ms / peer.median_ms, 3),
            )  # fmt: skip


def _step(model: torch.nn.Module, x: Tensor, grad: Tensor, call: int) -> None:
    model(x).backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["starts", "rates", "prune", "quantized", "layers"])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--norm", type=float, default=1.0, help="of the factors that moka.start sets")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["zero", "gradient", "activation", "residual"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--scales", nargs="+", default=["sqrt", "r"])
    parser.add_argument("--sizes", nargs="+", default=["4096x4096", "1536x576"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each variant of a layer")
    options = parser.parse_args()
    if options.what == "layers":
        layers(options)
        return
    runs = {"starts": starts, "rates": rates, "prune": prune, "quantized": quantized}
    runs[options.what](Task(options), options)


if __name__ == "__main__":
    main()

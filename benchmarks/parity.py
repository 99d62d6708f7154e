"""Training parity: the same run by the merged path, the factored path and MoKA in plain PyTorch.

    python benchmarks/parity.py MODEL DATA FOLDER [--steps 300] [--batch 8] [--length 256] [--seed 0]

MODEL is what `moka train model=` takes (a .gguf file, a folder, `embedded`), DATA a .jsonl[.gz] file.
Weights, initial factors, data and their order are the same in all runs; how the mixture is computed differs.
Writes FOLDER/parity.csv (one line per run), parity_losses.csv (one per step) and parity.png.

The end of a run is its mean loss over the last 50 steps, and its loss on rows that were not trained on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_train import TARGETS, with_plain_mixture
from cuda_timing import Table, facts
from torch import Tensor

import moka
from moka.data import Collator, TextDataset, read_jsonl
from moka.loading import load_model
from moka.plots import plot_losses

LAST = 50


def adapted(base: Any, path: str, seed: int) -> Any:
    """A copy of the model with adapters; equal initial factors for equal seeds."""
    torch.manual_seed(seed)
    plain = path == "plain PyTorch"
    config = moka.MokaConfig(target_modules=TARGETS, r=10, path="auto" if plain else path)
    model = moka.inject(copy.deepcopy(base), config)
    return (with_plain_mixture(model) if plain else model).train()


def train(model: Any, batches: Sequence[dict[str, Tensor]], learning_rate: float) -> list[float]:
    """AdamW with a linear decay after a warm-up of a twentieth; the loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    total, warmup = len(batches), max(1, len(batches) // 20)
    factor = lambda i: min((i + 1) / warmup, (total - i) / max(1, total - warmup))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean loss over batches."""
    model.eval()
    return torch.stack([model(**batch, use_cache=False).loss for batch in batches]).mean().item()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("model")
    options.add_argument("data", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    options.add_argument("--held-out", type=int, default=128, help="rows, the last of those read")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()

    base, tokenizer = load_model(args.model)
    device = base.device
    rows = read_jsonl(args.data)[: args.steps * args.batch + args.held_out]
    dataset = TextDataset(rows, tokenizer, args.length)
    collate = Collator(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    shuffled = torch.randperm(len(rows) - args.held_out, generator=torch.Generator().manual_seed(args.seed))
    held_out = range(len(rows) - args.held_out, len(rows))

    def batches(indices: Sequence[int]) -> list[dict[str, Tensor]]:
        groups = (indices[i : i + args.batch] for i in range(0, len(indices), args.batch))
        return [
            {k: v.to(device) for k, v in collate([dataset[i] for i in group]).items()} for group in groups
        ]

    seen, unseen = batches(shuffled.tolist()), batches(held_out)
    table = Table(args.folder / "parity.csv", facts("transformers"))
    curves = {}
    for path in ("merged", "factored", "plain PyTorch"):
        model, began = adapted(base, path, args.seed), time.perf_counter()
        losses = curves[path] = train(model, seen, args.learning_rate)
        seconds, last = time.perf_counter() - began, losses[-LAST:]
        table.add(
            path=path, steps=len(losses), batch=args.batch, seed=args.seed,
            first_loss=round(losses[0], 5), last_loss=round(sum(last) / len(last), 5),
            held_out_loss=round(evaluate(model, unseen), 5), seconds=round(seconds, 1),
        )  # fmt: skip
        del model
    with (args.folder / "parity_losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *curves])
        for step, values in enumerate(zip(*curves.values(), strict=True), 1):
            writer.writerow([step, *(f"{value:.5f}" for value in values)])
    plot_losses(curves, args.folder / "parity.png")


if __name__ == "__main__":
    main()

"""Scores a model on rows of any kind: multiple choice, perplexity of text, perplexity of answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .choice import ChoiceResult, Progress, evaluating, log_probs, logits_at, multiple_choice
from .data import IGNORED, Collator, Row, TextDataset, answer_positions, is_choice, to_choice
from .errors import DataError, NonFiniteError

__all__ = ["ChoiceResult", "answer_perplexity", "evaluate_rows", "multiple_choice", "perplexity"]


def evaluate_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int = 512,
    progress: Progress | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """Scores rows by what they are: multiple choice (`options`, `gold`), `text`, or else their answers.

    Args:
        max_length: tokens per window of text, or per row.
        details: add `scores` and `predictions` of each multiple-choice row.

    Raises:
        DataError: the first row decides the kind, and a later one is of another.
    """
    kinds = (is_choice, lambda row: "text" in row.data)
    kind = next((k for k in kinds if rows and k(rows[0])), None)
    for row in rows:
        if kind is not None and not kind(row):
            raise DataError(f"{row.place}: is of another kind than the first row; expected the same fields")
    if kind is is_choice:
        choices = [to_choice(row) for row in rows]
        result = multiple_choice(model, tokenizer, choices, progress=progress)
        lists = {"scores": result.scores, "predictions": result.predictions} if details else {}
        return result.summary() | lists
    if kind is not None:
        return perplexity(model, tokenizer, [row.data["text"] for row in rows], max_length, progress)
    return answer_perplexity(model, tokenizer, TextDataset(rows, tokenizer, max_length), progress)


def perplexity(
    model: Any, tokenizer: Any, texts: Iterable[str], max_length: int = 512, progress: Progress | None = None
) -> dict[str, float]:
    """`exp(-mean log p(token | tokens before it))` over texts cut into windows of `max_length` tokens.

    Windows do not overlap, so the first token of each is not predicted.

    Returns:
        perplexity, loss (nats per token), tokens (predicted), seconds.

    Raises:
        DataError: the texts hold fewer than two tokens.
        NonFiniteError: the model gives a NaN or infinite loss.
    """
    started = time.perf_counter()
    windows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        windows += [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataError("perplexity: the texts hold fewer than two tokens; expected some text")
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for done, window in enumerate(windows, 1):
            ids = torch.tensor([window], device=model.device)
            total -= log_probs(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]).sum().item()
            tokens += len(window) - 1
            if progress is not None:
                progress(done, len(windows))
    return _perplexity_result(total, tokens, started)


def answer_perplexity(
    model: Any, tokenizer: Any, dataset: TextDataset, progress: Progress | None = None, batch_size: int = 8
) -> dict[str, float]:
    """`exp(-mean log p(answer token | all before it))` over the answers of a data set.

    Returns:
        perplexity, loss (nats per answer token), tokens, seconds.
    """
    started = time.perf_counter()
    collate = Collator(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    order = sorted(range(len(dataset)), key=dataset.lengths().__getitem__)
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([dataset[i] for i in order[start : start + batch_size]])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            positions = answer_positions(labels)
            logits = logits_at(model, {**batch, "use_cache": False}, positions)
            targets = labels[:, positions + 1]
            answers = targets != IGNORED
            total -= log_probs(logits[answers], targets[answers]).double().sum().item()
            tokens += int(answers.sum())
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return _perplexity_result(total, tokens, started)


def _perplexity_result(total: float, tokens: int, started: float) -> dict[str, float]:
    loss = total / tokens
    if not math.isfinite(loss):
        raise NonFiniteError(f"perplexity: the loss is {loss}, expected a finite number")
    return {
        "perplexity": math.exp(min(loss, 700)),
        "loss": loss,
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
    }

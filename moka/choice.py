"""Multiple choice by log-likelihood.

    score(option) = sum_t log p(option_t | question, option_<t)
    accuracy: arg max of score              per character: arg max of score / number of characters

Many questions go through the model as one sequence without padding: each question once, followed by its
options, every one a branch that sees its question and itself but no other branch (a mask [1, 1, T, T] and
position numbers do this). A model that cannot honour such a mask is scored one sequence per option instead.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Choice, encode
from .errors import DataError, NonFiniteError

PACK_TOKENS = 512  # tokens per forward pass: enough for full speed on a CPU, small enough for the T x T mask
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class ChoiceResult:
    """What `multiple_choice` found.

    Attributes:
        accuracy, accuracy_per_char: share of questions whose right option has the highest score, or score per
            character.
        stderr: standard error of `accuracy`.
        scores: per question, the log-likelihood of each option, in nats.
        predictions: per question, the index of the option with the highest score.
        seconds: wall time.
    """

    accuracy: float
    accuracy_per_char: float
    stderr: float
    scores: list[list[float]]
    predictions: list[int]
    seconds: float

    def summary(self) -> dict[str, float]:
        """The figures without the lists, for a metrics file."""
        return {
            "accuracy": self.accuracy,
            "accuracy_per_char": self.accuracy_per_char,
            "stderr": self.stderr,
            "rows": len(self.predictions),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Branch:
    """One option after its question: the tokens past the shared ones, and how many of the last are scored."""

    ids: list[int]
    scored: int


@dataclass(frozen=True)
class _Tree:
    """A tokenized question: the tokens that all options share, then a branch per option."""

    index: int
    prefix: list[int]
    branches: list[_Branch]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


def multiple_choice(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Choice],
    pack_tokens: int = PACK_TOKENS,
    progress: Progress | None = None,
    packed: bool | None = None,
) -> ChoiceResult:
    """Picks the option of highest log-likelihood for each question.

    Args:
        model: a causal language model of transformers; put in eval mode for the time being.
        tokenizer: its fast tokenizer.
        rows: the questions, from `moka.data.to_choice`.
        pack_tokens: tokens per forward pass.
        progress: called with (questions done, questions in all).
        packed: whether questions share a sequence; None tries it on the first question and falls back with a
            warning.

    Raises:
        DataError: there are no rows.
        NonFiniteError: the model gives a NaN or infinite score.

    Example:
        >>> result = moka.evaluate.multiple_choice(model, tokenizer, rows)      # doctest: +SKIP
        >>> round(result.accuracy, 2)                                           # doctest: +SKIP
        0.4
    """
    if not rows:
        raise DataError("evaluation: got no questions, expected at least one row with options and gold")
    started = time.perf_counter()
    trees = [_tree(tokenizer, i, row) for i, row in enumerate(rows)]
    scores: list[list[float]] = [[] for _ in rows]
    with evaluating(model), torch.inference_mode():
        if packed is None:
            packed = _supports_packing(model, trees[0])
        score = _score_packed if packed else _score_padded
        groups = _packs(trees, pack_tokens if packed else 0)
        done = 0
        for group in groups:
            for tree, values in zip(group, score(model, group), strict=True):
                scores[tree.index] = values
            done += len(group)
            if progress is not None:
                progress(done, len(rows))
    if not all(math.isfinite(value) for values in scores for value in values):
        bad = next(i for i, values in enumerate(scores) if not all(map(math.isfinite, values)))
        raise NonFiniteError(
            f"evaluation: question {bad} has the scores {scores[bad]}, expected finite numbers"
        )
    predictions = [_argmax(values) for values in scores]
    per_char = [
        _argmax([value / len(option) for value, option in zip(values, row.options, strict=True)])
        for values, row in zip(scores, rows, strict=True)
    ]
    accuracy = sum(p == row.gold for p, row in zip(predictions, rows, strict=True)) / len(rows)
    return ChoiceResult(
        accuracy=accuracy,
        accuracy_per_char=sum(p == row.gold for p, row in zip(per_char, rows, strict=True)) / len(rows),
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(rows)),
        scores=scores,
        predictions=predictions,
        seconds=time.perf_counter() - started,
    )


class evaluating:
    """Eval mode for the length of a `with` block; each module's own mode comes back after it."""

    def __init__(self, model: torch.nn.Module):
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        for module, training in self.modes:
            module.training = training


def _tree(tokenizer: Any, index: int, row: Choice) -> _Tree:
    encoded = []
    for option in row.options:
        text = f"{row.prompt} {option}"
        ids, inside = encode(tokenizer, text, [(len(row.prompt), len(text))])
        first = inside.index(True)
        encoded.append((ids, first))
    # a token may span the end of the prompt, so what is shared is decided on tokens
    shared = min(first for _, first in encoded)
    while shared and any(ids[:shared] != encoded[0][0][:shared] for ids, _ in encoded):
        shared -= 1
    if shared == 0:
        raise DataError(f"question {index}: the prompt {row.prompt!r} gives no token before the options")
    branches = [_Branch(ids[shared:], len(ids) - first) for ids, first in encoded]
    return _Tree(index, encoded[0][0][:shared], branches)


def _packs(trees: Sequence[_Tree], pack_tokens: int) -> Iterator[list[_Tree]]:
    """Consecutive questions, as many as fit into `pack_tokens`, at least one."""
    pack, size = [], 0
    for tree in trees:
        if pack and size + tree.tokens > pack_tokens:
            yield pack
            pack, size = [], 0
        pack.append(tree)
        size += tree.tokens
    if pack:
        yield pack


def _score_packed(model: Any, trees: Sequence[_Tree]) -> list[list[float]]:
    """Scores of every branch from one forward pass over all trees, laid end to end."""
    ids: list[int] = []
    positions: list[int] = []
    question: list[int] = []  # per token: which question it belongs to
    branch: list[int] = []  # per token: which branch, numbered over all questions; -1 in a prefix
    predict: list[int] = []  # positions whose output predicts a scored token
    targets: list[int] = []
    owners: list[int] = []  # the branch of each scored token
    count = 0
    for number, tree in enumerate(trees):
        last_of_prefix = len(ids) + len(tree.prefix) - 1
        parts = [(-1, tree.prefix, 0, 0)]
        parts += [(count + i, b.ids, len(tree.prefix), b.scored) for i, b in enumerate(tree.branches)]
        for owner, tokens, offset, scored in parts:
            start = len(ids)
            ids += tokens
            positions += range(offset, offset + len(tokens))
            question += [number] * len(tokens)
            branch += [owner] * len(tokens)
            for at in range(start + len(tokens) - scored, start + len(tokens)):
                predict.append(last_of_prefix if at == start else at - 1)
                targets.append(ids[at])
                owners.append(owner)
        count += len(tree.branches)

    device = model.device
    q, b = torch.tensor(question, device=device), torch.tensor(branch, device=device)
    visible = ((q[:, None] == q) & ((b == -1) | (b[:, None] == b))).tril()
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill_(
        ~visible, torch.finfo(model.dtype).min
    )
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "attention_mask": mask[None, None],
        "use_cache": False,
    }
    logits = logits_at(model, inputs, torch.tensor(predict, device=device))
    scored = log_probs(logits[0], torch.tensor(targets, device=device))
    sums = torch.zeros(count, dtype=torch.float64, device=device)
    values = sums.index_add_(0, torch.tensor(owners, device=device), scored.double()).tolist()
    flat = iter(values)
    return [[next(flat) for _ in tree.branches] for tree in trees]


def _score_padded(model: Any, trees: Sequence[_Tree]) -> list[list[float]]:
    """The plain way, which any causal language model can do: one padded batch of options per question."""
    results = []
    for tree in trees:
        sequences = [tree.prefix + branch.ids for branch in tree.branches]
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        values = []
        for row, (sequence, branch) in enumerate(zip(sequences, tree.branches, strict=True)):
            start = len(sequence) - branch.scored
            scored = log_probs(logits[row, start - 1 : len(sequence) - 1], ids[row, start : len(sequence)])
            values.append(scored.double().sum().item())
        results.append(values)
    return results


def _supports_packing(model: Any, tree: _Tree) -> bool:
    """Whether packed scores agree with plain ones; the question comes twice, to see that they stay apart."""
    plain = torch.tensor(_score_padded(model, [tree])[0])
    try:
        packed = torch.tensor(_score_packed(model, [tree, tree]))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        # 16-bit activations differ by up to half a nat in fifty; an ignored mask changes scores by many nats
        difference = (packed - plain).abs().max().item()
        if difference <= 0.02 * plain.abs().max().item() + 0.05:
            return True
        reason = f"scores differ by {difference:.2g} nats"
    warnings.warn(
        f"{type(model).__name__} does not take the packed attention mask ({reason}); "
        "scoring one sequence per option",
        stacklevel=3,
    )
    return False


def logits_at(model: Any, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Logits `[batch, len(positions), vocabulary]`; the output layer runs on those alone if it can."""
    forward = getattr(model, "forward", model)
    if "logits_to_keep" in inspect.signature(forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[target]` per row, in fp32; nan where a logit is not finite."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)

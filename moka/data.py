"""Training data: JSON Lines to token ids and labels, with the loss on the answer alone.

One JSON object per line, `.jsonl` or `.jsonl.gz`, UTF-8. Which fields a row has decides how it is read:

    prompt, completion              the text as it is
    messages                        the tokenizer's chat template; every assistant turn is an answer
    question, options, gold         "Question: {question}\\nAnswer:" + " {options[gold]}"
    instruction, options, gold      the same, with the question taken out of an LLM-Adapters instruction
    instruction, [input], output    the LLM-Adapters template (arXiv 2304.01933)

A row of more than `max_length` tokens loses tokens from the front of its prompt (a BOS token stays); when the
answer alone is too long, it loses its end.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .errors import DataError

IGNORED = -100  # the label that the loss skips
FORMATS = "prompt/completion, messages, question/options/gold or instruction/output"

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# An LLM-Adapters instruction: "Please ...: {question}\n\nAnswer1: ... Answer2: ...\n\nAnswer format: ..."
_INSTRUCTION_HEAD = re.compile(r"\APlease [^:]*: ")
_INSTRUCTION_TAIL = re.compile(r"\s*\n\n(Answer1|Solution1|Ending1|Option1|Answer format): .*\Z", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A parsed line and where it came from, for messages."""

    data: dict[str, Any]
    place: str  # "file.jsonl:12"


@dataclass(frozen=True)
class Text:
    """A whole text and the character spans of it that are answers."""

    text: str
    answers: tuple[tuple[int, int], ...]
    add_eos: bool  # a chat template ends its own turns


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: the text before the answer, the possible answers, the right one."""

    prompt: str
    options: tuple[str, ...]
    gold: int
    question: str = field(default="", compare=False)


def read_jsonl(path: str | Path) -> list[Row]:
    """The objects of a JSON Lines file, gzipped or not; blank lines are passed over.

    Raises:
        DataError: a line is not a JSON object (named by file and line number), the file cannot be read, or it
            is empty.
    """
    path = Path(path)
    rows = []
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(Row(_parse(line, f"{path}:{number}"), f"{path}:{number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected UTF-8 JSON Lines, .jsonl or .jsonl.gz"
        ) from error
    if not rows:
        raise DataError(f"{path}: holds no rows; expected one JSON object per line ({FORMATS})")
    return rows


def _open_text(path: Path) -> TextIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8")


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON: {error.msg} at column {error.colno}; fix or remove the line"
        ) from None
    if not isinstance(data, dict):
        raise DataError(f"{place}: got a JSON {type(data).__name__}, expected an object with {FORMATS}")
    return data


def is_choice(row: Row) -> bool:
    """Whether a row is a multiple-choice question."""
    return "options" in row.data and "gold" in row.data


def to_choice(row: Row) -> Choice:
    """The question of a row with `options`, `gold`, and `question` or an LLM-Adapters `instruction`.

    Raises:
        DataError: a field is missing or of the wrong type, or `gold` points to no option.
    """
    options, gold = row.data.get("options"), row.data.get("gold")
    if (
        not isinstance(options, list)
        or len(options) < 2
        or not all(isinstance(o, str) and o for o in options)
    ):
        raise DataError(f"{row.place}: options: got {options!r}, expected at least two non-empty strings")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise DataError(
            f"{row.place}: gold: got {gold!r}, expected the index of an option, 0 to {len(options) - 1}"
        )
    if "question" in row.data:
        question = _string(row, "question")
    else:
        question = _INSTRUCTION_TAIL.sub("", _INSTRUCTION_HEAD.sub("", _string(row, "instruction")))
    return Choice(f"Question: {question}\nAnswer:", tuple(options), gold, question)


def to_text(row: Row, tokenizer: Any) -> Text:
    """The text to train on and its answer spans; the module docstring lists the formats.

    Raises:
        DataError: the row has none of the formats, or a field of it is missing, empty or of the wrong type.
    """
    if "prompt" in row.data:
        return _joined(_string(row, "prompt", empty=True), _string(row, "completion"))
    if "messages" in row.data:
        return _chat(row, tokenizer)
    if is_choice(row):
        choice = to_choice(row)
        return _joined(choice.prompt, " " + choice.options[choice.gold])
    if "instruction" in row.data:
        template = ALPACA_INPUT if row.data.get("input") else ALPACA
        prompt = template.format(instruction=_string(row, "instruction"), input=row.data.get("input"))
        return _joined(prompt, _string(row, "output"))
    raise DataError(
        f"{row.place}: got the fields {', '.join(map(repr, row.data)) or 'none'}, expected {FORMATS}"
    )


def _joined(prompt: str, completion: str) -> Text:
    text = prompt + completion
    return Text(text, ((len(prompt), len(text)),), add_eos=True)


def _string(row: Row, name: str, empty: bool = False) -> str:
    value = row.data.get(name)
    if not isinstance(value, str) or not (value or empty):
        kind = "a string" if empty else "a non-empty string"
        raise DataError(f"{row.place}: {name}: got {value!r}, expected {kind}")
    return value


def _chat(row: Row, tokenizer: Any) -> Text:
    messages = row.data["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise DataError(
            f"{row.place}: messages: expected a list of objects with a string role and a string content"
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(
            f"{row.place}: messages: no message has the role 'assistant', so there is nothing to learn"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.place}: the tokenizer has no chat template; use prompt/completion for this model"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (text.startswith(before) and text.startswith(upto)):
            raise DataError(
                f"{row.place}: message {i}: the chat template rewrites earlier turns, so the answer cannot "
                "be located; use one row per answer or prompt/completion"
            )
        answers.append((len(before), len(upto)))
    return Text(text, tuple(answers), add_eos=False)


def encode(tokenizer: Any, text: str, answers: Sequence[tuple[int, int]], special: bool = True):
    """Token ids, and for each whether it ends inside an answer; by position, so that pad == eos is safe.

    Args:
        tokenizer: a fast tokenizer, which reports the characters of each token.
        special: whether the tokenizer adds its special tokens, such as BOS.
    """
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    inside = [any(start < end <= stop for start, stop in answers) for _, end in encoding["offset_mapping"]]
    return list(encoding["input_ids"]), inside


class TextDataset(torch.utils.data.Dataset):
    """Tokenized rows: `{"input_ids", "labels"}`, lists of ints; labels are `IGNORED` outside the answers.

    Args:
        rows: from `read_jsonl` or `rows_of`.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens per row; see the module docstring for what is cut.

    Attributes:
        truncated: how many rows were cut.

    Raises:
        DataError: there are no rows, or one of them does not fit its format.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int = 512):
        if not rows:
            raise DataError("the data set is empty; expected at least one row to train on")
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets; expected a fast one"
            )
        self.truncated = 0
        self.examples = [self._example(row, tokenizer, max_length) for row in rows]

    def _example(self, row: Row, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
        text = to_text(row, tokenizer)
        ids, inside = encode(tokenizer, text.text, text.answers, special=text.add_eos)
        if text.add_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids, inside = [*ids, tokenizer.eos_token_id], [*inside, True]
        elif text.add_eos:
            inside[-1] = True  # the tokenizer has appended EOS itself
        if not any(inside):
            raise DataError(f"{row.place}: the answer holds no token of its own; expected some text in it")
        if len(ids) > max_length:
            self.truncated += 1
            ids, inside = _truncate(ids, inside, max_length, tokenizer.bos_token_id)
        labels = [token if answer else IGNORED for token, answer in zip(ids, inside, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(example["input_ids"]) for example in self.examples]


def _truncate(ids: list[int], inside: list[bool], max_length: int, bos: int | None):
    """Drops prompt tokens from the front, then the end of the answer."""
    keep_bos = int(bos is not None and ids[0] == bos)
    prompt = inside.index(True)
    drop = min(len(ids) - max_length, prompt - keep_bos)
    ids, inside = ids[:keep_bos] + ids[keep_bos + drop :], inside[:keep_bos] + inside[keep_bos + drop :]
    return ids[:max_length], inside[:max_length]


class Collator:
    """Pads examples on the right to `input_ids`, `attention_mask` and `labels`, int64 `[batch, T]`."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def pad(values: Iterator[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in values])

        return {
            "input_ids": pad((e["input_ids"] for e in examples), self.pad_token_id),
            "attention_mask": pad(([1] * len(e["input_ids"]) for e in examples), 0),
            "labels": pad((e["labels"] for e in examples), IGNORED),
        }


def answer_positions(labels: Tensor) -> Tensor:
    """The positions whose output predicts an answer token in some row of labels `[batch, T]`; `[n]` int64."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]


def rows_of(objects: Iterable[dict[str, Any]], source: str) -> list[Row]:
    """Rows from objects in memory; messages name them `source[index]`."""
    return [Row(data, f"{source}[{i}]") for i, data in enumerate(objects)]

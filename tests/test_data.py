"""JSON Lines to token ids: the formats, the loss mask, truncation, and errors that name file and line."""

from __future__ import annotations

import gzip
import json

import pytest
from tiny import tiny_tokenizer

from moka.data import (
    IGNORED,
    Collator,
    Row,
    TextDataset,
    answer_positions,
    is_choice,
    read_jsonl,
    rows_of,
    to_choice,
    to_text,
)
from moka.errors import DataError

TOKENIZER = tiny_tokenizer()


def answer_of(row: dict, max_length: int = 512, tokenizer=TOKENIZER) -> str:
    """The text of the labelled tokens."""
    (example,) = TextDataset(rows_of([row], "test"), tokenizer, max_length)
    assert all(
        label in (IGNORED, token)
        for label, token in zip(example["labels"], example["input_ids"], strict=True)
    )
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def test_plain_and_gzipped_files_agree(tmp_path):
    lines = '{"prompt": "a", "completion": " b"}\n\n{"prompt": "c", "completion": " d"}\n'
    (tmp_path / "x.jsonl").write_text(lines)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(lines)
    plain, packed = read_jsonl(tmp_path / "x.jsonl"), read_jsonl(tmp_path / "x.jsonl.gz")
    assert [row.data for row in plain] == [row.data for row in packed]
    assert plain[1].place.endswith("x.jsonl:3")  # the blank line counts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n[1]\n', r"x\.jsonl:2: got a JSON list"),
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(tmp_path / "x.jsonl")


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    whole = gzip.compress(json.dumps({"prompt": "a" * 5000, "completion": "b"}).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
        read_jsonl(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "got the fields none"),
        ({"text": "x"}, "got the fields 'text'"),
        ({"prompt": "a"}, "completion: got None"),
        ({"prompt": "a", "completion": ""}, "completion: got ''"),
        ({"prompt": 3, "completion": "x"}, "prompt: got 3"),
        ({"instruction": "a"}, "output: got None"),
        ({"messages": "hi"}, "messages: expected a list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing to learn"),
        ({"question": "q", "options": ["a"], "gold": 0}, "at least two"),
        ({"question": "q", "options": ["a", "b"], "gold": 2}, "gold: got 2"),
        ({"question": "q", "options": ["a", "b"], "gold": True}, "gold: got True"),
        ({"options": ["a", "b"], "gold": 0}, "instruction: got None"),
    ],
)
def test_bad_rows_are_named(row, message):
    good = {"prompt": "a", "completion": " b"}
    with pytest.raises(DataError, match=rf"data\.jsonl\[1\]: .*{message}"):
        TextDataset(rows_of([good, row], "data.jsonl"), TOKENIZER)


def test_no_rows():
    with pytest.raises(DataError, match="empty"):
        TextDataset([], TOKENIZER)


def test_loss_is_on_the_answer_and_the_end_alone():
    assert answer_of({"prompt": "Question: x\nAnswer:", "completion": " the sun"}) == " the sun<|im_end|>"
    assert answer_of({"instruction": "Say it", "output": "the sun"}) == "the sun<|im_end|>"
    row = {"question": "Which?", "options": ["the dog", "the sun"], "gold": 1}
    assert answer_of(row) == " the sun<|im_end|>"


def test_every_assistant_turn_is_an_answer():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "the sun"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "the dog"},
    ]
    assert answer_of({"messages": messages}) == "the sun<|im_end|>\nthe dog<|im_end|>\n"


def test_a_template_that_rewrites_turns_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the sun"}]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        TextDataset(rows_of([{"messages": messages}], "x"), tokenizer)


def test_mask_is_by_position_where_pad_is_eos():
    """The prompt ends in EOS and padding repeats it: only the answer's own end gets a label."""
    rows = [
        {"prompt": "fox<|im_end|>", "completion": " dog"},
        {"prompt": "the lazy", "completion": " dog sleeps"},
    ]
    dataset = TextDataset(rows_of(rows, "x"), TOKENIZER)
    batch = Collator(TOKENIZER.pad_token_id)(list(dataset))
    eos = TOKENIZER.eos_token_id
    labelled = batch["labels"] != IGNORED
    assert batch["attention_mask"].tolist() == [
        [1] * n + [0] * (batch["labels"].shape[1] - n) for n in dataset.lengths()
    ]
    assert not labelled[batch["attention_mask"] == 0].any()
    assert ((batch["labels"] == eos).sum(1) == 1).all()
    assert (batch["input_ids"][0] == eos).sum() > 1


def test_answer_positions_predict_the_answers():
    rows = [{"prompt": "fox", "completion": " dog"}, {"prompt": "the lazy brown", "completion": " dog"}]
    batch = Collator(0)(list(TextDataset(rows_of(rows, "x"), TOKENIZER)))
    positions = answer_positions(batch["labels"]).tolist()
    for labels in batch["labels"].tolist():
        assert {i - 1 for i, label in enumerate(labels) if label != IGNORED} <= set(positions)
    assert answer_positions(batch["labels"].fill_(IGNORED)).numel() == 0


def test_truncation_drops_the_front_of_the_prompt_then_the_end_of_the_answer():
    tokenizer = tiny_tokenizer(bos=True)
    row = {"prompt": "The quick brown fox jumps over the lazy", "completion": " dog, and then it sleeps"}
    (full,) = TextDataset(rows_of([row], "x"), tokenizer)
    answer = [label for label in full["labels"] if label != IGNORED]
    assert full["input_ids"][0] == tokenizer.bos_token_id

    dataset = TextDataset(rows_of([row], "x"), tokenizer, max_length=len(answer) + 3)
    assert dataset.truncated == 1
    assert dataset[0]["input_ids"] == [tokenizer.bos_token_id, *full["input_ids"][-len(answer) - 2 :]]
    assert [label for label in dataset[0]["labels"] if label != IGNORED] == answer

    (short,) = TextDataset(rows_of([row], "x"), tokenizer, max_length=4)
    assert short["input_ids"] == [tokenizer.bos_token_id, *answer[:3]]


@pytest.mark.parametrize(
    ("instruction", "question"),
    [
        (
            "Please choose the correct answer to the question: Why: is it?\n\nAnswer1: a Answer2: b\n\n"
            "Answer format: answer1/answer2",
            "Why: is it?",
        ),
        ("Please answer the following question with true or false, question: is it?\n\n"
         "Answer format: true/false", "is it?"),
        ("Please choose the correct solution to the question: Do it\n\nSolution1: a\n\nSolution2: b\n\n"
         "Answer format: solution1/solution2", "Do it"),
        ("Please choose the correct answer to fill in the blank to complete the given sentence: A _ b.\n\n"
         "Option1: a Option2: b Answer format: option1/option2", "A _ b."),
        ("Why?", "Why?"),
    ],
)  # fmt: skip
def test_question_of_an_instruction(instruction, question):
    row = Row({"instruction": instruction, "options": ["a", "b"], "gold": 1, "output": "answer2"}, "x:1")
    assert is_choice(row)
    choice = to_choice(row)
    assert choice.prompt == f"Question: {question}\nAnswer:"
    assert to_text(row, TOKENIZER).text == f"{choice.prompt} b"  # the option, not its label

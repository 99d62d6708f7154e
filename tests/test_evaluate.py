"""Scores: packed equals plain, perplexity equals its definition, and what cannot be scored says so."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import SENTENCES, tiny_model, tiny_tokenizer

from moka import choice
from moka.data import Choice, TextDataset, rows_of
from moka.errors import DataError, NonFiniteError
from moka.evaluate import answer_perplexity, evaluate_rows, multiple_choice, perplexity

TOKENIZER = tiny_tokenizer()
ROWS = [
    Choice("Question: Which planet is nearest to the sun?\nAnswer:", ("Mercury", "the lazy dog", "air"), 0),
    Choice("Question: What do plants take?\nAnswer:", ("carbon dioxide", "carbon", "sleeps and jumps"), 0),
    Choice("Question: fox", ("a", "an", "then it sleeps", "!", "the the"), 2),
]


def naive(model, row: Choice) -> list[float]:
    """The definition: one sequence per option, log-probabilities of the option's tokens summed in float64."""
    scores = []
    for option in row.options:
        prompt = TOKENIZER(row.prompt)["input_ids"]
        whole = TOKENIZER(f"{row.prompt} {option}")["input_ids"]
        assert whole[: len(prompt)] == prompt
        ids = torch.tensor([whole])
        with torch.no_grad():
            log_probs = model.double()(input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(log_probs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
    model.float()
    return scores


@pytest.mark.parametrize("packed", [True, False, None], ids=["packed", "padded", "chosen"])
def test_scores_are_the_sums_of_log_probabilities(packed):
    model = tiny_model()
    expected = [naive(model, row) for row in ROWS]
    result = multiple_choice(model, TOKENIZER, ROWS, pack_tokens=70, packed=packed)
    for got, want in zip(result.scores, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    assert result.predictions == [max(range(len(s)), key=s.__getitem__) for s in expected]
    right = sum(p == row.gold for p, row in zip(result.predictions, ROWS, strict=True))
    assert result.accuracy == right / len(ROWS)


def test_packing_does_not_depend_on_the_neighbours():
    model = tiny_model()
    together = multiple_choice(model, TOKENIZER, ROWS * 3, pack_tokens=512, packed=True).scores
    alone = multiple_choice(model, TOKENIZER, ROWS, pack_tokens=1, packed=True).scores
    for got, want in zip(together, alone * 3, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_accuracy_per_character():
    model = tiny_model()
    result = multiple_choice(model, TOKENIZER, ROWS)
    best = [
        max(range(len(row.options)), key=lambda i, s=s, row=row: s[i] / len(row.options[i]))
        for s, row in zip(result.scores, ROWS, strict=True)
    ]
    assert result.accuracy_per_char == sum(b == r.gold for b, r in zip(best, ROWS, strict=True)) / len(ROWS)


def test_a_token_across_the_end_of_the_prompt():
    """' dog' is one token: with the prompt ending in a space, prompt and option share it."""
    row = Choice("the lazy", ("dog", "dog, and then"), 0)
    spaced = Choice("the lazy ", ("dog", "fox"), 0)
    model = tiny_model()
    for question in (row, spaced):
        packed = multiple_choice(model, TOKENIZER, [question], packed=True).scores
        padded = multiple_choice(model, TOKENIZER, [question], packed=False).scores
        assert packed[0] == pytest.approx(padded[0], abs=1e-4)


class IgnoresMask(torch.nn.Module):
    """A model that sees every earlier token of the sequence, whatever the mask says."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.device, self.dtype = model.device, model.dtype

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.model(input_ids=input_ids, position_ids=position_ids)


def test_a_model_that_ignores_the_mask_is_scored_plainly():
    model = tiny_model()
    with pytest.warns(UserWarning, match="IgnoresMask does not take the packed attention mask"):
        result = multiple_choice(IgnoresMask(model), TOKENIZER, ROWS)
    want = multiple_choice(model, TOKENIZER, ROWS, packed=False).scores
    for got, expected in zip(result.scores, want, strict=True):
        assert got == pytest.approx(expected, abs=1e-3)


def test_modes_come_back_and_progress_counts():
    model = tiny_model().train()
    model.model.layers[0].eval()
    seen = []
    multiple_choice(model, TOKENIZER, ROWS, pack_tokens=40, progress=lambda *args: seen.append(args))
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert seen[-1] == (3, 3)


def test_perplexity_is_its_definition():
    model, text = tiny_model(), " ".join(SENTENCES)
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    total, tokens = 0.0, 0
    for window in ids.split(16, dim=1):
        if window.shape[1] > 1:
            with torch.no_grad():
                log_probs = model(window).logits[0, :-1].double().log_softmax(-1)
            total -= log_probs.gather(1, window[0, 1:, None]).sum().item()
            tokens += window.shape[1] - 1
    result = perplexity(model, TOKENIZER, [text], max_length=16)
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_answer_perplexity_is_the_training_loss():
    """One batch: the same mean over answer tokens as the model's own loss on the same labels."""
    model = tiny_model()
    rows = rows_of([{"prompt": "The quick", "completion": " brown fox"}], "x")
    (example,) = dataset = TextDataset(rows, TOKENIZER)
    batch = {name: torch.tensor([values]) for name, values in example.items()}
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert answer_perplexity(model, TOKENIZER, dataset)["loss"] == pytest.approx(loss, rel=1e-5)
    longer = rows_of(
        [rows[0].data, {"prompt": "The lazy dog", "completion": " sleeps, and then it jumps"}], "x"
    )
    single = [answer_perplexity(model, TOKENIZER, TextDataset([row], TOKENIZER)) for row in longer]
    both = answer_perplexity(model, TOKENIZER, TextDataset(longer, TOKENIZER))
    tokens = sum(part["tokens"] for part in single)
    assert both["loss"] == pytest.approx(sum(p["loss"] * p["tokens"] for p in single) / tokens, rel=1e-5)


def test_rows_choose_their_score():
    model = tiny_model()
    options = {"question": "Which?", "options": ["dog", "fox"], "gold": 0}
    assert "accuracy" in evaluate_rows(model, TOKENIZER, rows_of([options], "x"))
    assert "perplexity" in evaluate_rows(model, TOKENIZER, rows_of([{"text": SENTENCES[2]}], "x"))
    assert "perplexity" in evaluate_rows(
        model, TOKENIZER, rows_of([{"prompt": "a", "completion": " b"}], "x")
    )
    with pytest.raises(DataError, match=r"x\[1\]: is of another kind"):
        evaluate_rows(model, TOKENIZER, rows_of([options, {"text": "a"}], "x"))


def test_nothing_to_score():
    model = tiny_model()
    with pytest.raises(DataError, match="no questions"):
        multiple_choice(model, TOKENIZER, [])
    with pytest.raises(DataError, match="fewer than two tokens"):
        perplexity(model, TOKENIZER, ["a"])


def test_a_broken_model_is_not_scored():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="question 0"):
        multiple_choice(model, TOKENIZER, ROWS, packed=True)
    with pytest.raises(NonFiniteError):
        perplexity(model, TOKENIZER, SENTENCES)


def test_a_shared_position_number_would_be_noticed(monkeypatch):
    """A mutant of the packing, in which branches see each other, must not pass for the real thing."""
    model = tiny_model()
    monkeypatch.setattr(
        torch.Tensor, "__eq__", lambda a, b: torch.ones_like(a, dtype=torch.bool), raising=True
    )
    broken = choice._score_packed(model, [choice._tree(TOKENIZER, 0, ROWS[0])])[0]
    monkeypatch.undo()
    want = multiple_choice(model, TOKENIZER, ROWS[:1], packed=False).scores[0]
    assert broken != pytest.approx(want, abs=1e-2)

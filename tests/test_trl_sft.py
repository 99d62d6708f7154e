"""benchmarks/trl_sft.py on a tiny model: MoKA trains in TRL's script, resumes, reloads and merges."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from tiny import SENTENCES, tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import trl_sft

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn of themselves


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """The line of the CSV that the stages of a run of 8 steps give."""
    folder = tmp_path_factory.mktemp("trl")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    data = folder / "rows.jsonl"
    parts = [sentence.partition("? " if "?" in sentence else ", ") for sentence in SENTENCES * 16]
    rows = [{"instruction": head, "input": "", "output": tail} for head, _, tail in parts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = argparse.Namespace(data=data, folder=folder, model=str(folder / "base"), variant="MoKA")
    args.steps, args.learning_rate, args.device = 8, 1e-2, "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for stage in trl_sft.stages("MoKA"):
            (folder / f"{stage}.json").write_text(json.dumps(trl_sft.STAGES[stage](args)))
        return {name: value for name, value in trl_sft.row(args, {}).items() if value != ""}


def test_it_learns(row):
    assert float(row["loss_last5"]) < float(row["loss_first5"])
    assert float(row["held_out"]) < float(row["held_out_base"]) - 0.005


def test_it_resumes(row):
    """Not to the bit: TRL trains factors in bf16, peft loads them into fp32."""
    assert row["loss_difference_before_stop"] == "0.0e+00"
    assert float(row["loss_difference_after_resume"]) < 0.02 and float(row["weights_relF_resumed"]) < 0.05


@pytest.mark.parametrize("model", ["resumed", "reloaded", "merged-bfloat16", "merged-float32"])
def test_every_model_scores_the_same(row, model):
    learned = float(row["held_out_base"]) - float(row["held_out"])
    assert float(row[f"held_out_{model}"]) == pytest.approx(float(row["held_out"]), abs=learned / 4)

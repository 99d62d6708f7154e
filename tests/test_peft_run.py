"""`moka run`: programs that load a MoKA adapter without knowing of moka."""

import json
import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_cases import randomize
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moka.cli.app import app
from moka.integrations.peft import MokaConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers deprecates
SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sorted({type(m).__name__ for m in model.modules() if hasattr(m, "moka_A")}))
sys.exit(7)
"""
TASK = """
task: tiny_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folders of a base model and of an adapter for it."""
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = get_peft_model(tiny_model(), MokaConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model, "default", 1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return base, folder


def moka_run(*command):
    """In this process, as `moka run` does it."""
    return CliRunner().invoke(app, ["run", "--", *map(str, command)])


def test_a_script_loads_an_adapter(adapter, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    lines = [[sys.executable, script], [sys.executable, "-m", "moka.cli", "run", "--", script]]
    plain, done = (
        subprocess.run(
            [*map(str, line), adapter[1]], capture_output=True, text=True, timeout=300, check=False
        )
        for line in lines
    )
    assert "KeyError: 'MOKA'" in plain.stderr  # what `moka run` is for
    assert (done.returncode, done.stdout.splitlines()[-1]) == (7, "['MokaPeftLinear']"), done.stderr


def test_modules_and_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "usec per loop" in moka_run("-m", "timeit", "-n", "1", "-u", "usec", "pass").stdout
    script = tmp_path / "script.py"
    script.write_text("open('missing')")
    done = moka_run(script)
    assert done.exit_code == 1 and "Traceback" in done.stderr and "FileNotFoundError" in done.stderr
    for command, message in (
        (["no-such-program"], "is not an installed Python program"),
        ([tmp_path / "none.py"], "is no file"),
        (["-m"], "got no module"),
    ):
        done = moka_run(*command)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval and datasets warn of themselves
def test_lm_eval_scores_an_adapter(adapter, tmp_path, monkeypatch):
    """lm-eval's command line on a task in a file, without a network."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"Question: which number follows {i}?\nAnswer:", "gold": f" {i + 1}"} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_task.yaml").write_text(TASK.format(data=data))
    done = moka_run(
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={adapter[0]},peft={adapter[1]}",
        "--tasks", "tiny_task", "--include_path", tmp_path, "--output_path", tmp_path / "out",
        "--device", "cpu", "--batch_size", "4",
    )  # fmt: skip
    assert done.exit_code == 0, done.output[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text())["results"]["tiny_task"]
    got = next(value for key, value in results.items() if key.startswith("perplexity,"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter[0]), adapter[1]).eval()
    assert got == pytest.approx(perplexity(model, rows), rel=1e-4)
    with model.disable_adapter():
        assert got != pytest.approx(perplexity(model, rows), rel=1e-2)


def perplexity(model, rows):
    """exp of the mean over rows of the negative log-likelihood of the answer, as lm-eval defines it."""
    tokenizer, losses = tiny_tokenizer(), []
    for row in rows:
        context, whole = (tokenizer(text).input_ids for text in (row["text"], row["text"] + row["gold"]))
        with torch.no_grad():
            # lm-eval cuts the embeddings to the size of the tokenizer
            scores = model(torch.tensor([whole])).logits[0, len(context) - 1 : -1, : len(tokenizer)]
        targets = torch.tensor(whole[len(context) :])
        losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item())
    return math.exp(sum(losses) / len(losses))

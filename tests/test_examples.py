"""The scripts of examples/ run on a tiny model, each as its user runs it, and print what they promise."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SENTENCES, tiny_model, tiny_tokenizer

import moka

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn of themselves
NUMBER = r"(-?[\d.]+(?:e[+-]\d+)?)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, monkeypatch, capsys, tmp_path):
    """Runs a script in this process, in an empty folder, without a network and a GPU; what it printed."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, "--model", str(base), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def before_and_after(name, printed):
    found = re.search(f"^{name} on .* rows: {NUMBER} before, {NUMBER} after$", printed, re.MULTILINE)
    assert found, printed
    return [float(number) for number in found.groups()]


def sft_rows():
    parts = [sentence.rpartition(":") for sentence in SENTENCES[:2] * 8]
    return [{"prompt": head + middle, "completion": tail} for head, middle, tail in parts]


def test_sft_learns_resumes_and_becomes_a_lora(run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sft_rows())
    options = ["--data", data, "--batch-size", 4, "--output", "sft"]
    before, after = before_and_after("loss", run("sft.py", *options, "--max-steps", 8))
    assert after < before - 0.1
    assert json.loads(Path("sft/checkpoint-8/trainer_state.json").read_text())["global_step"] == 8
    _, resumed = before_and_after("loss", run("sft.py", *options, "--max-steps", 12, "--resume"))
    assert resumed < after  # four more steps, from where the first run stopped
    config = json.loads(Path("sft/adapter_config.json").read_text())
    assert config["peft_type"] == "MOKA"

    printed = run("convert_to_lora.py", "--adapter", "sft", "--output", "lora", "--rank", 64)
    losses = re.search(f"base {NUMBER}, MoKA {NUMBER}, LoRA of rank 64 {NUMBER}$", printed, re.MULTILINE)
    base, adapter, lora = map(float, losses.groups())
    assert abs(base - adapter) > 0.1 and lora == pytest.approx(adapter, abs=2e-3)  # rank 64 is exact here
    assert json.loads(Path("lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    cut = run("convert_to_lora.py", "--adapter", "sft", "--output", "lora", "--rank", 2)
    full, small = (float(re.search(f"by {NUMBER}% of", text)[1]) for text in (printed, cut))
    assert full < 1 < small


def test_dpo_prefers_what_was_chosen(run, tmp_path):
    rows = [{"prompt": "Answer: ", "chosen": text, "rejected": text[::-1]} for text in SENTENCES * 4]
    printed = run("dpo.py", "--data", write_rows(tmp_path / "rows.jsonl", rows), "--max-steps", 3)
    before, after = before_and_after("loss", printed)
    assert before == pytest.approx(0.693, abs=0.01) and after < before - 0.05  # log 2: no preference yet
    assert before_and_after("rewards/margins", printed)[1] > 0.1
    assert Path("runs/dpo/adapter_model.safetensors").exists()


def test_one_batch_serves_several_adapters(run):
    printed = run("serve_adapters.py", "--max-steps", 20)
    answers = dict(re.findall(r"^ *(\w+): (['\"].*['\"])$", printed, re.MULTILINE))
    assert answers.keys() == {"__base__", "sailor", "teacher"} and len(set(answers.values())) == 3
    assert answers["sailor"].startswith("'A") and answers["teacher"].startswith("'G")  # Ahoy, Good
    differences = re.findall(f"running alone {NUMBER}$", printed, re.MULTILINE)
    assert len(differences) == 2 and all(float(number) < 1e-3 for number in differences)


def test_adapters_of_folders_are_served(run, base, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        model = moka.inject(tiny_model(), moka.MokaConfig(target_modules=["q_proj"], r=4))
        moka.save_adapter(model, folder)
    printed = run("serve_adapters.py", "--adapters", *folders, "--prompt", SENTENCES[0])
    assert re.findall(r"^(\w+): largest difference", printed, re.MULTILINE) == ["adapter0", "adapter1"]


def test_a_script_runs_from_any_folder(tmp_path):
    """In a process of its own, where Python itself finds what it imports."""
    command = [sys.executable, str(EXAMPLES / "convert_to_lora.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage"), done.stderr

"""The command line: configurations, every command on a tiny model, errors as one message, exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny import SENTENCES, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import moka
from moka.cli.app import app
from moka.cli.config import parse_value, read_config
from moka.errors import ConfigError
from moka.train import RunConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model, training rows and multiple-choice rows."""
    path = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": s[:cut], "completion": s[cut:]} for s in SENTENCES for cut in range(10, 30, 2)]
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = [{"question": "Which?", "options": ["dog", "fox"], "gold": i % 2} for i in range(6)]
    (path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in SENTENCES))
    return path


@pytest.fixture(scope="module")
def adapter(folder):
    """An adapter trained by `moka train`."""
    output = folder / "run"
    arguments = [*train_arguments(folder, output), "save_steps=2", f"eval_data={folder}/choices.jsonl"]
    result = moka_command(*arguments)
    assert result.exit_code == 0, result.output
    return output


def train_arguments(folder, output):
    places = [f"model={folder}/model", f"data={folder}/train.jsonl", f"output={output}"]
    return ["train", *places, "batch_size=8", "adapter.r=3", "learning_rate=1e-2", "max_steps=4"]


def moka_command(*arguments, **kwargs):
    return CliRunner().invoke(app, [str(a) for a in arguments], **kwargs)


def flat(text: str) -> str:
    """Without line breaks and color codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_file_then_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nadapter: {r: 4, gate: linear}\n")
    config = read_config(RunConfig, [str(tmp_path / "c.yaml"), "adapter.r=6", "epochs=2", "schedule=cosine"])
    assert (config.learning_rate, config.epochs, config.schedule) == (1e-3, 2.0, "cosine")
    assert (config.adapter["r"], config.adapter["gate"]) == (6, "linear")
    again = RunConfig(**yaml.safe_load(config.to_yaml()))
    assert again == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3e-3", 3e-3), ("true", True), ("[a, b]", ["a", "b"]), ("null", None), ("a: [", "a: [")],
)
def test_values_are_yaml(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"),
        (["adapter.rr=1"], "adapter: unknown key 'rr'; the nearest valid key is 'r'"),
        (["adapter.r=0"], "adapter: r: got 0, expected an integer from 1"),
        (["learning_rate=fast"], "learning_rate: got 'fast'"),
        (["epochs=0"], "epochs: got 0"),
        (["quantize=int3"], "quantize: got 'int3'"),
        (["seed.x=1", "seed=2", "seed.y=3"], "'seed' is a value"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["seed=1", "config.yaml"], "expected KEY=VALUE"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(RunConfig, arguments)


def test_bad_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\nepochs: [\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: not YAML: .*line 3"):
        read_config(RunConfig, [str(tmp_path / "c.yaml")])


def test_train_writes_its_results(adapter):
    metrics = json.loads((adapter / "metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["eval"]["rows"] == 6
    config = yaml.safe_load((adapter / "config.yaml").read_text())
    assert config["learning_rate"] == 0.01 and config["weight_decay"] == 0.0  # defaults are written too
    assert {p.name for p in adapter.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "data=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["train", "my.jsonl"], "rows are data=my.jsonl"),
        (["train", "lerning_rate=1"], "the nearest valid key is 'learning_rate'"),
        (["train", "adapter.target_modules=[nothing]"], "nothing"),
        (["train", "model=no such model"], "no such model"),
        (["train", "output=MODEL/config.json"], "File exists"),
        (["plan", "no such model"], "no such model"),
        (["plan", "nowhere/config.json"], "is no file; expected 'embedded'"),
        (["bench", "--shape", "12"], "shape: got '12', expected"),
        (["eval", "--adapter", "no/such"], "adapter_config.json: cannot be read"),
        (["eval", "--model", "MODEL", "--adapter", "no/such"], "no/such"),
        (["merge", "-a", "no/such", "-o", "MODEL/new"], "expected the folder of a saved adapter"),
        (["convert", "-a", "no/such", "-o", "MODEL/new"], "expected the folder of a saved adapter"),
        (["convert", "-a", "MODEL/config.json", "-o", "MODEL/new"], "expected the folder of a saved adapter"),
    ],
)
def test_errors_are_one_message(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if arguments[0] == "eval":
        arguments = ["eval", f"{folder}/choices.jsonl", *arguments[1:]]
    arguments = [a.replace("MODEL", f"{folder}/model") for a in arguments]
    if arguments[0] == "train":
        arguments = [*train_arguments(folder, tmp_path), *arguments[1:]]
    result = moka_command(*arguments)
    assert result.exit_code == 2
    assert "error:" in result.stderr and message in flat(result.stderr)
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback():
    result = moka_command("--debug", "train", "epochs=0")
    assert isinstance(result.exception, ConfigError)


def test_train_on_bitsandbytes_equals_moka_nf4(folder, adapter, tmp_path):
    """The base has the same bits, so the losses agree up to rounding, and so does the evaluation."""
    pytest.importorskip("bitsandbytes")
    arguments = [*train_arguments(folder, tmp_path / "bnb"), f"eval_data={folder}/choices.jsonl"]
    result = moka_command(*arguments, "quantize=bitsandbytes")
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads((p / "metrics.json").read_text()) for p in (adapter, tmp_path / "bnb"))
    losses = [[step["loss"] for step in metrics["history"]] for metrics in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ours["eval"]["accuracy"] == theirs["eval"]["accuracy"]


def test_eval_scores_each_file(folder, adapter, tmp_path):
    output = tmp_path / "scores.json"
    files = [f"{folder}/{name}.jsonl" for name in ("choices", "text", "train")]
    result = moka_command("eval", *files, "--adapter", adapter, "--limit", 4, "--output", output)
    assert result.exit_code == 0, result.output
    scores = json.loads(output.read_text())
    assert json.loads(result.stdout) == scores
    assert "scores" not in scores["results"][files[0]]
    assert scores["model"] == f"{folder}/model"  # from the adapter
    assert scores["results"][files[0]]["rows"] == 4
    assert scores["results"][files[1]]["perplexity"] > 1 and scores["results"][files[2]]["tokens"] > 0


def test_eval_details_repeat_bit_for_bit(folder, adapter):
    arguments = ["eval", f"{folder}/choices.jsonl", "--adapter", adapter, "--details"]
    first, second = (json.loads(moka_command(*arguments).stdout)["results"].popitem()[1] for _ in range(2))
    assert len(first["scores"]) == len(first["predictions"]) == 6
    assert first["scores"] == second["scores"]


def test_chat_answers_a_pipe(folder):
    result = moka_command(
        "chat",
        "--model",
        f"{folder}/model",
        "--max-new-tokens",
        3,
        input="hello\n/reset\n\nagain\n/exit\nnot\n",
    )
    assert result.exit_code == 0, result.output
    assert "/reset forgets" in flat(result.stderr)
    once = moka_command("chat", "--model", f"{folder}/model", "--max-new-tokens", 3, input="hello\n")
    assert result.stdout.startswith(once.stdout) and len(result.stdout) > len(once.stdout)


@pytest.mark.parametrize("quantizer", ["nf4", "bitsandbytes"])
def test_merge_writes_a_plain_model(folder, adapter, tmp_path, quantizer):
    """The merged 16-bit model gives the outputs of the adapted 4-bit model, up to rounding to float32."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "merged"
    options = "--dtype", "float32", "--quantize", quantizer
    result = moka_command("merge", "--adapter", adapter, "--output", output, *options)
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base.config.name_or_path = f"{folder}/model"
    adapted = moka.load_adapter(moka.quantize(base), adapter)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = adapted(ids).logits, merged(ids).logits
        with moka.disabled(adapted):
            plain = adapted(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want - plain).abs().max() > 1e-2  # the adapter does something
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_a_model_without_a_tokenizer(folder, tmp_path):
    """Commands that read no text take it, the others say what is missing."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    model.name_or_path = model.config.name_or_path = str(tmp_path / "model")
    moka.save_adapter(moka.inject(model, moka.MokaConfig()), tmp_path / "adapter")
    calls = {"merge": "adapter", "export-lora": "adapter", "convert": "export-lora", "analyze": "adapter"}
    for command, source in calls.items():
        places = "-a", tmp_path / source, "-q", "none"
        result = moka_command(
            command, *places, "--json" if command == "analyze" else "-o", tmp_path / command
        )
        assert result.exit_code == 0, result.output
    assert (tmp_path / "merge" / "config.json").exists()
    assert not list((tmp_path / "merge").glob("tokenizer*"))
    result = moka_command("eval", f"{folder}/choices.jsonl", *places)
    assert result.exit_code == 2 and "has no tokenizer; save one beside it with" in flat(result.stderr)


@pytest.mark.filterwarnings("default")  # shown by the command
def test_merge_warns_once_of_a_lost_update_and_names_its_flag(folder, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base.name_or_path = base.config.name_or_path = f"{folder}/model"
    model = moka.load_adapter(moka.quantize(base), adapter)
    for layer in moka.adapter_layers(model).values():
        layer.moka_B["default"].data.mul_(1e-3)
    moka.save_adapter(model, tmp_path / "small")
    result = moka_command("merge", "-a", tmp_path / "small", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    shown = flat(result.stderr)
    assert shown.count("warning: rounding to") == 1 and "into=" not in shown
    assert f"{len(moka.adapter_layers(model))} layers" in shown and "merge with --dtype float32" in shown


def test_merge_does_not_write_into_the_folder_of_an_adapter(adapter):
    before = {path.name for path in adapter.iterdir()}
    result = moka_command("merge", "--adapter", adapter, "--output", adapter)
    assert result.exit_code == 2 and "holds an adapter (adapter_config.json)" in flat(result.stderr)
    assert {path.name for path in adapter.iterdir()} == before


def test_plan_reads_a_configuration_alone(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)  # LLaMA2-7B
    for where in (tmp_path, tmp_path / "config.json"):
        result = moka_command("plan", where, "r=10", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["factor_parameters"] == 5_242_880
    assert "5242880" in re.sub(r"[ ,_]", "", moka_command("plan", tmp_path).stdout)


def test_bench_and_info():
    result = moka_command("bench", "--shape", "32x64", "--tokens", "1,4", "--seconds", 0.01)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("torch dense") == 2
    assert moka.__version__ in moka_command("info").stdout


def test_missing_libraries_are_named(monkeypatch):
    """Without the extra, one line that says what to install."""
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "moka.cli.app")
    with pytest.raises(SystemExit) as stop:
        moka.cli.main()
    assert stop.value.code == 2


def started(folder, output):
    """A long run in a process of its own, which has saved a checkpoint. It takes SIGINT, also where the tests
    run in the background of a shell, which has it ignored.
    """
    command = [sys.executable, "-m", "moka.cli", *train_arguments(folder, output), "max_steps=60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "save_steps=1"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    return process


def test_ctrl_c_says_what_is_left(folder, tmp_path):
    process = started(folder, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume=true goes on from the last checkpoint" in stderr


def test_a_real_process_stops_on_sigterm_and_goes_on(folder, tmp_path):
    output = tmp_path / "run"
    process = started(folder, output)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    stopped = json.loads((output / "metrics.json").read_text())
    assert stopped["interrupted"] and stopped["steps"] < 60
    result = moka_command(
        *train_arguments(folder, output), f"max_steps={stopped['steps'] + 1}", "resume=true"
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == stopped["steps"] + 1
    assert metrics["history"][: stopped["steps"]] == stopped["history"]

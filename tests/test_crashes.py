"""Saving and loading that is killed, interrupted, out of space or raced: the old adapter or the new one."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from adapter_files import DEFAULTS, adapted, base, randomize, same, state
from torch import nn

import moka
from moka import safefile
from moka.checkpoint import CONFIG, WEIGHTS

KILLED = """
import os, signal, sys
import torch
sys.path[:0] = [{tests!r}]
from adapter_files import adapted
import moka
torch.set_num_threads(1)
model, old = adapted(2), adapted(1)

def save_and_die(directory, at):
    calls = 0
    def wrap(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in ("open", "write", "fsync", "close", "replace"):
        wrap(name)
    moka.save_adapter(model, directory)
    os._exit(0)

for at in range(1, 100):
    directory = os.path.join(sys.argv[1], str(at))
    moka.save_adapter(old, directory)
    child = os.fork()
    if child == 0:
        save_and_die(directory, at)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_killed_save_leaves_the_old_or_the_new_adapter(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    old, new, outcomes = state(adapted(1)), state(adapted(2)), []
    for directory in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        model = base()
        config = json.loads((directory / CONFIG).read_text())  # whole, old or new
        assert config["r"] == 3
        moka.load_adapter(model, directory)
        assert same(model, old) or same(model, new)
        outcomes.append(same(model, new))
    # two files, each: open, write, sync, close, replace, then open, sync, close of the directory
    assert len(outcomes) == 17
    assert outcomes == [False] * 5 + [True] * 12
    assert not list((tmp_path / "17").glob(".*"))


def test_killed_between_the_two_files(tmp_path, monkeypatch):
    """The new adapter beside the old adapter_config.json loads whole, and the next save repairs the copy."""
    moka.save_adapter(adapted(1), tmp_path)
    old_config, new = (tmp_path / CONFIG).read_bytes(), adapted(2, r=5)
    moka.save_adapter(new, tmp_path)
    (tmp_path / CONFIG).write_bytes(old_config)
    with pytest.warns(UserWarning, match=rf"{CONFIG} differs.*{WEIGHTS}"):
        model = moka.load_adapter(base(), tmp_path)
    assert same(model, state(new)) and model.moka_config["default"].r == 5
    moka.save_adapter(model, tmp_path)
    moka.load_adapter(base(), tmp_path)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_full_disk(tmp_path, monkeypatch, file):
    moka.save_adapter(adapted(1), tmp_path)
    before = (tmp_path / file).read_bytes()
    real = safefile.write_atomic

    def write_atomic(path: Path, data: bytes) -> None:
        def full(descriptor, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if path.name == file:
                patch.setattr(os, "write", full)
            real(path, data)

    monkeypatch.setattr(safefile, "write_atomic", write_atomic)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{file}'"):
        moka.save_adapter(adapted(2, r=5), tmp_path)
    assert (tmp_path / file).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_saving_over_a_mapped_file(tmp_path):
    old, new = adapted(1), adapted(2)
    moka.save_adapter(old, tmp_path)
    key = "base_model.model.0.q.moka_A"
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as mapped:
        moka.save_adapter(new, tmp_path)
        assert torch.equal(mapped.get_tensor(key), old[0].q.moka_A["default"])
    assert same(moka.load_adapter(base(), tmp_path), state(new))


@pytest.mark.filterwarnings("ignore:.*differs from the configuration")
def test_two_writers_leave_one_whole_winner(tmp_path):
    models = [adapted(1), adapted(2, r=5)]
    failures: list[BaseException] = []

    def write(model: nn.Module) -> None:
        try:
            for _ in range(20):
                moka.save_adapter(model, tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for _ in range(20):
        if (tmp_path / WEIGHTS).exists():
            loaded = moka.load_adapter(base(), tmp_path)
            assert any(same(loaded, state(model)) for model in models), "a mixture of two adapters"
    for thread in threads:
        thread.join()
    assert failures == []
    loaded = moka.load_adapter(base(), tmp_path)
    assert any(same(loaded, state(model)) for model in models), "a mixture of two adapters in the end"
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("adapters", [[], ["first"], ["default"]])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_load_changes_nothing(tmp_path, monkeypatch, adapters, at):
    moka.save_adapter(adapted(), tmp_path)
    model, calls, real = base(), [], torch.Tensor.copy_
    for name in adapters:
        randomize(moka.inject(model, moka.MokaConfig(**DEFAULTS), name), 5)
    before = state(model)

    def copy_(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        moka.load_adapter(model, tmp_path)
    monkeypatch.undo()
    assert same(model, before)
    assert list(getattr(model, "moka_config", {})) == moka.active_adapters(model) == adapters
    moka.load_adapter(model, tmp_path)  # and once more, without the interrupt
    assert torch.equal(model[0].q.moka_A["default"], adapted()[0].q.moka_A["default"])

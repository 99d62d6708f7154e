"""`MokaTrainer` and `moka train` in two processes: one run's numbers and files; faults stop all of them.

On a machine with two GPUs `pytest -m cuda tests/test_distributed_train.py` runs all of it on NCCL.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from adapter_files import base
from conftest import NO_GPU
from processes import WORLD
from test_distributed import adapted, assert_near, whole
from test_train import OBJECTS, TOKENIZER, losses, make_trainer, settings
from tiny import tiny_model

import moka
from moka.errors import ConfigError, NonFiniteError
from moka.integrations.preflight import check_accelerator, is_fsdp_module
from moka.integrations.trainer import MokaTrainer, checkpoint_problem
from moka.layout import is_sharded

ROOT = Path(__file__).parents[1]
ADAPTER = {"target_modules": ["q_proj", "v_proj"], "r": 3}
STEPS = 6  # two epochs of three steps of 4 rows
KINDS = ("ddp", "shard")


def trainer_of(kind: str, output: Path, **changes) -> MokaTrainer:
    """A trainer of the NF4 model: 2 rows per process and step, or 4 accumulated in one process."""
    values = {"batch_size": 2, "keep_checkpoints": 9, "learning_rate": 1e-2, "adapter": ADAPTER, **changes}
    if kind == "one":
        values["gradient_accumulation"] = 2
    model = adapted(seed=2, **ADAPTER)
    if kind == "shard":
        moka.shard(model)
    return make_trainer(settings(output, **values), model)


def train_two(kind: str, output: Path, resume: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = trainer_of(kind, output)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == STEPS
    return losses(trainer), whole(trainer.model)


def train_one(output: Path, resume: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = trainer_of("one", output)
    trainer.train(resume_from_checkpoint=resume)
    adapter = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses(trainer), adapter


def assert_same_run(result, expected) -> None:
    assert result[0] == pytest.approx(expected[0], rel=1e-5)
    assert result[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert_near(result[1][name], tensor, name)


@pytest.fixture(scope="module")
def one(processes, tmp_path_factory):
    """The run in one process: its folder, losses and adapter."""
    output = tmp_path_factory.mktemp("one")
    return output, processes.alone(train_one, output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_one_process_and_either_resumes_the_other(processes, one, tmp_path, kind):
    folder, expected = one
    for result in processes.run(train_two, kind, tmp_path, False):
        assert_same_run(result, expected)
    checkpoint = tmp_path / "checkpoint-4"
    assert checkpoint_problem(checkpoint) is None
    files = {path.name for path in checkpoint.iterdir()}
    assert files - {"rng_state_0.pth", "rng_state_1.pth"} == {
        path.name for path in (folder / "checkpoint-4").iterdir()
    } - {"rng_state.pth"}

    shutil.copytree(folder / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    for result in processes.run(train_two, kind, tmp_path / "two", True):
        assert_same_run(result, expected)
    shutil.copytree(checkpoint, tmp_path / "one" / "checkpoint-4")
    assert_same_run(processes.alone(train_one, tmp_path / "one", True), expected)


def poisoned(kind: str, output: Path, where: str) -> None:
    trainer = trainer_of(kind, output)
    if dist.get_rank() == 1:
        layer = trainer.model.model.layers[1].self_attn.q_proj

        def hook(module, args, y):
            if trainer.state.global_step == 2 and where == "loss":
                return y * float("nan")
            if trainer.state.global_step == 2 and y.requires_grad:
                y.register_hook(lambda grad: grad * float("inf"))
            return y

        layer.register_forward_hook(hook)
    states = {}
    end = trainer.callback_handler.on_step_end

    def remember(*args):
        states[trainer.state.global_step] = whole(trainer.model)
        return end(*args)

    trainer.callback_handler.on_step_end = remember
    what = {
        "loss": r"process 1: the loss is nan; first module .*layers\.1\.self_attn\.q_proj",
        "gradient": r"process [01]: a gradient is not finite; .*moka_",
    }[where]
    with pytest.raises(NonFiniteError, match=rf"step 3: {what}"):
        trainer.train()
    for name, tensor in whole(trainer.model).items():
        assert torch.equal(tensor, states[2][name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_process_stops_all_before_the_optimizer(processes, tmp_path, kind, where):
    processes.run(poisoned, kind, tmp_path, where)


def terminated(output: Path) -> None:
    trainer = trainer_of("ddp", output, save_steps=100)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if dist.get_rank() == 1 and trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 3
    dist.barrier()
    assert checkpoint_problem(output / "checkpoint-3") is None


def test_sigterm_to_one_process_saves_and_stops_all(processes, tmp_path):
    processes.run(terminated, tmp_path)


def other_arguments(output: Path) -> None:
    trainer = trainer_of("ddp", output, learning_rate=1e-2 * (1 + dist.get_rank()))
    with pytest.raises(ConfigError, match=r"process 1 differs from process 0 in learning_rate: got 0\.02"):
        trainer.train()


def test_processes_with_other_arguments_are_refused(processes, tmp_path):
    processes.run(other_arguments, tmp_path)


def answers_on_one_process(output: Path) -> None:
    trainer = trainer_of("ddp", output, max_steps=2)
    inputs = trainer._prepare_inputs

    def prepare(batch):
        batch = inputs(batch)
        if dist.get_rank() == 1:
            batch["labels"].fill_(-100)
        return batch

    trainer._prepare_inputs = prepare
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in whole(trainer.model).values())


def test_a_process_without_answers_does_not_hang(processes, tmp_path):
    processes.run(answers_on_one_process, tmp_path)


def launch_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(ROOT / "examples" / config), "-m", "moka.cli"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    before = dict(os.environ)
    try:
        env = prepare_multi_gpu_env(args)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {key: value for key, value in env.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def train_by_accelerate(output: Path, environment: dict[str, str], sharded: bool):
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def as_if_on_gpus(self, *args, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        # accelerate offers FSDP to GPUs alone, but its code runs on a CPU too
        if sharded and dist.get_backend() == "gloo":
            patch.setattr(AcceleratorState, "__init__", as_if_on_gpus)
        trainer = trainer_of("ddp", output)
        trainer.train()
    assert is_fsdp_module(trainer.model) == sharded
    assert all(
        is_sharded(layer.base_layer.packed) == sharded
        for layer in moka.adapter_layers(trainer.model).values()
    )
    return losses(trainer), whole(trainer.model)


@pytest.mark.parametrize("name", ["accelerate_ddp.yaml", "accelerate_fsdp2.yaml"])
def test_the_examples_for_accelerate(processes, one, tmp_path, name):
    arguments = tmp_path, launch_environment(name), "fsdp" in name
    for result in processes.run(train_by_accelerate, *arguments):
        assert_same_run(result, one[1])


@pytest.mark.parametrize(
    ("plugin", "match"),
    [
        ({"fsdp_plugin": {"fsdp_version": 1}}, "fsdp_version: got 1, expected 2: FSDP1"),
        (
            {"fsdp_plugin": {"activation_checkpointing": True}},
            "fsdp_activation_checkpointing: .*gradient_check",
        ),
        ({"fsdp_plugin": {"cpu_ram_efficient_loading": True}}, "fsdp_cpu_ram_efficient_loading: got True"),
        ({"deepspeed_plugin": {"zero_stage": 3}}, "zero_stage: got 3, expected at most 2"),
    ],
)
def test_settings_of_accelerate_that_cannot_work(plugin, match):
    works = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
    for wanted, values in (("a", {}), (match, plugin)):
        plugins = {key: SimpleNamespace(**{**works, **value}) for key, value in values.items()}
        accelerator = SimpleNamespace(state=SimpleNamespace(**plugins), num_processes=1)
        if values:
            with pytest.raises(ConfigError, match=wanted):
                check_accelerator(accelerator, tiny_model())
        else:
            check_accelerator(accelerator, tiny_model())


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started.*use_cpu=True"):
        check_accelerator(SimpleNamespace(num_processes=1), tiny_model())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The tiny model in a folder, and data."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OBJECTS))
    return folder


def search_path(*folders: Path) -> str:
    """For PYTHONPATH: these first, then what it has here."""
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


def launch(*arguments: str | Path, seconds: float = 120) -> subprocess.CompletedProcess:
    """`torchrun` with two processes on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(WORLD),
        *map(str, arguments),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": search_path(ROOT, ROOT / "tests"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)


def test_moka_train_changes_its_launch_line_only(files, tmp_path):
    run = tmp_path / "run"
    options = [
        "data=" + str(files / "data.jsonl"),
        "batch_size=2",
        "epochs=2",
        "learning_rate=1e-2",
        "adapter.r=3",
    ]
    done = launch(
        "-m", "moka.cli", "train", f"model={files / 'model'}", *options, f"output={run}", "shard=true"
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("results are in", done.stdout)) == 1 and len(done.stdout.splitlines()) <= 2
    assert len(re.findall("training: 6/6", done.stderr)) == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == len(metrics["history"]) == 6 and metrics["processes"] == WORLD
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    assert {path.name for path in run.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.yaml",
        "metrics.json",
        "loss.png",
        "gates.png",
    }
    model = moka.load_adapter(moka.quantize(tiny_model(), double_quant=True), run)
    assert len(moka.adapter_layers(model)) == metrics["trainable_parameters"] // 339


KILLED = """
import os, signal, sys
from pathlib import Path
from test_distributed_train import trainer_of
trainer = trainer_of("ddp", Path(sys.argv[1]), save_steps=1)
step = trainer.training_step
def killed(*args, **kwargs):
    if os.environ["RANK"] == "1" and trainer.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
trainer.training_step = killed
trainer.train()
"""
RAISES = """
import sys, torch
from adapter_files import adapted
import moka
torch.distributed.init_process_group("gloo")
model = moka.shard(adapted())
for step in range(9):
    if torch.distributed.get_rank() == 1 and step == 2:
        raise ValueError("a fault of one process")
    moka.save_adapter(model, sys.argv[1])  # gathers
"""


def fails(tmp_path: Path, script: str) -> str:
    (tmp_path / "script.py").write_text(script)
    started = time.monotonic()
    done = launch(tmp_path / "script.py", tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - started < 100
    assert not list((tmp_path / "run").rglob(".*"))  # a partial file
    return done.stderr


def test_when_one_process_is_killed_all_end(tmp_path):
    """Although the trainer handles the SIGTERM that torchrun sends to the others."""
    fails(tmp_path, KILLED)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    assert all(checkpoint_problem(path) is None for path in checkpoints)


def test_when_one_process_raises_all_end(tmp_path):
    assert "a fault of one process" in fails(tmp_path, RAISES)
    moka.load_adapter(base(), tmp_path / "run")


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "options"),
    [("accelerate_ddp.yaml", []), ("accelerate_fsdp2.yaml", []), ("accelerate_ddp.yaml", ["shard=true"])],
    ids=["ddp", "fsdp2", "shard"],
)
def test_accelerate_launch(files, tmp_path, name, options):
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"{NO_GPU} for a second process")
    config = str(ROOT / "examples" / name)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", "moka.cli"]
    options = [f"model={files / 'model'}", f"data={files / 'data.jsonl'}", f"output={tmp_path}", *options]
    env = {**os.environ, "PYTHONPATH": search_path(ROOT)}
    subprocess.run([*command, "train", *options, "batch_size=2"], env=env, check=True, timeout=300)
    assert json.loads((tmp_path / "metrics.json").read_text())["processes"] == WORLD

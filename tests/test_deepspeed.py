"""DeepSpeed ZeRO-2 in two processes on the CPU; skipped where deepspeed is not installed."""

import os
import shutil
from importlib.util import find_spec

import pytest
from processes import Processes
from test_distributed_train import assert_same_run, train_one, train_two, trainer_of

from moka.errors import CheckpointFormatError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def processes(tmp_path):
    """Their own: accelerate remembers DeepSpeed until a process ends."""
    workers = Processes("gloo", tmp_path)
    yield workers
    workers.stop()


def train_zero2(*args):
    # what `accelerate launch` sets for distributed_type: DEEPSPEED and zero_stage: 2
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
    return train_two("ddp", *args)


def test_zero2_equals_one_process_and_resumes(processes, tmp_path):
    expected = train_one(tmp_path / "one")
    whole, _ = processes.run(train_zero2, tmp_path / "zero2", False, seconds=300)  # compiles at first
    assert_same_run(whole, expected)
    checkpoint = tmp_path / "zero2" / "checkpoint-4"
    assert (checkpoint / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").exists()

    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-4")
    for resumed in processes.run(train_zero2, tmp_path / "again", True):
        assert_same_run(resumed, whole)
    with pytest.raises(CheckpointFormatError, match="DeepSpeed"):
        trainer_of("one", tmp_path / "one").train(resume_from_checkpoint=str(checkpoint))

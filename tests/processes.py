"""Two processes joined by torch.distributed, kept between tests; a test that hangs in them is killed."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


class Processes:
    """Runs a function on every process at once.

    Args:
        backend: "gloo" on the CPU, "nccl" with one GPU per process.
        folder: of a test session, for the file through which the processes find each other.
    """

    def __init__(self, backend: str, folder: Any):
        self.backend, self.folder = backend, folder
        self.device = "cuda" if backend == "nccl" else "cpu"
        self.workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """`function(*args)` on every process; their results in the order of the ranks.

        Raises:
            AssertionError: with the traceback of each process that failed, or did not answer in time.
        """
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((function, args))
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self.workers)}
        results: list[Any] = [None] * WORLD
        problems: list[str] = []
        deadline = time.monotonic() + seconds
        while ranks:
            answered = wait(list(ranks), max(deadline - time.monotonic(), 0.0))
            if not answered:
                problems += [f"process {rank}: no answer" for rank in ranks.values()]
                break
            for pipe in answered:
                rank = ranks.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = False, "died"
                if not ok:
                    problems.append(f"process {rank}: {results[rank]}")
                    deadline = min(
                        deadline, time.monotonic() + 2
                    )  # the others may wait for the one that failed
        if problems:
            self.stop()
        assert not problems, "\n".join(problems)
        return results

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` outside of the group, on one GPU or the CPU."""
        if not torch.cuda.is_available():
            return function(*args)
        # transformers would take all the GPUs that it sees
        gpus = "0" if self.backend == "nccl" else ""
        with mp.get_context("spawn").Pool(1, _show_gpus, (gpus,)) as pool:
            return pool.apply(function, args)

    def stop(self) -> None:
        """Kills the processes; the next `run` starts others."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        meeting = f"file://{self.folder}/{time.monotonic_ns()}"
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.backend, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))


def _show_gpus(which: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = which


def _work(rank: int, backend: str, meeting: str, pipe: Any) -> None:
    # what torchrun sets, for accelerate
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD)
    )
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # not used: the processes meet in a file
    torch.set_num_threads(1)
    if backend == "gloo":
        _show_gpus("")
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=WORLD)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))

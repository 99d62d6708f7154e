"""The one timing entry of the benchmarks: `measure` times several variants of one computation, interleaved.

The variants take turns, so that a disturbance of the machine falls on all of them, and the order rotates. A
turn is one call, or as many as fill `turn_s` when calls are short, after one that is not timed. Warm-up and
repeats are given as time. Caches are cold: on CUDA the L2 cache is overwritten before each call, on the CPU
each call receives a running number by which it picks one of several copies of its weights (`copies`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[int], Any]  # takes the running number of the call


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile over `rounds` turns, in milliseconds per call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def measure(
    variants: Mapping[str, Call],
    device: torch.device,
    warmup_s: float = 0.05,
    repeat_s: float = 0.5,
    turn_s: float = 0.002,
    min_rounds: int = 3,
) -> dict[str, Timing]:
    """Times each variant, all in turn, for about `repeat_s` seconds per variant.

    Args:
        variants: name -> a function of the running call number; its result is discarded.
        device: where the variants run.
        warmup_s: time for which each variant is called beforehand, at least once.
        repeat_s: time spent per variant; a slow variant shortens the number of rounds for all.
        turn_s: what one turn lasts at least; on CUDA a turn is always one call.
        min_rounds: rounds made even if `repeat_s` is exceeded.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    calls_per_turn = {}
    for name, call in variants.items():
        fastest, start = math.inf, time.perf_counter()
        while time.perf_counter() - start < warmup_s or fastest == math.inf:
            fastest = min(fastest, clock(call, 0, 1))
        calls_per_turn[name] = 1 if device.type == "cuda" else max(1, min(64, math.ceil(turn_s / fastest)))

    names, samples = list(variants), {name: [] for name in variants}
    counter, rounds, start = 0, 0, time.perf_counter()
    while rounds < min_rounds or time.perf_counter() - start < repeat_s * len(names):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            n = calls_per_turn[name]
            with nvtx_range(name, device):
                if n > 1:  # thread pool, allocator and code are warm, as between the layers of a model
                    variants[name](counter)
                samples[name].append(1e3 * clock(variants[name], counter + 1, n))
            counter += n + 1
        rounds += 1
    return {name: summary(samples[name]) for name in names}


def summary(samples: list[float]) -> Timing:
    """Median and spread of times in milliseconds."""
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80, len(samples))


def _cpu_clock(call: Call, counter: int, n: int) -> float:
    """Seconds per call, over n calls."""
    start = time.perf_counter()
    for i in range(n):
        call(counter + i)
    return (time.perf_counter() - start) / n


def _cuda_clock(device: torch.device) -> Callable[[Call, int, int], float]:
    """Like `_cpu_clock` for one call, by events; the L2 cache is overwritten before the call."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def clock(call: Call, counter: int, n: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # also keeps the device busy while the host enqueues the call
        start.record(torch.cuda.current_stream(device))
        call(counter)
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def nvtx_range(name: str, device: torch.device) -> AbstractContextManager:
    """Marks the calls of one variant for Nsight on CUDA; nothing on the CPU."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


def copies(nbytes: int, device: torch.device, most: int = 32) -> int:
    """How many tensors of `nbytes` exceed the last-level cache of the CPU, at most `most`; 1 on CUDA."""
    if device.type == "cuda":
        return 1
    return max(2, min(most, math.ceil(_last_level_cache_bytes() / nbytes)))


def _last_level_cache_bytes() -> int:
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    unit = {"K": 1 << 10, "M": 1 << 20}
    return max(
        [int(size[:-1]) * unit[size[-1]] for size in sizes], default=64 << 20
    )  # not told: more than most have

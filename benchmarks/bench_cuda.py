"""Op and layer timings on one GPU beside their peers.

    python benchmarks/bench_cuda.py FOLDER [--only SECTION ...] [--quick]

Each section writes FOLDER/cuda_SECTION.csv, medians in microseconds.

    decode      few tokens: many layers in one CUDA graph, more weights than the L2 holds, time per layer
    forward     many tokens: one call, cold L2
    dequantize  NF4 to bf16, with the mixture merged in or without; one call, cold L2
    training    forward, gradient of the input and of the adapter, 4096 tokens; one call, cold L2;
                "graph" rows replay the step as a CUDA graph, without the host's part
    mixed       64 rows over 16 adapters, a token each (CUDA graph) and 32 each (one call), beside one adapter
    compiled    the training step of the mixture in plain PyTorch under torch.compile

"moka" is the layer as `moka.inject` makes it, "moka op" the functional form with the gates worked out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes as bnb
import torch
from cuda_peers import (
    DTYPE,
    dense,
    int4_call,
    linear4bit,
    operands,
    peft_layers,
    plain,
    with_lycoris,
    with_moka,
)
from cuda_timing import Call, Table, capture, ceilings, cold_calls, facts, graph_calls
from timing import Timing
from torch import Tensor, nn
from torch.nn.functional import linear

from moka import functional
from moka.rows import Rows

# layers, and how many fill the L2 four times; the last is of Qwen2.5-7B
COPIES = {
    (4096, 4096): 24, (1024, 4096): 80, (14336, 4096): 8, (4096, 14336): 8, (3584, 3584): 32,
}  # fmt: skip
Layers = dict[str, Callable[[], nn.Module]]
Timings = Iterator[tuple[int, dict[str, Timing]]]  # tokens, what -> time


def decode(N: int, K: int, quick: bool) -> Timings:
    """Few tokens, one CUDA graph per variant."""
    count = COPIES[N, K]
    weights, ints = [dense(N, K).weight for _ in range(count)], [int4_call(N, K) for _ in range(count)]
    adapted = [with_moka(linear4bit(N, K)).eval() for _ in range(count)]
    bases = [layer.base_layer for layer in adapted]
    ops = [operands(layer) for layer in adapted]

    def calls(x: Tensor) -> dict[str, list[Call]]:
        return {
            "cuBLAS bf16": [lambda w=w: linear(x, w) for w in weights],
            "bitsandbytes": [lambda y=y: y(x) for y in bases],
            "torch int4": [lambda f=f: f(x) for f in ints],
            "moka base": [lambda w=w: functional.nf4_linear(x, w) for w, _ in ops],
            "moka op": [lambda w=w, m=m: functional.moka_linear(x, w, None, *m) for w, m in ops],
            "moka": [lambda y=y: y(x) for y in adapted],
        }

    for tokens in (1, 16) if quick else (1, 4, 8, 16, 32, 64):
        yield tokens, graph_calls(calls(torch.randn(tokens, K, device="cuda", dtype=DTYPE)))


def forward(N: int, K: int, quick: bool) -> Timings:
    """Many tokens without gradients."""
    weight, layer = dense(N, K).weight, with_moka(linear4bit(N, K)).eval()
    w4, mixture = operands(layer)

    def calls(x: Tensor) -> dict[str, Call]:
        return {
            "cuBLAS bf16": lambda: linear(x, weight),
            "bitsandbytes": lambda: layer.base_layer(x),
            "moka base": lambda: functional.nf4_linear(x, w4),
            "moka op": lambda: functional.moka_linear(x, w4, None, *mixture),
            "moka": lambda: layer(x),
        }

    for tokens in (512, 4096) if quick else (128, 256, 512, 4096, 16384):
        yield tokens, cold_calls(calls(torch.randn(tokens, K, device="cuda", dtype=DTYPE)))


def dequantize(N: int, K: int, quick: bool) -> Timings:
    """NF4 to bf16."""
    layer = with_moka(linear4bit(N, K))
    (w4, mixture), weight = operands(layer), layer.base_layer.weight
    yield 0, cold_calls({
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(weight.data, weight.quant_state),
        "moka base": lambda: w4.dequantize(DTYPE),
        "moka op": lambda: w4.dequantize(DTYPE, mixture),
    })  # fmt: skip


def training(N: int, K: int, quick: bool, tokens: int = 4096) -> Timings:
    """Forward and backward of one layer."""
    base, adapted = dense(N, K), with_moka(linear4bit(N, K))
    layers: Layers = {
        "frozen bf16": lambda: base,
        "frozen bitsandbytes": lambda: adapted.base_layer,
        "moka": lambda: adapted,
    }
    peers: Layers = {
        "moka, bf16 base": lambda: with_moka(dense(N, K)),
        "plain PyTorch": lambda: plain(adapted),
    }
    if not quick:
        peers |= peft_layers(N, K) | {"LyCORIS LoKr, bf16 base": lambda: with_lycoris(dense(N, K))}
    yield tokens, time_steps(layers | peers, N, K, tokens) | time_steps(layers, N, K, tokens, graph=True)


def mixed(N: int, K: int, quick: bool, rows: int = 64, adapters: int = 16) -> Timings:
    """Rows that go through adapters of their own."""
    layers = [with_moka(linear4bit(N, K)).eval() for _ in range(COPIES[N, K] // 4)]
    names = [f"adapter{i}" for i in range(adapters)]
    for layer in layers:
        for name in names:
            layer.add_adapter(name, layer.configs["default"], layer.shapes["default"])
    assignment = Rows([names[i % adapters] for i in range(rows)])

    def call(layer: nn.Module, x: Tensor) -> None:
        layer.rows = assignment  # as moka.mixed_batch does for every layer of a model
        layer(x)
        layer.rows = None

    def calls(x: Tensor) -> dict[str, list[Call]]:
        several = [lambda y=y: call(y, x) for y in layers]
        return {"one adapter": [lambda y=y: y(x) for y in layers], f"{adapters} adapters": several}

    yield rows, graph_calls(calls(torch.randn(rows, 1, K, device="cuda", dtype=DTYPE)))
    if not quick:
        long = calls(torch.randn(rows, 32, K, device="cuda", dtype=DTYPE))
        yield rows * 32, cold_calls({name: each[0] for name, each in long.items()})


def compiled(N: int, K: int, quick: bool, tokens: int = 4096) -> Timings:
    """The mixture in plain PyTorch under torch.compile; compiling takes most of the time."""
    torch._dynamo.reset()
    layer = torch.compile(plain(with_moka(linear4bit(N, K))), dynamic=False)
    yield tokens, time_steps({"plain PyTorch, compiled": lambda: layer}, N, K, tokens)


def time_steps(layers: Layers, N: int, K: int, tokens: int, graph: bool = False) -> dict[str, Timing]:
    """Forward and backward of each; a layer that fails is reported and left out."""
    x = torch.randn(tokens, K, device="cuda", dtype=DTYPE, requires_grad=True)
    dy = torch.randn(tokens, N, device="cuda", dtype=DTYPE)
    calls: dict[str, Call] = {}
    leaves: list[Tensor] = [x]
    for name, make in layers.items():
        try:
            layer = make()
            trained = [p for p in layer.parameters() if p.requires_grad]
            if graph:
                graph_of = capture([lambda m=layer, t=trained: torch.autograd.grad(m(x), (x, *t), dy)])
                calls[f"{name}, graph"] = graph_of.replay
                continue
            layer(x).backward(dy)
        except Exception as error:  # a peer that does not run here must not end the run
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            continue
        calls[name] = lambda m=layer: m(x).backward(dy)
        leaves += trained
    return cold_calls(calls, leaves, seconds=0.5)


def write(table: Table, section: str, N: int, K: int, tokens: int, timings: dict[str, Timing]) -> None:
    """One row per variant."""
    for what, t in timings.items():
        us, p20, p80 = (round(1e3 * ms, 2) for ms in (t.median_ms, t.p20_ms, t.p80_ms))
        table.add(section=section, N=N, K=K, tokens=tokens, what=what, us=us, p20_us=p20, p80_us=p80)


SECTIONS = {f.__name__: f for f in (decode, forward, dequantize, training, mixed, compiled)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options.add_argument("--layers", nargs="+", help="of these sizes alone, such as 4096x4096")
    options.add_argument("--quick", action="store_true", help="fewer sizes and peers, one layer")
    args = options.parse_args()
    torch.manual_seed(0)
    about = facts("peft", "lycoris-lora", "triton") | ceilings()
    failed: list[str] = []
    for section in args.only:
        began = time.perf_counter()
        table = Table(args.folder / f"cuda_{section}.csv", about)
        for N, K in list(COPIES)[: 1 if args.quick else None]:
            if args.layers and f"{N}x{K}" not in args.layers:
                continue
            try:
                with torch.set_grad_enabled(section in ("training", "compiled")):
                    for tokens, timings in SECTIONS[section](N, K, args.quick):
                        write(table, section, N, K, tokens, timings)
            except Exception as error:  # the other layers and sections are worth having
                failed.append(f"{section} {N}x{K}: {error}")
            torch.cuda.empty_cache()
        print(f"{section}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()

"""Op and layer timings on one GPU beside their peers: python benchmarks/bench_cuda.py OUT.csv [--quick].

Many tokens: one call at a time with a cold L2 (triton's do_bench, medians). Few tokens: many copies of the
weight in one CUDA graph, time per layer. Peers run in the same process: cuBLAS on a dense weight,
bitsandbytes, the mixture in plain PyTorch (also compiled), peft's LoRA.
"""

import csv
import datetime
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from torch.nn.functional import linear
from triton.testing import do_bench

from moka import functional, nf4, reference
from moka.shapes import flatten_shapes, plan_shapes

LAYERS = {(4096, 4096): 24, (1024, 4096): 80, (14336, 4096): 8, (4096, 14336): 8}  # copies that fill the L2
DTYPE = torch.bfloat16


def microseconds(f):
    """Median of one call, cold L2."""
    return do_bench(f, warmup=10, rep=40, return_mode="median") * 1e3


def graph_microseconds(calls, repeats=15):
    """Median time per call of `calls` captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[repeats // 2]


class Layer:
    """One layer in every form that is timed."""

    def __init__(self, N, K):
        self.dense = torch.randn(N, K, device="cuda", dtype=DTYPE) / 50
        self.bnb = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        self.bnb.weight = bnb.nn.Params4bit(self.dense.cpu(), requires_grad=False, quant_type="nf4")
        self.bnb = self.bnb.cuda()
        self.shapes = plan_shapes(N, K, 10)
        make = lambda n: (torch.randn(n, device="cuda") / 100).requires_grad_()  # noqa: E731
        self.A, self.B = make(sum(s.a_numel for s in self.shapes)), make(sum(s.b_numel for s in self.shapes))
        self.alpha = torch.ones(len(self.shapes), device="cuda", requires_grad=True)

    @property
    def w4(self):
        return nf4.from_bitsandbytes(self.bnb)

    def moka(self, x, path="auto"):
        return functional.moka_linear(x, self.w4, None, self.A, self.B, self.alpha, self.shapes, path)

    def plain(self, x):
        factors = (self.A.to(DTYPE), self.B.to(DTYPE), self.alpha.to(DTYPE))
        return self.bnb(x) + reference.kron_mixture(x, *factors, self.shapes)


def lora(layer, rank):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = layer.bnb

        def forward(self, x):
            return self.q(x)

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["q"], lora_dropout=0.0)
    model = peft.get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    return model


def training_rows(N, K, quick, tokens=4096):
    layer = Layer(N, K)
    x = torch.randn(tokens, K, device="cuda", dtype=DTYPE, requires_grad=True)
    dy = torch.randn(tokens, N, device="cuda", dtype=DTYPE)

    def step(f):
        def run():
            x.grad = layer.A.grad = layer.B.grad = layer.alpha.grad = None
            f(x).backward(dy)

        return microseconds(run)

    yield "frozen bf16", step(lambda x: linear(x, layer.dense))
    yield "frozen bitsandbytes", step(layer.bnb)
    yield "moka", step(layer.moka)
    if not quick:
        yield "plain PyTorch", step(layer.plain)
        torch._dynamo.reset()
        yield "plain PyTorch, compiled", step(torch.compile(layer.plain))
        for rank in (16, 64):
            yield f"peft LoRA r={rank}", step(lora(Layer(N, K), rank))


def forward_rows(N, K, tokens):
    layer = Layer(N, K)
    x = torch.randn(tokens, K, device="cuda", dtype=DTYPE)
    yield "cuBLAS bf16", microseconds(lambda: linear(x, layer.dense))
    yield "bitsandbytes", microseconds(lambda: layer.bnb(x))
    yield "moka, base", microseconds(lambda: functional.nf4_linear(x, layer.w4))
    yield "moka", microseconds(lambda: layer.moka(x))


def dequantize_rows(N, K):
    layer = Layer(N, K)
    w, mix = layer.w4, (layer.A, layer.B, layer.alpha, flatten_shapes(layer.shapes))
    state = layer.bnb.weight.quant_state
    yield "bitsandbytes", microseconds(lambda: bnb.functional.dequantize_4bit(layer.bnb.weight.data, state))
    yield "moka, base", microseconds(lambda: w.dequantize(DTYPE))
    yield "moka", microseconds(lambda: torch.ops.moka.nf4_dequantize(*w.op_args(), DTYPE, *mix))


def decode_rows(N, K, layers, tokens):
    x = torch.randn(tokens, K, device="cuda", dtype=DTYPE)
    yield "cuBLAS bf16", graph_microseconds([lambda y=y: linear(x, y.dense) for y in layers])
    yield "bitsandbytes", graph_microseconds([lambda y=y: y.bnb(x) for y in layers])
    yield "moka, base", graph_microseconds([lambda y=y: functional.nf4_linear(x, y.w4) for y in layers])
    yield "moka", graph_microseconds([lambda y=y: y.moka(x) for y in layers])


def main(path, quick):
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    about = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "bitsandbytes": bnb.__version__,
        "peft": peft.__version__, "commit": commit, "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "N", "K", "tokens", "what", "microseconds", *about])

        def write(kind, N, K, tokens, rows):
            for what, value in rows:
                writer.writerow([kind, N, K, tokens, what, f"{value:.2f}", *about.values()])
                file.flush()
                print(f"{kind:10} {N:6} x {K:6} {tokens:6}  {what:26} {value:10.2f} us", flush=True)

        for (N, K), copies in LAYERS.items():
            write("training", N, K, 4096, training_rows(N, K, quick))
            with torch.no_grad():
                write("dequantize", N, K, 0, dequantize_rows(N, K))
                for tokens in (512, 4096) if quick else (512, 4096, 16384):
                    write("forward", N, K, tokens, forward_rows(N, K, tokens))
                layers = [Layer(N, K) for _ in range(copies)]
                for tokens in (1, 16) if quick else (1, 4, 8, 16, 32, 64):
                    write("decode", N, K, tokens, decode_rows(N, K, layers, tokens))


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv)

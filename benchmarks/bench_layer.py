"""One adapted NF4 layer, forward and training step, beside its peers in one run.

    python benchmarks/bench_layer.py [--quick] [--threads 2] [--device cpu] [--sizes NxK ...] [--out FILE.csv]

Forward: no gradients, eval mode. Step: forward, gradient of x and of the adapter; no optimizer. The peers:

    torch                    frozen dense layer, the baseline
    bitsandbytes             frozen NF4 layer as it comes: on a CPU with AVX-512-BF16 its forward repacks the
                             weight and computes in bf16; it then gives no gradients, so this peer has no step
    bitsandbytes-unpacked    the same with the repack switched off
    plain-moka               the mixture as a loop in PyTorch on `bitsandbytes-unpacked`, r = 10
    lora-r16                 peft's LoRA on the bitsandbytes layer, if peft is installed
    moka-frozen              moka's NF4 layer without an adapter
    moka-merged, moka-factored, moka-auto    moka.inject on the bitsandbytes layer, r = 10, by path

relF: of y (forward) or of the gradient of x (step), first 16 tokens, float64 with the dequantized weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peers import PlainMoka, bitsandbytes_layers, lora_layers, moka_layers
from results import Case, Row, device_guard, gemm_gflop, make_rows, parser, prepare, relative_error, write
from timing import Call, copies, measure
from torch import Tensor, nn

from moka import nf4, reference
from moka.layers import NF4Linear

SIZES = ("576x576", "1536x576", "4096x4096")
FORWARD_TOKENS = (1, 4, 16, 64, 256, 512, 2048)
STEP_TOKENS = (256, 512, 2048)
CHECKED = 16  # tokens whose result is compared with float64


@dataclass(frozen=True)
class Peer:
    """Copies of one layer, the dense weight in effect (float64) and the bytes of the weight as stored."""

    layers: Sequence[nn.Module]
    weight64: Tensor
    nbytes: int


def forward_peers(w: Tensor, dtype: torch.dtype) -> dict[str, Peer]:
    """Everything that computes a forward, ready for eval mode."""
    return _peers(w, dtype, as_it_comes=True)


def step_peers(w: Tensor, dtype: torch.dtype) -> dict[str, Peer]:
    """Everything that computes a training step."""
    return _peers(w, dtype, as_it_comes=False)


def _peers(w: Tensor, dtype: torch.dtype, as_it_comes: bool) -> dict[str, Peer]:
    n_dense, n_nf4 = copies(w.numel() * dtype.itemsize, w.device), copies(w.numel() // 2, w.device)
    bases = bitsandbytes_layers(w, n_nf4, dtype, repack=False)
    w4 = nf4.from_bitsandbytes(bases[0])
    dense = w4.dequantize(torch.float32)
    dense64 = dense.cpu().double()
    peers = {
        "torch": Peer([_linear(dense.to(dtype)) for _ in range(n_dense)], dense64, w.numel() * dtype.itemsize)
    }
    if as_it_comes:
        stock = bitsandbytes_layers(w, n_nf4, dtype, repack=True)
        peers["bitsandbytes"] = Peer(stock, dense64, w4.nbytes)
    peers["bitsandbytes-unpacked"] = Peer(bases, dense64, w4.nbytes)

    frozen = [NF4Linear(nf4.from_bitsandbytes(base)) for base in bases]
    peers["moka-frozen"] = Peer(frozen, dense64, w4.nbytes)

    first = moka_layers(bases[:1], "auto")[0]
    A, B, gate = (p["default"].data.normal_(std=0.1) for p in (first.moka_A, first.moka_B, first.moka_gate))
    shapes = first.shapes["default"]
    alpha = first.alpha("default").detach()
    factors = reference.split_factors(A, B, shapes)
    adapted64 = dense64.clone()
    for (A_i, B_i), alpha_i in zip(factors, alpha, strict=True):
        adapted64 += torch.kron(A_i.cpu().double(), B_i.cpu().double()) * alpha_i.item()
    plain = [PlainMoka(base, *zip(*factors, strict=True), gate, first.scaling["default"]) for base in bases]
    peers["plain-moka"] = Peer(plain, adapted64, w4.nbytes)
    if importlib.util.find_spec("peft"):
        peers["lora-r16"] = _lora(stock if as_it_comes else bases, dense64, w4.nbytes)
    for path in ("merged", "factored", "auto"):
        layers = moka_layers(bases, path)
        for layer in layers:
            for parameter, value in ((layer.moka_A, A), (layer.moka_B, B), (layer.moka_gate, gate)):
                parameter["default"].data.copy_(value)
        peers[f"moka-{path}"] = Peer(layers, adapted64, w4.nbytes)
    return peers


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _lora(bases: Sequence[nn.Module], dense64: Tensor, nbytes: int) -> Peer:
    layers = lora_layers(bases, r=16)
    down, up = (
        getattr(layers[0], name)["default"].weight.detach().cpu().double() for name in ("lora_A", "lora_B")
    )
    return Peer(layers, dense64 + up @ down, nbytes)


def forward_call(layers: Sequence[nn.Module], x: Tensor) -> Call:
    """The forward of one copy after another."""
    return lambda i: layers[i % len(layers)](x)


def step_call(layers: Sequence[nn.Module], x: Tensor, grad_y: Tensor) -> Call:
    """Forward and backward of one copy after another; returns the gradient of x."""

    def step(i: int) -> Tensor | None:
        layer = layers[i % len(layers)]
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(grad_y)
        return x.grad

    return step


def run_forward(args, peers: dict[str, Peer], case: Case, device: torch.device, repeat_s: float) -> list[Row]:
    """Times and checks one forward case."""
    dtype = getattr(torch, args.dtype)
    x = torch.randn(case.M, case.K, device=device, dtype=dtype)
    calls = {name: forward_call([layer.eval() for layer in peer.layers], x) for name, peer in peers.items()}
    with torch.no_grad():
        error = {
            name: relative_error(call(0)[:CHECKED], x[:CHECKED].cpu().double() @ peers[name].weight64.T)
            for name, call in calls.items()
        }
        timings = measure(calls, device, repeat_s=repeat_s)
    return make_rows(args, case, timings, _moved(peers, case, dtype, passes=1), error, "torch")


def run_step(args, peers: dict[str, Peer], case: Case, device: torch.device, repeat_s: float) -> list[Row]:
    """Times and checks one training step."""
    dtype = getattr(torch, args.dtype)
    x = torch.randn(case.M, case.K, device=device, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(case.M, case.N, device=device, dtype=dtype)
    calls = {
        name: step_call([layer.train() for layer in peer.layers], x, grad_y) for name, peer in peers.items()
    }
    error = {
        name: relative_error(call(0)[:CHECKED], grad_y[:CHECKED].cpu().double() @ peers[name].weight64)
        for name, call in calls.items()
    }
    timings = measure(calls, device, repeat_s=repeat_s)
    return make_rows(args, case, timings, _moved(peers, case, dtype, passes=2), error, "torch")


def _moved(peers: dict[str, Peer], case: Case, dtype: torch.dtype, passes: int) -> dict[str, float]:
    activations = case.M * (case.N + case.K) * dtype.itemsize
    return {name: passes * (peer.nbytes + activations) for name, peer in peers.items()}


def main() -> None:
    options = parser(__doc__, "layer.csv")
    options.add_argument("--sizes", nargs="+", help="N x K of the layers, default: " + " ".join(SIZES))
    args = options.parse_args()
    device, dtype = prepare(args), getattr(torch, args.dtype)
    forward_tokens, step_tokens = ((1, 16), (32,)) if args.quick else (FORWARD_TOKENS, STEP_TOKENS)
    sizes = args.sizes or (("96x64",) if args.quick else SIZES)
    repeat_s = 0.01 if args.quick else 0.25
    rows: list[Row] = []
    with device_guard(device):
        for N, K in (map(int, size.split("x")) for size in sizes):
            w = 0.02 * torch.randn(N, K, device=device)
            peers = forward_peers(w, dtype)
            for M in forward_tokens:
                rows += run_forward(
                    args, peers, Case("layer_forward", N, K, M, gemm_gflop(N, K, M)), device, repeat_s
                )
            peers = step_peers(w, dtype)
            for M in step_tokens:
                rows += run_step(
                    args, peers, Case("layer_step", N, K, M, 2 * gemm_gflop(N, K, M)), device, repeat_s
                )
    write(rows, args.out)


if __name__ == "__main__":
    main()

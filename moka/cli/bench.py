"""`moka bench`: one layer on this machine, beside torch and bitsandbytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from ..bases import NF4Linear
from ..config import MokaConfig
from ..errors import ConfigError
from ..inject import inject
from .common import DtypeOption, parse_dtype
from .console import out


def bench(
    shape: Annotated[str, typer.Option(help="out_features x in_features.")] = "576x576",
    tokens: Annotated[str, typer.Option(help="Token counts, separated by commas.")] = "1,512",
    r: Annotated[int, typer.Option(min=1, help="Components of the mixture.")] = 10,
    dtype: DtypeOption = "auto",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on each figure.")] = 0.3,
) -> None:
    """Time one layer: moka's NF4 layer with its mixture, a dense layer of torch, bitsandbytes in 4 bits."""
    N, K = _integers("shape", shape, "x", 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = parse_dtype(dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    layers = build_layers(N, K, r, kind, device)
    table = Table(
        "layer", "tokens", "forward ms", "forward + backward ms", title=f"{N} x {K}, {kind}, {device}"
    )
    for count in _integers("tokens", tokens, ","):
        x = torch.randn(count, K, dtype=kind, device=device)
        for name, layer in layers.items():
            forward = _median_ms(lambda layer=layer, x=x: _forward(layer, x), seconds, device)
            both = _median_ms(lambda layer=layer, x=x: _both(layer, x), seconds, device)
            table.add_row(name, str(count), f"{forward:.3f}", f"{both:.3f}")
    out.print(table)


def build_layers(N: int, K: int, r: int, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """The layers to compare, all of one weight `[N, K]`."""
    linear = nn.Linear(K, N, bias=False, dtype=dtype, device=device).requires_grad_(False)
    base = nn.Sequential(NF4Linear.from_linear(linear))
    layers: dict[str, nn.Module] = {
        "moka NF4": NF4Linear.from_linear(linear),
        f"moka NF4 + mixture, r = {r}": inject(base, MokaConfig(target_modules=["0"], r=r)),
        "torch dense": linear,
    }
    if find_spec("bitsandbytes"):
        from bitsandbytes.nn import Linear4bit, Params4bit

        peer: Any = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        weight: Any = linear.weight.detach().clone()
        peer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore
        layers["bitsandbytes NF4"] = peer.to(device)
    return layers


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _both(layer: nn.Module, x: Tensor) -> None:
    y = layer(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))


def _median_ms(work: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Median time of a call in milliseconds, after one to warm up."""
    work()
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _integers(name: str, text: str, separator: str, count: int | None = None) -> list[int]:
    try:
        values = [int(part) for part in text.split(separator)]
    except ValueError:
        values = []
    if not values or min(values) < 1 or (count is not None and len(values) != count):
        example = separator.join(["576"] * (count or 2))
        raise ConfigError(f"{name}: got {text!r}, expected positive integers like {example}")
    return values

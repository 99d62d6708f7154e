"""One layer in every form that the GPU benchmarks time: frozen, adapted by moka, and adapted by its peers.

All hold weights of the same size, in bf16 or in NF4 with double quantization, and adapters without dropout.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import peft
import torch
from peers import PlainMoka, cast_trained
from torch import Tensor, nn

import moka
from moka import nf4, reference

DTYPE = torch.bfloat16


class Holder(nn.Module):
    """A model of one layer, as adapters want a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        """Calls the layer, whatever has become of it."""
        return self.proj(x)


def dense(N: int, K: int) -> nn.Linear:
    """A frozen bf16 layer."""
    layer = nn.Linear(K, N, bias=False, device="cuda", dtype=DTYPE).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    return layer


def linear4bit(N: int, K: int) -> nn.Module:
    """A frozen bitsandbytes layer: NF4, blocks of 64, double quantization."""
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    weight = torch.randn(N, K, device="cuda", dtype=DTYPE) * 0.02
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.cuda()


def with_moka(base: nn.Module) -> moka.layers.MokaLinear:
    """`MokaLinear` with the paper's r = 10, balanced shapes and softmax gates; the update is not zero."""
    layer = moka.inject(Holder(base), moka.MokaConfig(target_modules=["proj"], r=10)).proj
    for factors in (*layer.moka_A.values(), *layer.moka_B.values()):
        nn.init.normal_(factors, std=0.01)
    return layer


def plain(layer: moka.layers.MokaLinear) -> PlainMoka:
    """The same base and mixture as a loop over components on bitsandbytes' layer, factors in bf16."""
    shapes = layer.shapes["default"]
    factors = reference.split_factors(layer.moka_A["default"].data, layer.moka_B["default"].data, shapes)
    A, B = zip(*factors, strict=True)
    module = PlainMoka(layer.base_layer, A, B, layer.moka_gate["default"].data, layer.scaling["default"])
    module.A.to(DTYPE), module.B.to(DTYPE)
    return module


def with_peft(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """An adapter of peft, its weights in bf16 as in mixed-precision training."""
    config.target_modules = {"proj"}
    model = peft.get_peft_model(Holder(base), config).train()
    cast_trained(model, DTYPE)
    return model.get_submodule("base_model.model.proj")


def with_lycoris(base: nn.Linear) -> nn.Module:
    """LyCORIS' LoKr, one Kronecker product, run by its fused kernels; they take factors of up to 128."""
    factor = 112 if 14336 in base.weight.shape else 64
    from lycoris.modules.lokr import LokrModule

    layer = LokrModule(
        "proj", base, lora_dim=1, alpha=1, factor=factor, full_matrix=True, bypass_mode=True
    ).to("cuda", DTYPE)  # fmt: skip
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.01)
    return layer


def peft_layers(N: int, K: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what makes the layer."""
    lora = lambda r, **options: peft.LoraConfig(r=r, lora_alpha=r, **options)  # noqa: E731
    return {
        "peft LoRA r=16": lambda: with_peft(linear4bit(N, K), lora(16)),
        "peft LoRA r=64": lambda: with_peft(linear4bit(N, K), lora(64)),
        "peft DoRA r=16": lambda: with_peft(linear4bit(N, K), lora(16, use_dora=True)),
        "peft LoKr, bf16 base": lambda: with_peft(
            dense(N, K), peft.LoKrConfig(r=10**6, alpha=1, decompose_factor=-1)
        ),
    }


def int4_call(N: int, K: int, group: int = 64) -> Callable[[Tensor], Tensor]:
    """torch's int4 product (tinygemm) on random codes: asymmetric int4, not NF4, in a layout of its own."""
    codes = torch.randint(0, 255, (N, K // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(K // group, N, 2, device="cuda", dtype=DTYPE)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def operands(layer: moka.layers.MokaLinear) -> tuple[nf4.NF4Weight, tuple]:
    """The NF4 weight and the mixture of a layer, as `moka.functional` takes them, gates worked out."""
    A, B, alpha, shapes = layer.mixture(["default"])
    return layer.base_weight(), (A.detach(), B.detach(), alpha.detach(), shapes)

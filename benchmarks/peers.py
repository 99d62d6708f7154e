"""What moka is measured against: the same layer, frozen or adapted, written with other tools.

Every layer of one size holds the same weight, NF4 after quantization by bitsandbytes; the dense peer holds
that weight dequantized, so that all compute the same function of x, up to their adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import moka


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the trained parameters into a dtype; peft makes its own in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def plain_mixture(x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """`sum_i alpha_i (A_i kron B_i) x` as the equation reads: a loop, each component in its cheaper order."""
    y = None
    for i, (A_i, B_i) in enumerate(zip(A, B, strict=True)):
        (ma, na), (mb, nb) = A_i.shape, B_i.shape
        X = x.reshape(-1, na, nb)
        a_first = ma * nb * (na + mb) < na * mb * (nb + ma)
        Y = (A_i @ X) @ B_i.mT if a_first else A_i @ (X @ B_i.mT)
        term = alpha[i] * Y.reshape(*x.shape[:-1], ma * mb)
        y = term if y is None else y + term
    assert y is not None
    return y


class PlainMoka(nn.Module):
    """A frozen layer plus the mixture in plain PyTorch, differentiated by autograd."""

    def __init__(self, base: nn.Module, A: Sequence[Tensor], B: Sequence[Tensor], gate: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.ParameterList(nn.Parameter(a.clone()) for a in A)
        self.B = nn.ParameterList(nn.Parameter(b.clone()) for b in B)
        self.gate = nn.Parameter(gate.clone())

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.scale * self.gate.softmax(0)
        A, B = ([factor.to(x.dtype) for factor in factors] for factors in (self.A, self.B))
        return self.base(x) + plain_mixture(x, A, B, alpha.to(x.dtype))


def bitsandbytes_layers(w: Tensor, count: int, dtype: torch.dtype, repack: bool) -> list[nn.Module]:
    """`Linear4bit` layers as bitsandbytes makes them (NF4, blocks of 64, double quantization).

    Args:
        w: `[N, K]`, quantized once.
        count: how many copies.
        dtype: compute dtype.
        repack: keep the default by which a CPU with AVX-512-BF16 repacks the weight at the first call in eval
            mode without gradients; a repacked layer computes in bf16 and no longer gives gradients.
    """
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(w.detach().cpu().clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to(w.device).eval()
    layer.support_avx512bf16_for_cpu &= repack
    layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    if repack:
        with torch.no_grad():  # the first call repacks; later ones are what is measured
            for each in layers:
                each(torch.zeros(1, w.shape[1], dtype=dtype, device=w.device))
    return layers


def lora_layers(bases: Sequence[nn.Module], r: int) -> list[nn.Module]:
    """peft's LoRA on each base, the same random A and B in all; raises ImportError without peft."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["proj"])  # scale 1
    layers = [module["proj"] for module in inject_adapter_in_model(config, _model(bases)).values()]
    nn.init.normal_(layers[0].lora_B["default"].weight, std=0.02)
    for layer in layers[1:]:
        layer.lora_A["default"].weight.data.copy_(layers[0].lora_A["default"].weight.data)
        layer.lora_B["default"].weight.data.copy_(layers[0].lora_B["default"].weight.data)
    return layers


def moka_layers(bases: Sequence[nn.Module], path: str) -> list[nn.Module]:
    """`MokaLinear` with the paper's r = 10, balanced shapes and softmax gates on each base; no dropout."""
    config = moka.MokaConfig(target_modules=["proj"], r=10, dropout=0.0, path=path)
    return [module["proj"] for module in moka.inject(_model(bases), config).values()]


def _model(bases: Sequence[nn.Module]) -> nn.ModuleDict:
    """A model in which each base is called `proj`."""
    return nn.ModuleDict({str(i): nn.ModuleDict({"proj": base}) for i, base in enumerate(bases)})

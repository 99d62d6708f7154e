"""`plan`: parameters, operations per token and memory of a fine-tuning run, before anything is loaded.

Everything is computed on the meta device, from a configuration alone if need be. Parameters and weights are
exact; operations count the linear layers (2 per multiply-add; attention scores, norms and activations are
left out); activation memory is an estimate, whose rule is at `_activation_bytes`.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .bases import NF4Linear, is_linear4bit
from .branches import form_of
from .config import MokaConfig
from .errors import ConfigError
from .gates import logit_shape
from .layers import MokaLinear
from .nf4 import BLOCKSIZE2
from .quantize import layers_to_quantize
from .summary import count_parameters
from .targets import find_targets, output_embedding, walk

#: AdamW keeps two fp32 values per trained parameter.
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0}


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        layers: adapted layers.
        factor_parameters, gate_parameters: trained entries.
        base_parameters: of the frozen model.
        flops_per_token: "base_forward", "base_backward" (the gradient of the input alone), "adapter_forward",
            "adapter_backward" (factored path: the gradients of the input and of the factors).
        memory_bytes: "nf4_weights", "nf4_absmax", "other_weights", "adapter", "gradients", "optimizer",
            "activations" (all that a step adds at its peak).
        batch, sequence, gradient_checkpointing: what the activations are estimated for.
    """

    layers: int
    factor_parameters: int
    gate_parameters: int
    base_parameters: int
    flops_per_token: dict[str, int]
    memory_bytes: dict[str, int]
    batch: int
    sequence: int
    gradient_checkpointing: bool

    @property
    def parameters(self) -> int:
        """All trained entries."""
        return self.factor_parameters + self.gate_parameters

    @property
    def total_bytes(self) -> int:
        """Sum over all parts."""
        return sum(self.memory_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "parameters": self.parameters, "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        """One quantity per line."""
        share = 100.0 * self.parameters / self.base_parameters
        lines = [
            f"adapted layers      {self.layers}",
            f"trained parameters  {self.parameters:,} ({self.factor_parameters:,} in factors, "
            f"{self.gate_parameters:,} in gates; {share:.4f}% of {self.base_parameters:,})",
            "operations per token",
            *(
                f"  {name.replace('_', ' '):<18}{n / 1e9:10.3f} GFLOP"
                for name, n in self.flops_per_token.items()
            ),
            f"memory, batch {self.batch} x {self.sequence} tokens, gradient checkpointing "
            f"{'on' if self.gradient_checkpointing else 'off'} (activations estimated)",
            *(
                f"  {name.replace('_', ' '):<18}{n / 2**30:10.3f} GiB"
                for name, n in self.memory_bytes.items()
            ),
            f"  {'total':<18}{self.total_bytes / 2**30:10.3f} GiB",
        ]
        return "\n".join(lines)


def plan(
    model_or_config: Any,
    config: MokaConfig,
    *,
    batch: int = 1,
    sequence: int = 1024,
    gradient_checkpointing: bool = False,
    quantized: bool = True,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
) -> Plan:
    """What fine-tuning a model with `config` takes; nothing is loaded and the model is not changed.

    Args:
        model_or_config: a module (also on the meta device) or a `transformers` configuration of a causal LM.
        config: what to adapt and how.
        batch, sequence: tokens of a step, for the activations.
        gradient_checkpointing: whether only the input of each layer is kept.
        quantized: count the dense linear layers, but for the output embedding, in NF4 (as `moka.quantize`
            makes them).
        double_quant: absmax in 8 bits.
        dtype: of the weights that are not in 4 bits, and of activations.
        optimizer: "adamw" or "sgd".

    Raises:
        InjectionError, ConfigError: as `moka.inject` would.

    Example:
        >>> from transformers import LlamaConfig
        >>> plan(LlamaConfig(), MokaConfig()).factor_parameters       # LLaMA2-7B, q and v, r = 10
        5242880
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ConfigError(f"optimizer: got {optimizer!r}, expected one of {tuple(OPTIMIZER_BYTES)}")
    model = model_or_config if isinstance(model_or_config, nn.Module) else meta_model(model_or_config)
    targets = find_targets(model, config)
    factors = sum(shape.numel for target in targets for shape in target.shapes)
    logits = (logit_shape(config.gate, len(target.shapes), target.in_features) for target in targets)
    gates = sum(math.prod(shape) for shape in logits if shape is not None)
    gates += sum(target.out_features for target in targets) if config.magnitude else 0
    linears = {
        path: _sizes(m) for path, m in walk(model) if isinstance(m, (MokaLinear, NF4Linear, nn.Linear))
    }
    to_quantize = {path for paths in layers_to_quantize(model)[0] for path in paths} if quantized else set()
    in_nf4 = [
        N * K for path, (N, K) in linears.items() if path in to_quantize or _is_nf4(model.get_submodule(path))
    ]
    base_parameters = count_parameters(model)
    macs = sum(form_of(target.shapes).macs for target in targets)
    base_flops = 2 * sum(N * K for N, K in linears.values())
    trained_bytes = factors * getattr(torch, config.adapter_dtype).itemsize + gates * 4
    memory = {
        "nf4_weights": sum((n + 1) // 2 for n in in_nf4),
        "nf4_absmax": sum(_absmax_bytes(n, double_quant) for n in in_nf4),
        "other_weights": (base_parameters - sum(in_nf4)) * dtype.itemsize,
        "adapter": trained_bytes,
        "gradients": trained_bytes,
        "optimizer": (factors + gates) * OPTIMIZER_BYTES[optimizer],
        "activations": batch
        * sequence
        * _activation_bytes(
            model, config, {target.path for target in targets}, linears, dtype, gradient_checkpointing
        ),
    }
    flops = {
        "base_forward": base_flops,
        "base_backward": base_flops,
        "adapter_forward": 2 * macs,
        # the input's gradient costs what the forward does, those of A and B the same each
        "adapter_backward": 6 * macs,
    }
    return Plan(
        len(targets), factors, gates, base_parameters, flops, memory, batch, sequence, gradient_checkpointing
    )


def meta_model(config: Any) -> nn.Module:
    """The causal LM of a `transformers` configuration, without memory."""
    from transformers import AutoModelForCausalLM  # optional dependency, needed for configurations alone

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _sizes(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _is_nf4(module: nn.Module) -> bool:
    return isinstance(module, NF4Linear) or is_linear4bit(module)


def _absmax_bytes(numel: int, double_quant: bool, blocksize: int = 64) -> int:
    blocks = -(-numel // blocksize)
    # second level: fp32 per 256 blocks, the 256 values of the 8-bit code and the offset
    return blocks + -(-blocks // BLOCKSIZE2) * 4 + 257 * 4 if double_quant else blocks * 4


def _activation_bytes(
    model: nn.Module,
    config: MokaConfig,
    adapted: set[str],
    linears: dict[str, tuple[int, int]],
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> int:
    """Bytes per token at the peak; an estimate for transformers' decoders, tested within 10%.

    Of each transformer layer autograd keeps what `_kept_of_group` says and, for each norm, its input in fp32.
    The peak is where the backward pass begins: the logarithmic softmax of the logits, its gradient and that
    of the logits, in fp32, for every token (`MokaTrainer` computes the logits of labels alone). With gradient
    checkpointing only the input of each layer is kept; all of one layer comes later, with gradients on their
    way, when the logits are gone. Attention is taken to be fused: it keeps no scores.
    """
    size = dtype.itemsize
    head = output_embedding(model)
    groups: dict[str, list[str]] = {}
    for path in linears:
        if model.get_submodule(path) is not head:
            groups.setdefault(path.rpartition(".")[0], []).append(path)
    kept: dict[str, int] = {"": 0}
    inputs: dict[str, int] = {}
    for parent, paths in groups.items():
        layer = _layer_of(paths[0])
        kept[layer] = kept.get(layer, 0) + _kept_of_group(parent, paths, config, adapted, linears, size)
        inputs.setdefault(layer, linears[paths[0]][1] * size)
    for path, module in walk(model):
        if "norm" in type(module).__name__.lower():
            width = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name == "weight")
            kept[_layer_of(path)] = kept.get(_layer_of(path), 0) + width * max(4, size)
    logits = 12 * _sizes(head)[0] if head is not None else 0
    if not gradient_checkpointing:
        return sum(kept.values()) + logits
    outside = kept.pop("")
    if not kept:
        return outside + logits
    widest = max(N for paths in groups.values() for N in (linears[path][0] for path in paths))
    recomputed = max(kept.values()) + 2 * widest * size + max(inputs.values())
    return sum(inputs.values()) + max(outside + logits, recomputed)


def _kept_of_group(
    parent: str,
    paths: list[str],
    config: MokaConfig,
    adapted: set[str],
    linears: dict[str, tuple[int, int]],
    size: int,
) -> int:
    """Bytes per token kept for the linear layers of one module, such as `self_attn` or `mlp`.

    The last layer leads back to the residual stream: instead of its output, something as wide as its input is
    kept, the result of the attention or of the activation function. A frozen layer keeps no input. Adapted
    layers do: the first ones share it, and attention has kept the last one's; or with dropout each has a
    masked one of its own, and the mask (on a CPU in the same dtype; a GPU's is smaller).
    """
    *first, last = paths if len(paths) > 1 else [*paths, None]
    entries = sum(linears[path][0] for path in first) + (linears[last][1] if last else 0)
    own = [linears[path][1] for path in paths if path in adapted]
    if config.dropout:
        return (entries + 2 * sum(own)) * size
    if any(path in adapted for path in first):
        entries += linears[first[0]][1]
    if last in adapted and "att" not in parent.rpartition(".")[2]:
        entries += linears[last][1]
    return entries * size


def _layer_of(path: str) -> str:
    """The numbered layer a module is in, such as `model.layers.3`; empty outside of them."""
    match = re.match(r"(.*?\.|)\d+(?=\.|$)", path)
    return match[0] if match else ""

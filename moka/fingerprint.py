"""Identifies the base model that an adapter was trained on, from a sample of the weights it adapts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import BaseMismatchError, StateError
from .nf4 import NF4Weight

SAMPLES = 256  # entries (bytes of a 4-bit weight) of each layer: other weights differ in nearly all of them


def fingerprint(model: nn.Module, weights: Iterable[NF4Weight | Tensor]) -> dict[str, str]:
    """Names the base model of an adapter.

    Args:
        model: its `config`, where it has one as transformers models do, gives the names.
        weights: base weights of the adapted layers, in the order of their paths.

    Returns:
        model_type; name_or_path and task_type, for information; quantization, as text; digest, of the shapes
        and of evenly spaced samples. Dense samples are rounded to bf16 first: the dtype does not matter.

    Raises:
        StateError: a weight is on the meta device.
    """
    config, digest, kinds = getattr(model, "config", None), hashlib.sha256(), set()
    for weight in weights:
        if isinstance(weight, NF4Weight):
            double = ", double quantization" if weight.double_quant else ""
            kinds.add(f"nf4, blocksize {weight.blocksize}{double}")
            entries = weight.packed.view(torch.uint8).flatten()
        else:
            kinds.add("none")
            entries = weight.detach().flatten()
        if entries.is_meta:
            raise StateError("the base weights are on the meta device; materialize the model first")
        sample = entries[:: -(-entries.numel() // SAMPLES)].cpu()
        if sample.is_floating_point():
            sample = sample.bfloat16().view(torch.uint8)
        digest.update(f"{tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    kind = type(model).__name__
    if any(c.__name__ == "FSDPModule" for c in type(model).__mro__):
        kind = kind.removeprefix("FSDP")  # fully_shard makes a subclass, of that name
    return {
        "model_type": str(getattr(config, "model_type", kind)),
        "name_or_path": str(getattr(config, "_name_or_path", "")),
        "task_type": "CAUSAL_LM" if "CausalLM" in kind else "",
        "quantization": "; ".join(sorted(kinds)),
        "digest": digest.hexdigest(),
    }


def check_base(where: str, trained_on: dict[str, str], here: dict[str, str]) -> None:
    """Compares the fingerprint in an adapter file with the model's.

    Raises:
        BaseMismatchError: naming both.
    """
    override = "load the base it was trained on, quantized alike, or pass allow_base_mismatch=True"
    if trained_on["quantization"] != here["quantization"]:
        raise BaseMismatchError(
            f"{where}: the adapter was trained on a base with quantization {trained_on['quantization']!r}, "
            f"the model has {here['quantization']!r}; {override}"
        )
    if any(trained_on[key] != here[key] for key in ("model_type", "digest")):
        raise BaseMismatchError(
            f"{where}: the adapter was trained on {_identity(trained_on)}, the model is {_identity(here)}, "
            f"with the same shapes and other weights; {override}"
        )


def _identity(base: dict[str, str]) -> str:
    return f"{base['model_type']} {base['name_or_path']!r} ({base['digest'][:16]})"

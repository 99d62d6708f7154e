"""Models with adapters of LoRA, LoKr and MoKA on a float and on 4-bit bases, and how to compare them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moka
from moka.inject import stop_repacking
from moka.integrations.peft import MokaConfig

BASES = ("float", "bitsandbytes", "nf4")
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **fields: LoraConfig(**{"r": 4, **fields}),
    "LoKr": lambda **fields: LoKrConfig(**{"r": 4, **fields}),
    "MoKA": lambda **fields: MokaConfig(**{"r": 4, **fields}),
}
TOKENS = torch.arange(3, 3 + 4 * 12).view(4, 12)


class Wrong(AssertionError):
    """A wrong result that came without an error; says what is wrong."""


class Skip(Exception):
    """The scenario does not exist on this base."""


@cache
def base_folder() -> str:
    """A saved base model."""
    folder = tempfile.mkdtemp(prefix="moka-peft-")
    tiny_model().save_pretrained(folder)
    return folder


def quantization() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


class Case:
    """One method on one kind of base, with a folder for files."""

    def __init__(self, method: str, base: str, folder: Path) -> None:
        self.method, self.kind, self.folder = method, base, folder

    def base(self, as_it_comes: bool = False) -> Any:
        """The base model, in eval mode; bitsandbytes' layers are kept in fp32 unless `as_it_comes`."""
        if self.kind == "bitsandbytes":
            options = {"quantization_config": quantization(), "device_map": "cpu"}
            model = AutoModelForCausalLM.from_pretrained(base_folder(), **options).eval()
            if not as_it_comes:
                stop_repacking(model)
            return model
        model = AutoModelForCausalLM.from_pretrained(base_folder()).eval()
        return moka.quantize(model) if self.kind == "nf4" else model

    def config(self, **fields: Any) -> Any:
        fields = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
        return METHODS[self.method](**fields)

    def model(self, seed: int = 1, as_it_comes: bool = False, **fields: Any) -> Any:
        """With one adapter, whose values are random."""
        model = get_peft_model(self.base(as_it_comes), self.config(**fields))
        randomize(model, "default", seed)
        return model.eval()


def randomize(model: Any, name: str, seed: int, size: float = 0.3) -> None:
    """Random values for every parameter of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if name in path.split(".") and parameter.is_floating_point():
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, tokens: torch.Tensor = TOKENS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Up to the order of summation: logits are sums over 64 products in fp32."""
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def adapter_gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def mixed(case: Case) -> tuple[Any, list[str], torch.Tensor]:
    """A model with two adapters, a name per row, and the logits of each row alone."""
    model = case.model()
    model.add_adapter("second", case.config(target_modules=["k_proj", "v_proj"]))
    randomize(model, "second", 2)
    names, rows = ["second", "__base__", "default", "second"], []
    for name, tokens in zip(names, TOKENS, strict=True):
        if name == "__base__":
            rows.append(logits(case.base(), tokens[None]))
        else:
            model.set_adapter(name)
            rows.append(logits(model, tokens[None]))
    model.set_adapter("default")
    return model, names, torch.cat(rows)


class active:
    """One adapter for the length of a block, then "default"."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.model.set_adapter(self.name)

    def __exit__(self, *exception: object) -> None:
        self.model.set_adapter("default")


def add_delta(layer: Any, delta: torch.Tensor) -> None:
    layer.register_forward_hook(lambda module, args, output: output + args[0] @ delta.T)


def count_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}

"""What merging and ejecting leave of a language model: whether it runs, is cast, saved and loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moka

TOKENS = torch.arange(40).view(2, 20)


def adapted(folder: Path, base: str, targets: str | list[str]) -> Any:
    """A small model in fp32, its linear layers in 4 bits, with an adapter that makes a difference."""
    model = tiny_model()
    if base == "nf4":
        moka.quantize(model)
    elif base == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(folder / "base")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=quantization, device_map="cpu"
        )
    moka.inject(model, moka.MokaConfig(target_modules=targets, r=5))
    torch.manual_seed(1)
    for layer in moka.adapter_layers(model).values():
        layer.moka_B["default"].data.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def assert_loads_again(model: Any, folder: Path) -> None:
    """What `save_pretrained` writes gives the same logits, to the bit; and the model can be cast."""
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    assert torch.equal(logits(loaded), logits(model))
    assert {p.dtype for p in model.to(torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize("base", ["nf4", "bitsandbytes"])
def test_a_model_without_a_4_bit_layer_is_not_quantized_any_more(tmp_path, base):
    model = adapted(tmp_path, base, "all-linear")
    expected = logits(model)
    plain = moka.eject(moka.merge(model, into=torch.float32))
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert not getattr(plain, "is_quantized", False) and not hasattr(plain, "is_loaded_in_4bit")
    assert_loads_again(plain, tmp_path / "plain")


def test_a_model_with_4_bit_layers_left_stays_quantized(tmp_path):
    model = adapted(tmp_path, "bitsandbytes", ["q_proj"])
    model = moka.eject(moka.merge(model, into=torch.float32))
    assert model.is_quantized and model.is_loaded_in_4bit and model.config.quantization_config
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.bfloat16)

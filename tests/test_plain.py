"""What merging and ejecting leave of a language model: whether it runs, is cast, saved and loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moka
from moka.errors import ConfigError, StateError

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


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["some", "all"])
@pytest.mark.parametrize("base", ["dense", "nf4", "bitsandbytes"])
def test_merged_and_ejected_into_a_dtype_is_a_plain_model_of_it(tmp_path, base, targets):
    model = adapted(tmp_path, base, targets)
    expected = logits(model)
    with moka.disabled(model):
        update = (logits(model) - expected).norm()
    exact = copy.deepcopy(model)
    exact = moka.eject(moka.merge(exact, into=torch.float32), into=torch.float32)
    torch.testing.assert_close(logits(exact), expected, rtol=1e-4, atol=1e-4)
    plain = moka.eject(moka.merge(model, into=torch.bfloat16), into=torch.bfloat16)
    assert (logits(plain).float() - expected).norm() < 0.2 * update  # a few roundings to 8 bits of mantissa
    for model, dtype in ((exact, torch.float32), (plain, torch.bfloat16)):
        assert {type(m) for p, m in model.named_modules() if p.endswith("_proj")} == {nn.Linear}
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert_loads_again(model, tmp_path / str(dtype))


def test_what_was_not_merged_is_not_in_a_plain_model(tmp_path):
    model = adapted(tmp_path, "nf4", ["q_proj"])
    with moka.disabled(model):
        base = logits(model)
    plain = moka.eject(model, into=torch.float32)
    torch.testing.assert_close(logits(plain), base, rtol=1e-4, atol=1e-4)
    assert_loads_again(plain, tmp_path / "plain")


def test_two_dtypes_are_warned_of(tmp_path):
    model = adapted(tmp_path, "dense", ["q_proj"])
    with pytest.warns(
        UserWarning, match=r"torch.bfloat16.*the rest.*torch.float32.*give moka.eject the into"
    ):
        moka.eject(moka.merge(model, into=torch.bfloat16))


def test_an_ejection_that_is_refused_changes_nothing(tmp_path):
    model = moka.merge(adapted(tmp_path, "nf4", ["q_proj"]), into=torch.float32)
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"into: got torch.int8, expected one of .*torch.bfloat16"):
        moka.eject(model, into=torch.int8)
    norm = model.model.norm
    norm.weight.full_tensor = None  # as a parameter of FSDP2 has
    with pytest.raises(StateError, match=r"split over processes; .*merge there"):
        moka.eject(model, into=torch.float32)
    assert torch.equal(logits(model), expected) and moka.merge_errors(model)


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

"""The references of the sibling adapters against the layers of peft, for the methods that it has."""

import pytest
import torch
from sibling_references import C3A, EXAMPLES, GraLoRA, LoKr, LoRA, MiSS, VeRA
from test_siblings import EVERY, flat
from torch import nn

import moka

peft = pytest.importorskip("peft")

LABELS = (
    "lora",
    "rslora",
    "lokr",
    "lokr_low_rank",
    "lokr_both",
    "gralora",
    "miss",
    "miss_padded",
    "miss_mini",
    "c3a",
    "vera",
)
CASES = {label: EXAMPLES[label] for label in LABELS} | {
    "lokr_factor": (LoKr(r=2, alpha=3, decompose_factor=12), 24, 30),
    "lokr_factor_above_root": (LoKr(r=4, alpha=3, decompose_factor=12), 24, 24),
    "lokr_half": (LoKr(r=4, alpha=3), 32, 16),  # w2 is 8 x 4: just full
    "lokr_prime": (LoKr(r=4, alpha=3), 13, 24),
    "gralora_4": (GraLoRA(r=8, k=4, alpha=3), 16, 24),
    "c3a_6": (C3A(6), 24, 12),
}


def config_of(sibling):
    """peft's configuration of the same options."""
    if isinstance(sibling, LoKr):
        names = ("r", "alpha", "decompose_factor", "decompose_both")
        return peft.LoKrConfig(**{name: getattr(sibling, name) for name in names})
    if isinstance(sibling, LoRA):
        return peft.LoraConfig(r=sibling.r, lora_alpha=sibling.alpha, use_rslora=sibling.rslora)
    if isinstance(sibling, MiSS):
        mini = {"init_weights": "mini", "mini_r": sibling.mini} if sibling.mini else {}
        return peft.MissConfig(r=sibling.r, **mini)
    if isinstance(sibling, C3A):
        return peft.C3AConfig(block_size=sibling.b)
    if isinstance(sibling, GraLoRA):
        return peft.GraloraConfig(r=sibling.r, gralora_k=sibling.k, alpha=sibling.alpha)
    assert isinstance(sibling, VeRA)
    return peft.VeraConfig(r=sibling.r)


def layer_in_peft(sibling, m, n):
    """peft's adapted layer without bias in fp64, and its trained tensors by the reference's names."""
    base = nn.Sequential()
    base.add_module("linear", nn.Linear(n, m, bias=False, dtype=torch.float64))
    config = config_of(sibling)
    config.target_modules = {"linear"}
    layer = peft.get_peft_model(base, config).base_model.model.linear
    tensors = {
        name.replace(".default", "").removesuffix(".weight"): parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    return layer, tensors


def update_of(layer, n):
    """What a layer adds to its base's output for every input: dW."""
    x = torch.eye(n, dtype=torch.float64)
    return (layer(x) - layer.base_layer(x)).T


@pytest.mark.parametrize("label", CASES)
def test_update_is_that_of_peft(label):
    """Same trained tensors, and the same output of the layer but for the base's, with random tensors."""
    sibling, m, n = CASES[label]
    layer, tensors = layer_in_peft(sibling, m, n)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == sibling.tensors(m, n)
    tensors |= {name: getattr(layer, name)["default"] for name in sibling.given(m, n)}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.normal_()
        expected = sibling.update({name: x.double() for name, x in tensors.items()}, m, n)
        torch.testing.assert_close(update_of(layer, n), expected, rtol=1e-5, atol=1e-5)


IN_PEFT = ("lora", "rslora", "lokr", "bone", "c3a", "gralora")


@pytest.mark.parametrize("name, case", [param for param in EVERY if param.values[0] in IN_PEFT])
def test_a_preset_with_the_tensors_of_peft_is_its_layer(name, case):
    own, (m, n) = case.layer(name, torch.float64), case.sizes
    mine = case.tensors(own, *flat(own))
    layer, tensors = layer_in_peft(case.reference(own), m, n)
    assert {key: x.shape for key, x in tensors.items()} == {key: x.shape for key, x in mine.items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(mine[key])
        torch.testing.assert_close(update_of(own, n), update_of(layer, n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "fields"),
    [
        ("lora", "LoraConfig", {"r": "r", "alpha": "lora_alpha"}),
        ("rslora", "LoraConfig", {"r": "r", "alpha": "lora_alpha"}),
        ("lokr", "LoKrConfig", {"rank": "r", "alpha": "alpha"}),
        ("bone", "MissConfig", {"r": "r"}),
        ("gralora", "GraloraConfig", {"r": "r", "blocks": "gralora_k", "alpha": "alpha"}),
    ],
)
def test_defaults_are_those_of_peft(name, config, fields):
    theirs = getattr(peft, config)()
    assert moka.preset(name).gate == "none"
    assert moka.presets()[name].options | {own: getattr(theirs, key) for own, key in fields.items()} == (
        moka.presets()[name].options
    )

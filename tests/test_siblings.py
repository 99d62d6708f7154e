"""Every preset is its published method: update, gradients and count against `sibling_references.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sibling_presets import CASES, layer_of, mapped
from sibling_references import mora_size
from torch import nn

import moka
from helpers import errors
from moka.inject import adapter_layers
from moka.presets import PRESETS

every = pytest.mark.parametrize("label", CASES)


def parameters(layer):
    """A, B and the gate (None without one)."""
    return (
        layer.moka_A["default"],
        layer.moka_B["default"],
        layer.moka_gate["default"] if layer.moka_gate else None,
    )


def test_there_is_a_case_of_every_preset():
    assert {name for name, *_ in CASES.values()} == set(PRESETS)


@every
def test_update(label):
    layer = layer_of(label)
    _, _, N, K = CASES[label]
    with torch.no_grad():
        sibling, tensors = mapped(label, layer, *parameters(layer))
        sizes = sibling.tensors(N, K) | sibling.given(N, K)
        assert {name: tuple(x.shape) for name, x in tensors.items()} == sizes
        expected = sibling.update(tensors, N, K)
        terms = zip(layer.alpha("default").double(), layer.factors("default"), strict=True)
        update = torch.stack([a * torch.kron(A, B) for a, (A, B) in terms]).sum(0)
    torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    torch.testing.assert_close(
        layer.delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
    )


@every
def test_output_and_gradients(label):
    layer = layer_of(label, torch.float32)
    _, _, N, K = CASES[label]
    x, back = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    y = layer(x)
    y.backward(back)

    own = [p for p in parameters(layer) if p is not None]
    exact = [p.detach().double().requires_grad_(p.requires_grad) for p in own]
    sibling, tensors = mapped(label, layer, *exact, *[None] * (3 - len(exact)))
    x64 = x.detach().double().requires_grad_()
    base: Any = layer.base_layer
    weight = base.weight.double() + sibling.update(tensors, N, K)
    expected = x64 @ weight.T + base.bias.double()
    expected.backward(back.double())

    pairs = [(y, expected.detach()), (x.grad, x64.grad)]
    for parameter, reference in zip(own, exact, strict=True):
        assert parameter.requires_grad == (reference.grad is not None)
        if reference.grad is not None:
            pairs.append((parameter.grad, reference.grad))
    assert len(pairs) > 2
    for actual, wanted in pairs:
        assert actual is not None and errors(actual, wanted)[0] <= 1e-6


@every
def test_count(label):
    layer = layer_of(label)
    name, options, N, K = CASES[label]
    sibling, _ = mapped(label, layer, *parameters(layer))
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    shared = options["n"] ** 3 if name == "compacter" else 0
    assert trained - shared == sibling.count(N, K)


def test_mora_is_as_large_as_published_where_that_divides():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096))
    moka.inject(model, moka.preset("mora", rank=8, target_modules=["0"]))
    assert math.isqrt(adapter_layers(model)["0"].moka_B["default"].numel()) == mora_size(4096, 4096, 8)


def test_lora_xs_starts_with_the_singular_values_on_the_side_of_the_input():
    model = nn.Sequential(nn.Linear(48, 32))
    moka.inject(model, moka.preset("lora-xs", r=3, target_modules=["0"]))
    layer = adapter_layers(model)["0"]
    _, tensors = mapped("lora-xs", layer, *parameters(layer))
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight)
    signs = (tensors["lora_B"] * U[:, :3]).sum(0).sign()
    torch.testing.assert_close(tensors["lora_B"] * signs, U[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((tensors["lora_A"].T * signs).T, (S[:3] * Vh[:3].T).T, rtol=1e-4, atol=1e-5)
    assert not tensors["R"].any()

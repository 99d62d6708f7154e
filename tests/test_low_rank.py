"""Mixtures whose components are columns times rows, which run as a LoRA."""

import pytest
import torch
from test_functional import K, N, base_weight
from test_kron import Mixture

from helpers import assert_close_by_rule
from moka import functional as F
from moka.reference import kron_dense


@pytest.mark.parametrize(
    ("shapes", "path", "low_rank"),
    [
        ([(N, 1, 1, K)] * 3, "auto", True),
        ([(N, 1, 1, K)] * 3, "merged", False),
        ([(N, 1, 1, K)] * 3, "factored", False),
        ([(N, 1, 1, K)] * 2 + [(N // 2, 1, 2, K)], "auto", False),
    ],
)
def test_columns_times_rows_are_a_lora(shapes, path, low_rank, device, monkeypatch):
    w, calls, original = base_weight("nf4_double"), [], F.nf4_lora
    monkeypatch.setattr(F, "nf4_lora", lambda *args: calls.append(1) or original(*args))
    m = Mixture(shapes, 5, torch.float32)
    leaves = [t.requires_grad_() for t in (m.x, torch.randn(N), m.A, m.B, m.alpha)]
    x, bias, *mixture = leaves
    y = F.moka_linear(x, w, bias, *mixture, shapes, path)
    got = (y, *torch.autograd.grad(y, leaves, m.dy))
    assert len(calls) == low_rank
    x, bias, *mixture = exact = [t.detach().double().requires_grad_() for t in leaves]
    y = x @ (w.dequantize(torch.float64) + kron_dense(*mixture, shapes)).T + bias
    for actual, want in zip(got, (y, *torch.autograd.grad(y, exact, m.dy.double())), strict=True):
        assert_close_by_rule(actual, want, None, torch.float32, reduces_tokens=True)


@pytest.mark.parametrize("path", F.PATHS)
def test_gradients_beyond_the_range_of_fp16(path, device):
    """Those of columns times rows too: sums over tokens that the factors' fp32 holds, but fp16 does not."""
    w, shapes, tokens = base_weight("nf4"), [(N, 1, 1, K)] * 2, 512
    m = Mixture(shapes, tokens, torch.float16)
    x, dy = m.x.abs() + 1, 200 * (m.dy.abs() + 1)
    leaves = [t.float().requires_grad_() for t in m.params]
    got = torch.autograd.grad(F.moka_linear(x, w, None, *leaves, shapes, path), leaves, dy)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = x.double() @ (w.dequantize(torch.float64) + kron_dense(*exact, shapes)).T
    for actual, want in zip(got, torch.autograd.grad(y, exact, dy.double()), strict=True):
        assert want.abs().max() > torch.finfo(torch.float16).max
        assert_close_by_rule(actual, want, None, torch.float32, reduces_tokens=True)

"""Every preset against an independent implementation of what was published (`sibling_references.py`).

Updates in fp64, gradients in fp32 through the layer, and the number of trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sibling_references as published
import torch
from sibling_base import Sibling, Tensors
from torch import Tensor, nn

import moka
from moka.factors import constant, split
from moka.inject import adapter_layers
from moka.layers import MokaLinear
from moka.presets import PRESETS
from moka.rules import plan_shapes

M, N = 24, 36  # outputs, inputs
WIDE = 16, 36


class Case:
    """A preset with its options, and how its parameters are those of the reference."""

    def __init__(
        self,
        reference: Callable[[MokaLinear], Sibling],
        tensors: Callable[[MokaLinear, Tensor, Tensor, Tensor], Tensors],
        sizes: tuple[int, int] = (M, N),
        shared: int = 0,
        **options,
    ):
        self.reference, self.tensors, self.sizes, self.shared = reference, tensors, sizes, shared
        self.options = options

    def layer(self, name: str, dtype: torch.dtype) -> MokaLinear:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(self.sizes[1], self.sizes[0])).to(dtype)
        moka.inject(model, moka.preset(name, target_modules=["0"], **self.options))
        layer = adapter_layers(model)["0"]
        torch.manual_seed(1)
        for table in layer.tables():
            for key, parameter in table.items():
                values = torch.randn(parameter.shape, dtype=torch.float64)
                trained = parameter.requires_grad
                table[key] = nn.Parameter(values.to(dtype), requires_grad=trained)
        return layer


def flat(layer: MokaLinear) -> list[Tensor]:
    """A, B and gate in fp64, leaves of their own."""
    tables = layer.tables()[:3]
    values = [t["default"] if "default" in t else torch.empty(0) for t in tables]
    return [value.detach().double().requires_grad_() for value in values]


def stacked(layer: MokaLinear, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A `[k, ma, na]` and B `[k, mb, nb]` of dense factors of one shape."""
    s = layer.shapes["default"][0]
    return A.view(-1, s.ma, s.na), B.view(-1, s.mb, s.nb)


def pieces(layer: MokaLinear, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A0, B0, A1, ... of dense factors of any shapes."""
    shapes = layer.shapes["default"]
    a, b = A.split([s.a_numel for s in shapes]), B.split([s.b_numel for s in shapes])
    out = {}
    for i, s in enumerate(shapes):
        out |= {f"A{i}": a[i].view(s.ma, s.na)} if s.identity != 1 else {}
        out |= {f"B{i}": b[i].view(s.mb, s.nb)} if s.identity != 2 else {}
    return out


def low_rank(layer: MokaLinear, B: Tensor) -> list[Tensor]:
    """U `[k, mb, rank]` and V `[k, rank, nb]` of the right factors."""
    (run,) = layer.forms["default"].b or ()
    return split(B, run)


def moka_s(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
    """The reference lists the left identities first."""
    shapes, own = layer.shapes["default"], pieces(layer, A, B)
    left = [i for i, s in enumerate(shapes) if s.identity == 1]
    right = [i for i, s in enumerate(shapes) if s.identity == 2]
    out = {f"B{n}": own[f"B{i}"] for n, i in enumerate(left)}
    out |= {f"A{n}": own[f"A{i}"] for n, i in enumerate(right)}
    return out | {"gate": gate[left + right]}


def moka_s_reference(layer: MokaLinear) -> Sibling:
    shapes = layer.shapes["default"]
    left = tuple(s.ma for s in shapes if s.identity == 1)
    return published.MoKAs(left, tuple(s.mb for s in shapes if s.identity == 2), len(shapes))


def gralora(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
    k = size(layer)  # [i, j, m/k, r/k], [i, j, r/k, n/k]
    U, V = (part.unflatten(0, k) for part in low_rank(layer, B))
    return {"gralora_A": V.permute(1, 3, 0, 2).flatten(2), "gralora_B": U.permute(0, 1, 3, 2).flatten(1, 2)}


def kron_vera(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
    form = layer.forms["default"]
    drawn = [constant(*side[0][:4], torch.float64, A.device) for side in (form.a, form.b)]  # pyright: ignore
    return {"g": gate, "scale_a": A, "scale_c": B, "A": drawn[0], "B": drawn[1]}


def kradapter(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
    first, second = (part[0] for part in low_rank(layer, B))
    if layer.out_features > layer.in_features:
        first, second = first.T, second.T
    return {"v_weight": first, "weight": second}


def size(layer: MokaLinear) -> tuple[int, int]:
    return layer.shapes["default"][0][:2]


def matrices(first: str, second: str, gate_name: str) -> Callable[..., Tensors]:
    def tensors(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
        left, right = stacked(layer, A, B)
        return {first: left, second: right, gate_name: gate}

    return tensors


def melora(count: int) -> Callable[..., Tensors]:
    def tensors(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
        U, V = low_rank(layer, B)
        return {f"lora_B.{i}": U[i] for i in range(count)} | {f"lora_A.{i}": V[i] for i in range(count)}

    return tensors


def lora(layer: MokaLinear, A: Tensor, B: Tensor, gate: Tensor) -> Tensors:
    left, right = stacked(layer, A, B)
    return {"lora_B": left[:, :, 0].T, "lora_A": right[:, 0]}


CASES = {
    "moka": [
        Case(
            lambda y: published.MoKA(tuple(s[:4] for s in y.shapes["default"]), scale=7),
            lambda y, A, B, gate: pieces(y, A, B) | {"gate": gate},
            r=7,
        )
    ],
    "moka-s": [Case(moka_s_reference, moka_s, r=4)],
    "kron-lora": [
        Case(
            lambda y: published.KronLoRA(*size(y), r=2, alpha=6),
            lambda y, A, B, gate: dict(
                zip(("A", "B1", "B2"), (A.view(size(y)), *(p[0] for p in low_rank(y, B))), strict=True)
            ),
            size=4,
            rank=2,
            alpha=6,
        )
    ],
    "krona": [
        Case(
            lambda y: published.KronA(*size(y), scale=3),
            lambda y, A, B, gate: {"A": A.view(size(y)), "B": stacked(y, A, B)[1][0]},
            alpha=3,
        )
    ],
    "lokr": [
        Case(
            lambda y: published.LoKr(r=2, alpha=6, decompose_factor=4),
            lambda y, A, B, gate: {
                "lokr_w1": A.view(size(y)),
                "lokr_w2_a": low_rank(y, B)[0][0], "lokr_w2_b": low_rank(y, B)[1][0],
            },
            rank=2, alpha=6, factor=4,
        ),
        Case(  # a factor that does not divide
            lambda y: published.LoKr(r=2, alpha=6, decompose_factor=5),
            lambda y, A, B, gate: {
                "lokr_w1": A.view(size(y)),
                "lokr_w2_a": low_rank(y, B)[0][0], "lokr_w2_b": low_rank(y, B)[1][0],
            },
            rank=2, alpha=6, factor=5,
        ),
        Case(  # half of the longer side: just full
            lambda y: published.LoKr(r=3, alpha=2),
            lambda y, A, B, gate: {"lokr_w1": A.view(size(y)), "lokr_w2": stacked(y, A, B)[1][0]},
            rank=3, alpha=2,
        ),
    ],
    "compacter": [
        Case(
            lambda y: published.Compacter(phm_dim=4, phm_rank=2),
            # it acts as x H, so its factors are the transposes
            lambda y, A, B, gate: {
                "phm_rule": A.view(4, 4, 4).mT,
                "W_right": low_rank(y, B)[0].mT, "W_left": low_rank(y, B)[1].mT,
            },
            shared=4**3, n=4, rank=2,
        )
    ],
    "soka": [Case(lambda y: published.SoKA(*size(y), k=3), matrices("U", "V", "sigma"), r=3)],
    "lora": [Case(lambda y: published.LoRA(r=3, alpha=6), lora, r=3, alpha=6)],
    "rslora": [Case(lambda y: published.LoRA(r=3, alpha=6, rslora=True), lora, r=3, alpha=6)],
    "dota": [
        Case(
            lambda y: published.DoTA(*size(y), k=3),
            lambda y, A, B, gate: {
                "core1": stacked(y, A, B)[0].permute(1, 2, 0)[None], "core2": stacked(y, A, B)[1][..., None]
            },
            r=3,
        )
    ],
    "gralora": [
        Case(lambda y: published.GraLoRA(r=4, k=2, alpha=8), gralora, r=4, blocks=2, alpha=8),
        Case(lambda y: published.GraLoRA(r=6, k=3, alpha=4), gralora, r=6, blocks=3, alpha=4),
    ],
    "melora": [Case(lambda y: published.MELoRA(N=3, r=2, alpha=4), melora(3), blocks=3, rank=2, alpha=4)],
    "melora-shared": [
        Case(lambda y: published.MELoRA(N=3, r=2, alpha=4, shared=True), melora(1), blocks=3, rank=2, alpha=4)
    ],
    "mora": [
        Case(lambda y: published.MoRA(12), lambda y, A, B, gate: {"M": B.view(12, 12)}, rank=3),
    ],
    "bone": [Case(lambda y: published.MiSS(r=4), lambda y, A, B, gate: {"miss_block": B.view(M, 4).T}, r=4)],
    "c3a": [
        Case(
            lambda y: published.C3A(4),
            lambda y, A, B, gate: {"c3a_kernel": B.view(M // 4, N // 4, 4)},
            block=4,
        )
    ],
    "kron-vera": [Case(lambda y: published.KronVeRA(*size(y), k=3), kron_vera, r=3, scale=1.0)],
    "lora-xs": [
        Case(
            lambda y: published.LoRAXS(r=3, alpha=3),
            lambda y, A, B, gate: lora(y, A, B, gate) | {"R": gate},
            r=3,
        )
    ],
    "moka-xs": [Case(lambda y: published.MoKAXS(*size(y), k=3), matrices("A", "B", "M"), r=3)],
    "kradapter": [
        Case(lambda y: published.KRAdapter(), kradapter, sizes=WIDE),
        Case(lambda y: published.KRAdapter(), kradapter, sizes=WIDE[::-1]),
    ],
    "cdka": [
        Case(
            lambda y: published.CDKA(r1=2, r2=3, r=2, scale=2.0),
            # component i: rows i, i + r, ... of lora_A and columns i, i + r, ... of lora_B
            lambda y, A, B, gate: {
                "lora_B": stacked(y, A, B)[0].permute(1, 2, 0).flatten(1),
                "lora_A": stacked(y, A, B)[1].transpose(0, 1).flatten(0, 1),
            },
            r=2, r1=2, r2=3, alpha=4.0,
        )
    ],
    "qa-moka": [
        Case(
            lambda y: published.QAMoKA(*size(y), q=4, k=3),
            lambda y, A, B, gate: {
                "A": A.view(3, *size(y)), "B": low_rank(y, B)[0], "gate": gate
            },
            r=3, group=4, scale=1.0,
        )
    ],
}  # fmt: skip
EVERY = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES.items()
    for i, case in enumerate(cases)
]


def test_every_preset_has_a_reference():
    assert CASES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name, case", EVERY)
def test_update_and_count(name, case):
    layer = case.layer(name, torch.float64)
    reference, (m, n) = case.reference(layer), case.sizes
    tensors = case.tensors(layer, *flat(layer))
    stated = reference.tensors(m, n) | reference.given(m, n)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items() if key in stated} == stated
    with torch.no_grad():
        A, B, alpha, shapes = layer.mixture(["default"])
        zero = torch.zeros(m, n, dtype=torch.float64)
        update = moka.functional.kron_add(zero, A, B, alpha.double(), shapes)
        expected = reference.update(tensors, m, n)
    assert expected.abs().max() > 0.1 and (update - expected).abs().max() < 1e-12 * expected.abs().max()
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == reference.count(m, n) + case.shared


@pytest.mark.parametrize("path", ["merged", "factored"])
@pytest.mark.parametrize("name, case", EVERY)
def test_gradients(name, case, path):
    case = Case(case.reference, case.tensors, case.sizes, **{**case.options, "path": path})
    layer = case.layer(name, torch.float32)
    reference, (m, n) = case.reference(layer), case.sizes
    torch.manual_seed(2)
    x, grad = torch.randn(50, n, requires_grad=True), torch.randn(50, m)
    layer(x).backward(grad)
    leaves = flat(layer)
    base = layer.base_layer
    x64 = x.detach().double().requires_grad_()
    weight = base.weight.detach().double() + reference.update(case.tensors(layer, *leaves), m, n)
    (x64 @ weight.T + base.bias.detach().double()).backward(grad.double())
    pairs = [(x.grad, x64.grad, 1e-6)]
    # the gradient of a softmax cancels most of what it is a sum of
    for table, leaf, limit in zip(layer.tables()[:3], leaves, (1e-6, 1e-6, 4e-6), strict=True):
        if "default" in table and table["default"].requires_grad:
            pairs.append((table["default"].grad, leaf.grad, limit))
    for got, expected, limit in pairs:
        assert got is not None and expected is not None
        assert (got.double() - expected).norm() < limit * expected.norm(), (got, expected)


def test_lora_xs_starts_with_the_singular_values_on_the_side_of_the_input():
    model = nn.Sequential(nn.Linear(N, M))
    moka.inject(model, moka.preset("lora-xs", r=3, target_modules=["0"]))
    layer = adapter_layers(model)["0"]
    own = CASES["lora-xs"][0].tensors(layer, *flat(layer))
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight.double())  # pyright: ignore
    signs = (own["lora_B"] * U[:, :3]).sum(0).sign()
    torch.testing.assert_close(own["lora_B"] * signs, U[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(signs[:, None] * own["lora_A"], S[:3, None] * Vh[:3], rtol=1e-4, atol=1e-5)
    assert not own["R"].any()


def test_mora_is_as_large_as_published_where_that_divides():
    (shape,) = plan_shapes(4096, 4096, 1, "mora(8)")
    assert shape.mb == published.mora_size(4096, 4096, 8)

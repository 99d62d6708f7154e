"""The references of the sibling adapters against Kronecker sums, published figures, and by identities."""

import math

import pytest
import torch
from sibling_base import kron_flops
from sibling_references import (
    C3A,
    CDKA,
    EXAMPLES,
    KronA,
    KronLoRA,
    LoRA,
    MoKA,
    MoKAs,
    QAMoKA,
    mora_size,
)

every = pytest.mark.parametrize("label", EXAMPLES)


def draw(sibling, m, n):
    torch.manual_seed(0)
    shapes = sibling.tensors(m, n) | sibling.given(m, n)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def unit(size, i):
    return torch.eye(size, dtype=torch.float64)[i]


def selector(size, i, j):
    return torch.outer(unit(size, i), unit(size, j))


@every
def test_count_and_shape(label):
    sibling, m, n = EXAMPLES[label]
    assert sibling.count(m, n) == sum(math.prod(shape) for shape in sibling.tensors(m, n).values())
    dW = sibling.update(draw(sibling, m, n), m, n)
    assert dW.shape == (m, n) and dW.dtype == torch.float64
    assert sibling.flops(m, n) > 0 and sibling.name and sibling.paper and sibling.formula


@every
def test_rank_bound_is_reached(label):
    sibling, m, n = EXAMPLES[label]
    assert torch.linalg.matrix_rank(sibling.update(draw(sibling, m, n), m, n)) == sibling.rank(m, n)


@every
def test_affine_in_every_tensor(label):
    """f(x + y) + f(0) = f(x) + f(y) for each tensor but the softmax's logits, and each tensor matters."""
    sibling, m, n = EXAMPLES[label]
    t = draw(sibling, m, n)
    for name in t:
        zero, other = torch.zeros_like(t[name]), torch.randn_like(t[name])
        f = [sibling.update(t | {name: x}, m, n) for x in (t[name] + other, zero, t[name], other)]
        assert not torch.allclose(f[0], f[1])
        if name != "gate":
            torch.testing.assert_close(f[0] + f[1], f[2] + f[3])


def stacked(names, weights):
    """Terms of factors that are stacked along the first dimension."""
    return lambda t, s, m, n: [
        (w * a, b) for w, a, b in zip(weights(t), *(t[name] for name in names), strict=True)
    ]


def moka_s(t, s, m, n):
    g = t["gate"].softmax(0)
    return [
        (g[0] * torch.eye(2), t["B0"]),
        (g[1] * torch.eye(4), t["B1"]),
        (g[2] * t["A0"], torch.eye(3)),
    ]


def gralora(t, s, m, n):
    k, part = s.k, s.r // s.k
    return [
        (
            s.alpha / s.r * selector(k, i, j),
            t["gralora_B"][i].T[:, j * part : (j + 1) * part]
            @ t["gralora_A"][j].T[i * part : (i + 1) * part],
        )
        for i in range(k)
        for j in range(k)
    ]


def rotation(size, position):
    """R of RoPE at a position: entry i of the first half is paired with entry i of the second."""
    out = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size // 2):
        angle = position * 10000 ** (-2 * i / size)
        pair = torch.tensor([i, i + size // 2])
        cos, sin = math.cos(angle), math.sin(angle)
        out[pair[:, None], pair] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return out


#: label -> its terms (A_i, B_i), scales included
KRONECKER_SUMS = {
    "moka": lambda t, s, m, n: [
        (s.scale * t["gate"].softmax(0)[i] * t[f"A{i}"], t[f"B{i}"]) for i in range(3)
    ],
    "moka_s": moka_s,
    "krona": lambda t, s, m, n: [(s.scale * t["A"], t["B"])],
    "lora": lambda t, s, m, n: [(2 * t["lora_B"][:, [i]], t["lora_A"][[i]]) for i in range(s.r)],
    "rslora": lambda t, s, m, n: [(6 / 3**0.5 * t["lora_B"][:, [i]], t["lora_A"][[i]]) for i in range(s.r)],
    "lokr": lambda t, s, m, n: [(t["lokr_w1"] / 2, t["lokr_w2"])],
    "lokr_low_rank": lambda t, s, m, n: [
        (3 * t["lokr_w1"], torch.outer(t["lokr_w2_a"][:, j], t["lokr_w2_b"][j])) for j in range(s.r)
    ],
    "lokr_both": lambda t, s, m, n: [(3 * t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"])],
    "kron_lora": lambda t, s, m, n: [(s.alpha / s.r * t["A"], t["B1"] @ t["B2"])],
    "compacter": lambda t, s, m, n: [
        (t["phm_rule"][i].T, (t["W_left"][i] @ t["W_right"][i]).T) for i in range(s.phm_dim)
    ],
    "soka": stacked("UV", lambda t: t["sigma"]),
    "dota": lambda t, s, m, n: [(t["core1"][0, :, :, k], t["core2"][k, :, :, 0]) for k in range(s.k)],
    "cdka": lambda t, s, m, n: [(t["lora_B"][:, i::2], t["lora_A"][i::2]) for i in range(s.r)],
    "gralora": gralora,
    "melora": lambda t, s, m, n: [
        (selector(3, i, i), 8 * t[f"lora_B.{i}"] @ t[f"lora_A.{i}"]) for i in range(3)
    ],
    "melora_shared": lambda t, s, m, n: [(torch.eye(3), 8 * t["lora_B.0"] @ t["lora_A.0"])],
    "mora": lambda t, s, m, n: [(torch.ones(m // s.s, n // s.s), t["M"])],
    "mora_decoupled": lambda t, s, m, n: [(torch.eye(n // s.s), t["M"])],
    "mora_rotary": lambda t, s, m, n: [
        (selector(n // s.s, j, j), t["M"] @ rotation(s.s, j)) for j in range(n // s.s)
    ],
    "miss": lambda t, s, m, n: [(torch.ones(1, n // s.r), t["miss_block"].T)],
    "miss_mini": lambda t, s, m, n: [(torch.ones(m // s.mini, n // s.r), t["miss_block"].T)],
    "c3a": lambda t, s, m, n: [(t["c3a_kernel"][:, :, j] / n, torch.eye(s.b).roll(j, 1)) for j in range(s.b)],
    "vera": lambda t, s, m, n: [
        ((t["vera_lambda_d"][i] * t["vera_lambda_b"] * t["vera_B"][:, i])[:, None], t["vera_A"][[i]])
        for i in range(s.r)
    ],
    "kron_vera": lambda t, s, m, n: [
        (t["g"][i] * t["scale_a"][:, None] * t["A"][i], t["scale_c"][:, None] * t["B"][i]) for i in range(s.k)
    ],
    "lora_xs": lambda t, s, m, n: [
        (2 * t["R"][i, j] * t["lora_B"][:, [i]], t["lora_A"][[j]]) for i in range(3) for j in range(3)
    ],
    "moka_xs": lambda t, s, m, n: [
        (t["M"][i, j] * t["A"][i], t["B"][j]) for i in range(s.k) for j in range(s.k)
    ],
    "kradapter": lambda t, s, m, n: [  # rows: e_i v_i^T kron w_i^T
        (2 * torch.outer(unit(m, i), t["v_weight"][i]), t["weight"][[i]]) for i in range(m)
    ],
    "kradapter_tall": lambda t, s, m, n: [  # columns: v_j e_j^T kron w_j
        (2 * torch.outer(t["v_weight"][j], unit(n, j)), t["weight"][j][:, None]) for j in range(n)
    ],
    "qa_moka": stacked(("A", "repeated"), lambda t: t["gate"].softmax(0)),
}


@pytest.mark.parametrize("label", KRONECKER_SUMS)
def test_is_the_kronecker_sum(label):
    sibling, m, n = EXAMPLES[label]
    t = draw(sibling, m, n)
    if isinstance(sibling, QAMoKA):
        t["repeated"] = t["B"].repeat_interleave(sibling.q, 2)
    terms = KRONECKER_SUMS[label](t, sibling, m, n)
    expected = sum(torch.kron(a.double().contiguous(), b.double().contiguous()) for a, b in terms)
    torch.testing.assert_close(sibling.update(t, m, n), expected)


def test_only_the_cropped_are_no_kronecker_sums():
    assert EXAMPLES.keys() - KRONECKER_SUMS.keys() == {"mora_cropped", "miss_padded"}


def test_qa_moka_is_constant_in_groups_of_inputs():
    sibling, m, n = EXAMPLES["qa_moka"]
    assert isinstance(sibling, QAMoKA)
    groups = sibling.update(draw(sibling, m, n), m, n).reshape(m, -1, sibling.q)
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    assert not torch.allclose(groups[:, 0], groups[:, 1])


@pytest.mark.parametrize(
    ("sibling", "count", "mflops", "rank"),
    [
        (LoRA(1), 8_192, 0.016, 1),
        (LoRA(8), 65_536, 0.131, 8),
        (LoRA(64), 524_288, 1.049, 64),
        (KronA(64, 64), 8_192, 1.049, 4096),
        (KronA(16, 16), 65_792, 2.228, 4096),
        (KronA(8, 8), 262_208, 4.260, 4096),
        (KronLoRA(16, 16, r=8), 4_352, 0.135, 128),
        (KronLoRA(64, 64, r=4), 4_608, 0.098, 256),
        (KronLoRA(32, 32, r=8), 3_072, 0.147, 256),
        (MoKA(((64, 64, 64, 64),)), 8_192 + 1, 1.049, 4096),
        (MoKAs(left=(64,)), 4_096 + 1, 0.524, 4096),
        (C3A(256), 65_536, 0.852, 4096),
        (CDKA(r1=2, r2=8, r=4), 69_632, 0.328, 64),
    ],
    ids=str,
)
def test_figures_for_4096_by_4096(sibling, count, mflops, rank):
    assert sibling.count(4096, 4096) == count
    assert sibling.rank(4096, 4096) == rank
    assert sibling.flops(4096, 4096) / 1e6 == pytest.approx(mflops, abs=5e-4)


def test_kron_flops_is_that_of_the_cheaper_order():
    assert kron_flops(2, 3, 5, 7) == 2 * 2 * 3 * 7 + 2 * 2 * 7 * 5  # A X first
    assert kron_flops(5, 3, 2, 7) == 2 * 3 * 7 * 2 + 2 * 5 * 3 * 2  # X B^T first


def test_mora_size():
    assert mora_size(4096, 4096, 8) == 256
    assert mora_size(11008, 4096, 8) == 348  # sqrt(120832) = 347.6
    assert mora_size(11008, 4096, 16) == 492 and mora_size(100, 21, 1, even=True) == 10

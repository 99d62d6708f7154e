"""What factors are made of: each kind against its definition, entry by entry, and its gradients."""

import itertools

import pytest
import torch

from moka import factors
from moka.errors import ConfigError
from moka.factors import constant, expand, init_, plan
from moka.shapes import KronShape


def dense(kind: str, rows: int, cols: int, parameters: torch.Tensor, count: int = 1) -> torch.Tensor:
    runs = plan([(kind, rows, cols)] * count)
    return expand(parameters, runs).view(count, rows, cols)


def parameters(kind: str, rows: int, cols: int, count: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count * factors.numel(kind, rows, cols), dtype=torch.float64)


def test_constants():
    none = torch.empty(0, dtype=torch.float64)
    assert torch.equal(dense("ones", 2, 3, none)[0], torch.ones(2, 3, dtype=torch.float64))
    selector = dense("selector(1,2)", 2, 3, none)[0]
    assert selector[1, 2] == 1 and selector.sum() == 1
    x = torch.arange(5.0, dtype=torch.float64)
    for j in range(7):
        assert torch.equal(dense(f"shift({j})", 5, 5, none)[0] @ x, x.roll(j))


def test_low_rank_and_repeat():
    p = parameters("lowrank(2)", 3, 5, count=2)
    for got, own in zip(dense("lowrank(2)", 3, 5, p, count=2), p.view(2, -1), strict=True):
        torch.testing.assert_close(got, own[:6].view(3, 2) @ own[6:].view(2, 5))
    p = parameters("repeat(3)", 2, 6)
    torch.testing.assert_close(
        dense("repeat(3)", 2, 6, p)[0], torch.kron(p.view(2, 2), torch.ones(1, 3).double())
    )


def test_circulant_is_a_sum_of_kronecker_products_with_shifts():
    b, rows, cols = 4, 8, 12
    p = parameters(f"circulant({b})", rows, cols)
    W = p.view(rows // b, cols // b, b)
    shifts = [dense(f"shift({j})", b, b, torch.empty(0, dtype=torch.float64))[0] for j in range(b)]
    expected = sum(torch.kron(W[:, :, j].contiguous(), shifts[j].T.contiguous()) for j in range(b)) / cols
    torch.testing.assert_close(dense(f"circulant({b})", rows, cols, p)[0], expected)


def test_khatri_rao():
    p = parameters("khatri_rao(2)", 6, 4)
    U, V = p[:8].view(2, 4), p[8:].view(3, 4)
    got = dense("khatri_rao(2)", 6, 4, p)[0]
    for j in range(4):
        torch.testing.assert_close(got[:, j], torch.kron(U[:, j], V[:, j]))


def test_khatri_rao_rows_are_the_transpose():
    p = parameters("khatri_rao_rows(2)", 4, 6)
    U, V = p[:8].view(4, 2), p[8:].view(4, 3)
    got = dense("khatri_rao_rows(2)", 4, 6, p)[0]
    for i in range(4):
        torch.testing.assert_close(got[i], torch.kron(U[i], V[i]))


def test_random_factors_are_the_same_everywhere_and_share_one_vector():
    kinds = [(f"random({i},7)", 3, 5) for i in range(3)]
    assert [factors.numel(*kind) for kind in kinds] == [3, 0, 0]
    scale = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    runs = plan(kinds)
    assert runs is not None
    got = expand(scale, runs).view(3, 3, 5)
    drawn = constant(*runs[0][:4], torch.float64, torch.device("cpu"))
    torch.testing.assert_close(got, drawn * scale[:, None])
    # these values must never change: adapter files hold the vector alone
    torch.testing.assert_close(
        drawn[0, 0, :3], torch.tensor(FIRST_RANDOM, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert not torch.equal(drawn[0], drawn[1])
    other = constant(*plan([("random(0,8)", 3, 5)])[0][:4], torch.float64, torch.device("cpu"))  # pyright: ignore
    assert not torch.equal(other[0], drawn[0])
    many = constant(*plan([("random(0,1)", 64, 64)])[0][:4], torch.float32, torch.device("cpu"))  # pyright: ignore
    assert abs(many.var().item() * 64 - 1) < 0.05


FIRST_RANDOM = [-0.2621801216265428, -0.4720208610493339, 0.21434273315153227]


def test_constants_made_in_inference_mode_serve_training():
    factors._constants.clear()
    with torch.inference_mode():
        constant(*plan([("ones", 3, 3)])[0][:4], torch.float32, torch.device("cpu"))  # pyright: ignore
    x = torch.randn(3, 3, requires_grad=True)
    (x * constant(*plan([("ones", 3, 3)])[0][:4], torch.float32, torch.device("cpu"))).sum().backward()  # pyright: ignore


@pytest.mark.parametrize(
    "kind", ["lowrank(2)", "repeat(2)", "circulant(2)", "khatri_rao(2)", "khatri_rao_rows(2)", "random(0,0)"]
)
def test_gradients(kind):
    p = parameters(kind, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: dense(kind, 4, 4, p), p)


def test_sides_of_several_kinds_keep_their_order():
    side = [("dense", 2, 2), ("ones", 2, 2), ("lowrank(1)", 2, 2), ("lowrank(1)", 2, 2), ("dense", 2, 2)]
    runs = plan(side)
    assert runs is not None and len(runs) == 4  # the two of low rank are built at once
    p = torch.arange(1.0, 17.0, dtype=torch.float64)
    got = expand(p, runs).view(5, 2, 2)
    assert torch.equal(got[0].flatten(), p[:4]) and torch.equal(got[4].flatten(), p[12:])
    assert (
        torch.equal(got[1], torch.ones(2, 2)) and got[2, 1, 1] == p[5] * p[7] and got[3, 0, 0] == p[8] * p[10]
    )


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "lowrank(2)",
        "repeat(2)",
        "circulant(2)",
        "khatri_rao(2)",
        "khatri_rao_rows(2)",
        "random(0,0)",
    ],
)
def test_a_zero_start_is_zero_and_can_leave_it(kind):
    p = torch.empty(factors.numel(kind, 4, 6), dtype=torch.float64)
    init_(p, (kind, 4, 6), zero=True)
    assert not dense(kind, 4, 6, p).any()
    p.requires_grad_()
    dense(kind, 4, 6, p).square().sum().backward()  # at zero, so the gradient of the square is zero
    (gradient,) = torch.autograd.grad(dense(kind, 4, 6, p).sum(), p)
    assert gradient.any()
    with torch.no_grad():
        init_(p, (kind, 4, 6), zero=False)
    assert dense(kind, 4, 6, p).any()


@pytest.mark.parametrize(
    "kind, rows, cols",
    [
        ("lowrank(0)", 2, 2), ("lowrank(3)", 2, 2), ("shift(1)", 2, 3), ("selector(2,0)", 2, 3),
        ("repeat(4)", 2, 6), ("circulant(3)", 6, 4), ("khatri_rao(4)", 6, 4),
        ("identity", 2, 3), ("repeat(0)", 2, 2),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kind, rows, cols):
    with pytest.raises(ConfigError, match=r"cannot be"):
        factors.check(kind, rows, cols)


@pytest.mark.parametrize(
    "kind", ["", "sparse", "lowrank", "dense(1)", "lowrank(1,2)", "lowrank(-1)", "lowrank(1)x"]
)
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ConfigError, match="expected one of"):
        factors.parse(kind)


def test_a_shape_counts_and_names_its_parameters():
    shape = KronShape(4, 4, 8, 16, b="lowrank(2)")
    assert (shape.a_numel, shape.b_numel) == (16, 48)
    assert str(shape) == "4x4*8x16 lowrank(2)" and str(KronShape(4, 4, 2, 3, 1)) == "I4*2x3"
    assert shape.expanded == KronShape(4, 4, 8, 16) and shape.fields == tuple(shape)
    assert KronShape(4, 4, 2, 3).fields == (4, 4, 2, 3, 0)


def test_runs_group_what_can_be_built_at_once():
    selectors = [(f"selector({i},{j})", 2, 2) for i, j in itertools.product(range(2), repeat=2)]
    runs = plan(selectors)
    assert runs is not None and len(runs) == 1 and runs[0].numel == 0
    assert plan([("dense", 2, 2), ("identity", 3, 3)]) is None

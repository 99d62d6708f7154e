"""Closed forms of updates, held against the dense matrices in fp64."""

import pytest
import torch
from torch import nn

from moka import MokaConfig, algebra
from moka.errors import ConfigError
from moka.layers import MokaLinear
from moka.shapes import KronShape

#: of 24 x 12: equal ones, outer products both ways, right factors of 6 and 8 rows, 3 and 4 columns
SHAPES = [
    (4, 6, 6, 2),
    (4, 6, 6, 2),
    (24, 1, 1, 12),
    (1, 12, 24, 1),
    (6, 4, 4, 3),
    (3, 2, 8, 6),
    (3, 3, 8, 4),
    (2, 12, 12, 1),
]


def random_terms(shapes, seed=0):
    torch.manual_seed(seed)
    sizes = [((ma, na), (mb, nb)) for ma, na, mb, nb in shapes]
    return [(torch.randn(a, dtype=torch.float64), torch.randn(b, dtype=torch.float64)) for a, b in sizes]


def dense(update):
    return torch.stack([torch.kron(A, B) for A, B in update])


FIRST, SECOND = random_terms(SHAPES), random_terms(SHAPES[::-1], seed=1)


def test_gram_of_terms_of_any_two_shapes():
    expected = torch.einsum("inm,jnm->ij", dense(FIRST), dense(SECOND))
    torch.testing.assert_close(algebra.gram(FIRST, SECOND), expected)
    torch.testing.assert_close(algebra.gram(SECOND, FIRST), expected.mT)
    torch.testing.assert_close(algebra.inner(FIRST, SECOND), expected.sum())


def test_norms_of_the_whole_its_rows_and_its_columns():
    update = dense(FIRST).sum(0)
    torch.testing.assert_close(algebra.norm(FIRST), update.norm())
    torch.testing.assert_close(algebra.row_norms_squared(FIRST), update.square().sum(1))
    torch.testing.assert_close(algebra.column_norms_squared(FIRST), update.square().sum(0))


def test_large_updates_are_not_formed():
    """2^16 x 2^16 entries would take 34 GB."""
    shapes = [(1 << a, 1 << (16 - a), 1 << (16 - a), 1 << a) for a in (6, 7, 8, 9, 10)]
    update = random_terms(shapes)
    expected = torch.stack([A.square().sum() * B.square().sum() for A, B in update])
    torch.testing.assert_close(algebra.gram(update, update).diagonal(), expected)
    torch.testing.assert_close(algebra.importance(update).square(), expected)


def test_overlap():
    negative = [(-A, 3 * B) for A, B in FIRST]
    assert algebra.overlap(FIRST, FIRST) == pytest.approx(1.0)
    assert algebra.overlap(FIRST, negative[::-1]) == pytest.approx(-1.0)
    assert algebra.overlap(FIRST, [(A, 0 * B) for A, B in FIRST]) == 0.0
    one, other = (torch.eye(24, 12).double().roll(i, 0) for i in (0, 1))
    pair = [[(matrix, torch.ones(1, 1).double())] for matrix in (one, other)]
    assert algebra.overlap(*pair) == 0.0


def test_spectrum_and_effective_rank():
    A, B = FIRST[4]
    torch.testing.assert_close(
        algebra.spectrum(A, B), torch.linalg.svdvals(torch.kron(A, B))[: min(A.shape) * min(B.shape)]
    )
    assert algebra.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert algebra.effective_rank(torch.tensor([-2.0, 0.0, 0.0])) == pytest.approx(1)
    assert algebra.effective_rank(torch.tensor([1.0, 1.0, 0.01])) == pytest.approx(2, abs=1e-2)
    assert algebra.effective_rank(torch.zeros(3)) == 0.0


def test_recompression_is_the_nearest_of_its_size():
    update = random_terms([(4, 6, 6, 2)] * 5)
    whole = dense(update).sum(0)
    P, Q = (torch.stack([term[side].flatten() for term in update], 1) for side in (0, 1))
    sigma = torch.linalg.svdvals(P @ Q.mT)
    for keep in (1, 3, 5, 9):
        A, B, values, discarded = algebra.recompress(update, keep)
        assert A.shape == (min(keep, 5), 4, 6) and B.shape == (min(keep, 5), 6, 2)
        torch.testing.assert_close(values, sigma[: min(keep, 5)])
        rest = whole - dense(list(zip(A, B, strict=True))).sum(0)
        assert rest.square().sum().item() == pytest.approx(discarded, abs=1e-20, rel=1e-9)
        assert discarded == pytest.approx(sigma[keep:5].square().sum().item(), abs=1e-20, rel=1e-9)
    with pytest.raises(ConfigError, match=r"\(4, 6, 6, 2\), \(24, 1, 1, 12\).*expected one shape"):
        algebra.recompress(FIRST[1:3], 1)


@pytest.mark.parametrize("gate", ["softmax", "linear", "none"])
def test_terms_of_a_layer(gate):
    torch.manual_seed(0)
    layer = MokaLinear(nn.Linear(12, 24))
    shapes = [KronShape(*s) for s in (*SHAPES, (12, 12, 2, 1, 1), (4, 2, 6, 6, 2))]
    layer.add_adapter("default", MokaConfig(gate=gate, scale=1.7), shapes)
    for parameter in (layer.moka_A, layer.moka_B, layer.moka_gate):
        for tensor in parameter.values():
            nn.init.normal_(tensor)
    update = algebra.terms(layer, "default")
    assert all(
        factor.dtype == torch.float64 and not factor.requires_grad for term in update for factor in term
    )
    torch.testing.assert_close(dense(update).sum(0).float(), layer.delta_weight("default"))
    torch.testing.assert_close(algebra.norm(update).float(), layer.delta_weight("default").norm())

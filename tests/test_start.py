"""The Kronecker SVD, and starts of adapters that are computed from weights or data."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

import moka
from moka.errors import ConfigError, NonFiniteError, StateError
from moka.inject import adapter_layers
from moka.kpsvd import fit, kpsvd
from moka.shapes import KronShape


def rearranged(W: torch.Tensor, s: KronShape) -> torch.Tensor:
    """R(W), entry by entry of its definition."""
    blocks = W.view(s.ma, s.mb, s.na, s.nb)
    return torch.stack([blocks[i, :, j].flatten() for i in range(s.ma) for j in range(s.na)])


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("sizes", [(32, 32, 32, 32), (48, 24, 32, 24), (24, 36, 24, 16)])
def test_energy_is_that_of_eckart_and_young(sizes, k, device):
    torch.manual_seed(0)
    s = KronShape(*sizes)
    W = torch.randn(s.ma * s.mb, s.na * s.nb)
    A, B, sigma = kpsvd(W, *sizes, k)
    best = torch.linalg.svdvals(rearranged(W.double(), s)).square()
    terms = sum(sigma[i].double() * torch.kron(A[i].double(), B[i].double()) for i in range(k))
    missing = (W.double() - terms).square().sum()
    assert abs(missing - best[k:].sum()) < 1e-6 * best.sum()
    assert abs(sigma.double().square().sum() - best[:k].sum()) < 1e-5 * best[:k].sum()
    assert (sigma.diff() <= 0).all()
    torch.testing.assert_close(A.flatten(1) @ A.flatten(1).T, torch.eye(k), atol=1e-4, rtol=0)
    assert all(torch.equal(x, y) for x, y in zip((A, B, sigma), kpsvd(W, *sizes, k), strict=True))


def test_terms_beyond_the_rank_are_zero():
    A, B, sigma = kpsvd(torch.randn(4, 6), 2, 1, 2, 6, k=5)
    assert A.shape == (5, 2, 1) and B.shape == (5, 2, 6) and (sigma[2:] == 0).all() and not A[2:].any()


def test_a_fit_of_several_shapes_beats_the_greedy_one(device):
    torch.manual_seed(0)
    W = torch.randn(24, 36)
    shapes = [KronShape(4, 6, 6, 6), KronShape(6, 4, 4, 9), KronShape(4, 6, 6, 6)]
    fitted = W - sum(torch.kron(*term) for term in fit(W, shapes))
    greedy = W.clone()
    for s in (shapes[0], shapes[0], shapes[1]):
        A, B, sigma = kpsvd(greedy, *s[:4], 1)
        greedy -= sigma * torch.kron(A[0], B[0])
    assert fitted.norm() < greedy.norm() < W.norm()
    exact = torch.kron(torch.randn(4, 6), torch.randn(6, 6))
    assert (exact - sum(torch.kron(*term) for term in fit(exact, shapes))).norm() < 1e-4 * exact.norm()


SHAPES = [(4, 8, 16, 8), (8, 8, 8, 8), (4, 8, 16, 8)]


def token_ids() -> torch.Tensor:
    return torch.arange(48).view(2, 24)


def batches(n: int = 2) -> list[dict]:
    return [{"input_ids": token_ids() + 7 * i, "labels": token_ids() + 7 * i} for i in range(n)]


def injected(**fields) -> nn.Module:
    return moka.inject(tiny_model(), moka.MokaConfig(target_modules=["q_proj"], shapes=SHAPES, **fields))


def weight_gradient(path: str) -> torch.Tensor:
    model = tiny_model()
    for batch in batches():
        model(**batch).loss.backward()
    return model.get_parameter(f"{path}.weight").grad.double()


def test_gradient_start_is_the_kronecker_svd_of_the_gradient(device):
    model = injected(gate="linear")
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.moka_gate["default"].copy_(torch.tensor([0.2, 0.5, -0.4]))  # must not matter
    before = model(token_ids()).logits
    moka.start(model, "gradient", batches(), passes=8)
    torch.testing.assert_close(model(token_ids()).logits, before)
    for path, layer in adapter_layers(model).items():
        G = weight_gradient(path)
        factors = layer.factors("default")
        for shape, at in ((KronShape(*SHAPES[0]), [0, 2]), (KronShape(*SHAPES[1]), [1])):
            R = rearranged(G, shape)
            sigma = torch.linalg.svdvals(R)[: len(at)]
            A = torch.stack([factors[i][0].detach().flatten().double() for i in at], dim=1)
            assert (A.norm(dim=0) - (shape.ma / 3) ** 0.5).abs().max() < 1e-4
            U, _ = torch.linalg.qr(A)
            torch.testing.assert_close(U.abs(), (A / A.norm(dim=0)).abs(), rtol=1e-3, atol=1e-4)
            held = (U.T @ R).norm(dim=1)
            assert (held.diff() <= 1e-4).all() and held.square().sum() > 0.88 * sigma.square().sum()
            # at random: as many of all the directions as there are components
            assert held.square().sum() > 1.8 * R.square().sum() * len(at) / min(R.shape)
        assert not layer.moka_B["default"].any()


def test_the_first_step_after_a_gradient_start_is_longer():
    """The gradient of B is R(G)^T vec(A), longest for the leading vectors."""
    lengths = []
    for method in (None, "gradient"):
        torch.manual_seed(0)
        model = injected()
        if method:
            moka.start(model, method, batches())
        for batch in batches():
            model(**batch).loss.backward()
        lengths.append(sum(y.moka_B["default"].grad.norm() for y in adapter_layers(model).values()).item())
    assert lengths[1] > 1.3 * lengths[0]


def test_activation_start_follows_the_inputs(device):
    """A_i is Z_i C^(1/2) but for its length: C the moments of the inputs, Z_i the same for other inputs."""
    found = []
    for data in (batches(), batches(4)[2:]):
        model, seen = injected(), []
        moka.start(model, "activation", data)
        layer = next(iter(adapter_layers(model).values()))
        layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        for batch in data:
            model(**batch)
        X = torch.cat(seen).reshape(-1, 8, 8).double()
        values, vectors = torch.linalg.eigh(torch.einsum("tab,tcb->ac", X, X))
        A = [A.detach().double() for A, _ in layer.factors("default")]
        Z = [A_i @ (vectors * values.rsqrt() @ vectors.mT) for A_i in A]
        found.append((torch.cat(A), torch.cat([Z_i / Z_i.norm() for Z_i in Z])))
        assert not layer.moka_B["default"].any()
    (A, Z), (A_other, Z_other) = found
    torch.testing.assert_close(Z, Z_other, rtol=0, atol=1e-4)
    assert (A - A_other).norm() > 0.02 * A.norm()


def test_a_start_is_deterministic_and_takes_a_function(device):
    first, second = injected(), injected()
    moka.start(first, "gradient", batches())
    moka.start(second, "gradient", lambda: sum(second(**batch).loss for batch in batches()))
    for a, b in zip(adapter_layers(first).values(), adapter_layers(second).values(), strict=True):
        torch.testing.assert_close(a.moka_A["default"], b.moka_A["default"], rtol=1e-3, atol=1e-4)
        assert a.moka_A["default"].requires_grad and a.moka_A["default"].grad is None


@pytest.mark.parametrize("method", ["gradient", "activation"])
def test_a_start_does_not_depend_on_the_default_device(method):
    first, second, given = injected(), injected(), batches()
    moka.start(first, method, given)
    W = torch.randn(256, 256)
    expected = kpsvd(W, 16, 16, 16, 16, 1)
    with torch.device("meta"):  # what is made there by mistake has no values
        moka.start(second, method, given)
        found = kpsvd(W, 16, 16, 16, 16, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(adapter_layers(first).values(), adapter_layers(second).values(), strict=True):
        assert torch.equal(a.moka_A["default"], b.moka_A["default"])


def test_what_is_refused_changes_nothing():
    model, tokens = injected(), batches(1)[0]["input_ids"]
    layer = next(iter(adapter_layers(model).values()))
    before = layer.moka_A["default"].clone()
    for error, match, arguments in (
        (ConfigError, "method", ("magic", batches())),
        (ConfigError, "got none", ("gradient", [])),
        (ConfigError, "got a Tensor, expected", ("gradient", [tokens])),
        (ConfigError, r"no loss comes from \['input_ids'\]", ("gradient", [{"input_ids": tokens}])),
        (StateError, "does not exist", ("gradient", batches(), "other")),
    ):
        with pytest.raises(error, match=match):
            moka.start(model, *arguments)
    with pytest.raises(NonFiniteError, match="NaN"):
        moka.start(model, "gradient", lambda: model(**batches(1)[0]).loss * torch.nan)
    assert torch.equal(layer.moka_A["default"], before) and not layer.moka_B["default"].any()
    with torch.no_grad():
        layer.moka_B["default"].fill_(1.0)
    with pytest.raises(StateError, match="was trained"):
        moka.start(model, "gradient", batches())
    kinds = moka.inject(tiny_model(), moka.preset("kron-lora", size=8, rank=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="dense"):
        moka.start(kinds, "gradient", batches())

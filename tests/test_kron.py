"""The Kronecker mixture: the specification against torch.kron, the kernels against the specification."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import BACKENDS, assert_close_by_rule, integers, roundings, running_on, shifted
from moka import functional, reference
from moka.shapes import KronShape, flatten_shapes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = {
    "one_by_one": [(1, 1, 1, 1)],
    "one_component": [(4, 6, 5, 3)],
    "small_odd": [(3, 5, 7, 2), (7, 2, 3, 5), (3, 5, 7, 2)],
    "primes": [(17, 31, 13, 2), (13, 1, 17, 62)],
    "row_and_column": [(1, 7, 33, 9), (33, 1, 1, 63), (1, 63, 33, 1)],
    "vector_edges": [(15, 33, 17, 3), (17, 3, 15, 33), (15, 33, 17, 3)],
    "both_orders": [(4, 32, 24, 4), (24, 4, 4, 32), (12, 16, 8, 8)] * 2,
    "identity_a": [(6, 6, 4, 5, 1), (3, 3, 8, 10, 1)],
    "identity_b": [(4, 5, 6, 6, 2), (12, 15, 2, 2, 2)],
    "identity_repeated": [(6, 6, 4, 5, 1), (4, 5, 6, 6, 2), (6, 6, 4, 5, 1), (4, 5, 6, 6, 2), (4, 10, 6, 3)],
    "long_chain": [(20, 24, 10, 30)],
}


@pytest.fixture(
    params=[("auto", d) for d in DTYPES]
    + [(i, torch.float32) for i in BACKENDS[:-1]]
    + [pytest.param(("cuda", d), marks=pytest.mark.cuda) for d in DTYPES],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def dtype(request):
    """Each dtype on the CPU and on the GPU; fp32, the CPU's inner dtype, by each instruction set."""
    backend, dtype = request.param
    with running_on(backend):
        yield dtype


class Mixture:
    """Random factors, activations and output gradients of one case, and the operators on them."""

    def __init__(self, shapes, tokens, dtype=torch.float32, param_dtype=None, make=torch.randn):
        self.shapes = [KronShape(*s) for s in shapes]
        self.N, self.K = (self.shapes[0].ma * self.shapes[0].mb, self.shapes[0].na * self.shapes[0].nb)
        self.flat_shapes, self.dtype = flatten_shapes(self.shapes), dtype
        param_dtype = param_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        self.A = make(sum(s.a_numel for s in self.shapes)).to(param_dtype)
        self.B = make(sum(s.b_numel for s in self.shapes)).to(param_dtype)
        self.alpha = 2.0 ** torch.randint(-2, 2, (len(self.shapes),)).to(param_dtype)
        self.x, self.dy = make(tokens, self.K).to(dtype), make(tokens, self.N).to(dtype)

    @property
    def params(self):
        return self.A, self.B, self.alpha

    def mix(self, x, transpose=False, add=None):
        return torch.ops.moka.kron_mix(x, *self.params, self.flat_shapes, transpose, add)

    def grad(self, x=None, dy=None, need=(True, True, True)):
        x, dy = self.x if x is None else x, self.dy if dy is None else dy
        return torch.ops.moka.kron_mix_grad(x, dy, *self.params, self.flat_shapes, *need)

    def add_to(self, weight):
        return torch.ops.moka.kron_add(weight, *self.params, self.flat_shapes)

    def dense(self, dtype=torch.float64):
        return reference.kron_dense(*(p.to(dtype) for p in self.params), self.shapes)

    def reference_grad(self, dtype=torch.float64):
        """Gradients of the specification, by autograd."""
        leaves = [p.to(dtype).requires_grad_() for p in self.params]
        y = reference.kron_mixture(self.x.to(dtype), *leaves, self.shapes)
        grads = torch.autograd.grad(y, leaves, self.dy.to(dtype), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]

    def check_mix(self, by_ratio=True):
        for v, W, eager_W, transpose in (
            (self.x, self.dense().T, self.dense(self.dtype).T, False),
            (self.dy, self.dense(), self.dense(self.dtype), True),
        ):
            eager = v @ eager_W if by_ratio else None
            assert_close_by_rule(self.mix(v, transpose), v.double() @ W, eager, self.dtype, roundings(v))

    def check_grad(self, by_ratio=True):
        eager = self.reference_grad(self.dtype) if by_ratio else (None,) * 3
        for actual, expected, plain, param in zip(
            self.grad(), self.reference_grad(), eager, self.params, strict=True
        ):
            assert_close_by_rule(actual, expected, plain, param.dtype, reduces_tokens=True)


@pytest.mark.parametrize("name", CASES)
def test_specification(name):
    m = Mixture(CASES[name], 5, torch.float64)
    factors = reference.split_factors(m.A, m.B, m.shapes)
    dense = sum(a * torch.kron(A, B) for a, (A, B) in zip(m.alpha, factors, strict=True))
    torch.testing.assert_close(m.dense(), dense)
    torch.testing.assert_close(reference.kron_mixture(m.x, *m.params, m.shapes), m.x @ dense.T)


#: sums of a few terms, of which the order decides: some BLAS libraries err by 0.7 u where the limit is 32 u
SHORT = ("primes",)


@pytest.mark.parametrize("name", CASES)
def test_mix(name, dtype):
    for tokens in (1, 3, 20):
        Mixture(CASES[name], tokens, dtype, make=shifted).check_mix(by_ratio=name not in SHORT)


@pytest.mark.parametrize("name", CASES)
def test_grad(name, dtype):
    for tokens in (1, 7, 50):  # with 50 most of these small cases go through panels of G
        Mixture(CASES[name], tokens, dtype, make=shifted).check_grad(by_ratio=name not in SHORT)


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_16_bit_factors(param_dtype, device):
    m = Mixture(CASES["both_orders"], 9, torch.bfloat16, param_dtype, make=shifted)
    m.check_mix()
    m.check_grad()


@pytest.mark.parametrize("name", CASES)
def test_exact(name, dtype):
    """Small integers, gates that are powers of two: no rounding but the last, so bits must agree."""
    for tokens in (1, 30):
        m = Mixture(CASES[name], tokens, dtype, make=integers)
        W = m.dense()
        assert torch.equal(m.mix(m.x), (m.x.double() @ W.T).to(dtype))
        assert torch.equal(m.mix(m.dy, transpose=True), (m.dy.double() @ W).to(dtype))
        for actual, expected, param in zip(m.grad(), m.reference_grad(), m.params, strict=True):
            assert torch.equal(actual, expected.to(param.dtype))
        weight = integers(m.N, m.K).to(dtype)
        assert torch.equal(m.add_to(weight), (weight.double() + W).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_add_to_weight(name, dtype):
    m = Mixture(CASES[name], 1, dtype)
    weight = torch.randn(m.N, m.K).to(dtype)
    expected = weight.double() + m.dense()
    assert_close_by_rule(m.add_to(weight), expected, weight + m.dense(dtype), dtype)
    assert torch.equal(m.add_to(weight.T.contiguous().T), m.add_to(weight))


@pytest.mark.parametrize("transpose", [False, True])
def test_add_is_rounded_once(transpose, device):
    m = Mixture(CASES["both_orders"], 11, torch.bfloat16)
    v, W = (m.dy, m.dense()) if transpose else (m.x, m.dense().T)
    product = v.double() @ W
    base = torch.randn_like(product).float()  # more digits than the result has
    plain = base.bfloat16() + product.bfloat16()
    assert_close_by_rule(m.mix(v, transpose, base), base + product, plain, m.dtype, roundings(v))
    base = base.bfloat16()
    kept = base.clone()
    plain = base + product.bfloat16()
    assert_close_by_rule(m.mix(v, transpose, base), base + product, plain, m.dtype, roundings(v))
    assert torch.equal(base, kept)


@pytest.mark.parametrize("need", [(a, b, g) for a in (0, 1) for b in (0, 1) for g in (0, 1)], ids=str)
@pytest.mark.parametrize("name", ["both_orders", "identity_repeated"])
def test_only_needed_gradients(name, need, device):
    m = Mixture(CASES[name], 6, make=integers)
    for actual, full, needed in zip(m.grad(need=tuple(map(bool, need))), m.grad(), need, strict=True):
        assert torch.equal(actual, full) if needed else actual.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_zero_tokens(leading, dtype, device):
    m = Mixture(CASES["identity_repeated"], 1, dtype)
    x, dy = m.x.new_empty(*leading, m.K), m.x.new_empty(*leading, m.N)
    assert m.mix(x).shape == dy.shape
    assert m.mix(dy, transpose=True, add=x).shape == x.shape
    for grad, param in zip(m.grad(x, dy), m.params, strict=True):
        assert torch.equal(grad, torch.zeros_like(param))


def test_strided_and_misaligned_inputs(backend):
    m = Mixture(CASES["both_orders"], 12)
    y, dx, grads = m.mix(m.x), m.mix(m.dy, transpose=True), m.grad()

    def misaligned(t):
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.stack((t, t), dim=-1)[..., 0]

    def transposed(t):
        return t.T.contiguous().T

    def batched(t):
        return t.view(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1)

    for view in (misaligned, strided, transposed, batched):
        assert torch.equal(m.mix(view(m.x)).reshape(y.shape), y)
        assert torch.equal(m.mix(view(m.dy), True).reshape(dx.shape), dx)
        for actual, expected in zip(m.grad(view(m.x), view(m.dy)), grads, strict=True):
            assert torch.equal(actual, expected)
    expanded = m.x[:1].expand(5, -1)
    assert torch.equal(m.mix(expanded), m.mix(expanded.contiguous()))
    m.A, m.B, m.alpha = misaligned(m.A), strided(m.B), strided(m.alpha)
    assert torch.equal(m.mix(m.x), y)


def test_rows_do_not_depend_on_the_batch(isa):
    m = Mixture(CASES["small_odd"], 13)
    assert torch.equal(m.mix(m.x), torch.cat([m.mix(row) for row in m.x.split(1)]))


def test_not_a_number_stays_in_its_row(backend):
    m = Mixture(CASES["identity_repeated"], 6)
    m.x[2, 0], m.x[4] = torch.nan, torch.inf
    finite = m.mix(m.x).isfinite()
    assert finite[[0, 1, 3, 5]].all() and not finite[[2, 4]].all(dim=1).any()


def test_fp16_intermediates_do_not_overflow(device):
    m = Mixture([(2, 8, 2, 8)], 3, torch.float16, make=torch.ones)
    m.A.fill_(300)
    m.B.fill_(1 / 4096)
    m.x.fill_(300)  # V = A X reaches 720 000
    assert torch.equal(m.mix(m.x), (m.x.double() @ m.dense().T).half())


@pytest.mark.parametrize("name", ["long_chain", "small_odd"])  # by tokens; by panels of G
def test_repeats_are_equal(name, device):
    m = Mixture(CASES[name], 200)
    first = (m.mix(m.x), *m.grad())
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip((m.mix(m.x), *m.grad()), first, strict=True))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    n_factors = st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 17]), min_size=2, max_size=3)
    rows, cols = data.draw(n_factors), data.draw(n_factors)
    N, K = torch.tensor(rows).prod().item(), torch.tensor(cols).prod().item()
    shapes = []
    for _ in range(data.draw(st.integers(1, 4))):
        ma = data.draw(st.sampled_from([d for d in range(1, N + 1) if N % d == 0]))
        na = data.draw(st.sampled_from([d for d in range(1, K + 1) if K % d == 0]))
        allowed = [0] + [1] * (ma == na) + [2] * (N // ma == K // na)
        shapes.append((ma, na, N // ma, K // na, data.draw(st.sampled_from(allowed))))
    tokens = data.draw(st.integers(1, 9))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    m = Mixture(shapes, tokens, data.draw(st.sampled_from(DTYPES)), make=shifted)
    m.check_mix(by_ratio=False)
    m.check_grad(by_ratio=False)


@pytest.mark.parametrize("name", ["one_component", "identity_repeated"])
def test_gradcheck(name, device):
    m = Mixture(CASES[name], 2, torch.float64)
    inputs = [t.requires_grad_() for t in (m.x, *m.params)]
    assert torch.autograd.gradcheck(lambda *t: functional.kron_mixture(*t, m.shapes), inputs)


def test_operator_schemas(device):
    m = Mixture(CASES["small_odd"], 4)
    torch.library.opcheck(torch.ops.moka.kron_mix, (m.x, *m.params, m.flat_shapes, False, None))
    torch.library.opcheck(torch.ops.moka.kron_mix, (m.dy, *m.params, m.flat_shapes, True, m.x))
    torch.library.opcheck(
        torch.ops.moka.kron_mix_grad, (m.x, m.dy, *m.params, m.flat_shapes, True, False, True)
    )
    torch.library.opcheck(torch.ops.moka.kron_add, (torch.randn(m.N, m.K), *m.params, m.flat_shapes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 7)}, ValueError, r"x: expected shape \[\.\.\., 18\], got \[2, 7\]"),
        ({"x": torch.zeros(2, 18).int()}, TypeError, "x: expected dtype .*got Int"),
        ({"A": torch.zeros(25)}, ValueError, "A: expected 24 elements, got 25"),
        ({"B": torch.zeros(15).double()}, TypeError, "B: expected dtype Float like A, got Double"),
        ({"alpha": torch.zeros(2)}, ValueError, "alpha: expected 1 elements, got 2"),
        ({"add": torch.zeros(2, 18)}, ValueError, r"add: expected shape \[2, 20\], got \[2, 18\]"),
        ({"add": torch.zeros(2, 20).half()}, TypeError, "add: expected dtype Float"),
        ({"shapes": [4, 6, 5]}, ValueError, "shapes: expected 5 integers per component"),
        ({"shapes": [4, 6, 5, 3, 1]}, ValueError, "identity A must be square, got 4 x 6"),
    ],
)
def test_wrong_arguments(change, error, message, device):
    given_args = {
        "x": torch.zeros(2, 18),
        "A": torch.zeros(24),
        "B": torch.zeros(15),
        "alpha": torch.zeros(1),
    }
    given_args |= {"shapes": [4, 6, 5, 3, 0], "transpose": False, "add": None} | change
    given_args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given_args.items()}
    with pytest.raises(error, match=message):
        torch.ops.moka.kron_mix(**given_args)


def test_wrong_gradient_arguments(device):
    m = Mixture(CASES["one_component"], 4)
    with pytest.raises(
        ValueError, match=r"grad_y: expected the leading sizes of x, \[4, 18\], got \[3, 20\]"
    ):
        m.grad(dy=m.dy[:3])
    with pytest.raises(TypeError, match="grad_y: expected dtype Float, got Half"):
        m.grad(dy=m.dy.half())
    with pytest.raises(ValueError, match=r"weight: expected shape \[20, 18\], got \[18, 20\]"):
        m.add_to(torch.zeros(18, 20))


def planted_faults(m, y):
    """What a broken kernel would return: (name, result)."""

    def with_alpha(alpha):
        return reference.kron_mixture(m.x.double(), m.A.double(), m.B.double(), alpha, m.shapes).to(y.dtype)

    alpha = m.alpha.double()
    tile, stale = y.clone(), y.clone()
    tile[2:6, 16:32] = 0
    stale[-1] = y[0]
    return {
        "tile": tile,
        "stale row": stale,
        "alpha twice": with_alpha(alpha**2),
        "gates": with_alpha(alpha.flip(0)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["tile", "stale row", "alpha twice", "gates"])
def test_planted_faults_are_caught(fault, dtype, device):
    m = Mixture(CASES["both_orders"], 8, dtype)
    m.alpha = torch.linspace(0.5, 0.55, 6).to(m.alpha)
    y, W = m.mix(m.x), m.dense().T
    rule = (m.x.double() @ W, m.x @ m.dense(dtype).T, dtype, roundings(m.x))
    assert_close_by_rule(y, *rule)
    with pytest.raises(AssertionError):
        assert_close_by_rule(planted_faults(m, y)[fault], *rule)

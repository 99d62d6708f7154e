"""Pruning, growing, moving and truncating components: values, files and peft."""

import itertools
import sys

import pytest
import torch
from tiny import tiny_model
from torch import nn

import moka
from moka import MokaConfig
from moka.errors import StateError
from moka.gates import restrict
from moka.rules import plan_shapes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's call

IDS = torch.arange(3, 43).view(2, 20)
QV = ["q_proj", "v_proj"]
SIZES = (24, 36, 36, 24, 12)
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
PATHS = ["0.linear", "1.linear", "2.linear", "3.linear"]
#: each gate, with either rule of scale; a list of shapes with an identity on either side
CASES = {
    "softmax": {},
    "softmax, scale": {"scale": 3.0},
    "linear": {"gate": "linear"},
    "linear, scale": {"gate": "linear", "scale": 0.5},
    "none": {"gate": "none"},
    "none, scale": {"gate": "none", "scale": 2.0},
    "identity": {"shapes": "identity", "r": 4, "scale": 2.0},
    "bf16": {"adapter_dtype": "bfloat16"},
    "swapped": {"init": "swapped"},
}


def restricted_alpha(layer, name: str, k: int) -> torch.Tensor:
    config = layer.configs[name]
    return restrict(config.gate, layer.alpha(name), k, config.scale_for(k))[:k]


@pytest.fixture(autouse=True)
def no_search_for_optimizers(request, monkeypatch):
    """The search goes through all objects of the process, which takes longer than everything else here."""
    if "optimizers" not in request.node.name:
        monkeypatch.setattr(moka.rank, "optimizers_of", lambda model: [])
        monkeypatch.setattr(sys.modules["moka.inject"], "optimizers_of", lambda model: [])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.linear(x).tanh()


def net():
    """Four layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(*pair) for pair in itertools.pairwise(SIZES)))


def adapted(**fields):
    return randomized(moka.inject(net(), MokaConfig(**{"target_modules": ["linear"], "r": 6, **fields})))


def randomized(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1.0 if "gate" in name else 0.3)
    return model


@torch.no_grad()
def parts(layer, name="default"):
    """The dense matrix of each component, in fp64."""
    factors = zip(layer.alpha(name).double(), layer.factors(name), strict=True)
    return torch.stack([alpha * torch.kron(A.double(), B.double()) for alpha, (A, B) in factors])


def all_parts(model):
    return {path: parts(layer) for path, layer in moka.adapter_layers(model).items()}


def close(fields):
    """Limit on relative errors: a rounding of the factors."""
    return 2.0**-7 if fields.get("adapter_dtype") == "bfloat16" else 1e-6


def reloaded(model, folder):
    moka.save_adapter(model, folder)
    return moka.load_adapter(net(), folder)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@torch.no_grad()
def test_prune_keeps_the_values_of_the_largest(fields, tmp_path, device):
    model = adapted(**fields)
    before = all_parts(model)
    norms = {path: part.flatten(1).norm(dim=1) for path, part in before.items()}
    for path, scores in moka.importance(model).items():
        torch.testing.assert_close(scores, norms[path])
    best = {(path, int(n.argmax())) for path, n in norms.items()}
    rest = [
        (n[i].item(), path, i) for path, n in norms.items() for i in range(len(n)) if (path, i) not in best
    ]
    wanted = best | {entry[1:] for entry in sorted(rest, reverse=True)[:5]}
    old = {path: layer.factors("default") for path, layer in moka.adapter_layers(model).items()}
    left = moka.prune(model, keep=9)
    assert sum(left.values()) == 9 and min(left.values()) >= 1
    for path, part in all_parts(model).items():
        kept = [i for i in range(len(norms[path])) if (path, i) in wanted]
        assert len(part) == left[path] == len(kept)
        assert relative_error(part, before[path][kept]) < close(fields)
        if "linear" in fields.values():  # such a gate holds any value, so that the factors stay
            pairs = zip(moka.adapter_layers(model)[path].factors("default"), kept, strict=True)
            assert all(torch.equal(B, old[path][i][1]) for (_, B), i in pairs)
    config = model.moka_config["default"]
    assert config.gate == fields.get("gate", "softmax") and config.scale == fields.get("scale")
    again = reloaded(model, tmp_path)
    x = X.to(device)
    assert torch.equal(again(x), model(x))
    assert again.moka_config["default"] == config
    logits = model(x)
    merged = moka.eject(moka.merge(again, into=torch.float32))
    assert relative_error(merged(x), logits) < 1e-4


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_grow_changes_nothing_and_can_be_trained(fields, tmp_path):
    model = adapted(**fields)
    before, logits = all_parts(model), model(X).detach()
    assert set(moka.grow(model, 9).values()) == {9}
    assert relative_error(model(X), logits) < (0.02 if "adapter_dtype" in fields else 1e-5)
    for path, part in all_parts(model).items():
        r = len(before[path])
        assert relative_error(part[:r], before[path]) < close(fields)
        assert not part[r:].any()
    again = reloaded(model, tmp_path)
    assert torch.equal(again(X), model(X))
    again(X).square().mean().backward()
    for layer in moka.adapter_layers(again).values():
        pairs = zip(layer.factors("default")[6:], layer.shapes["default"][6:], strict=True)
        assert layer.moka_A["default"].grad.any() or layer.moka_B["default"].grad.any()
        # one factor is random, so that the other one has a gradient
        assert all(shape.identity or A.any() != B.any() for (A, B), shape in pairs)
    optimizer = torch.optim.SGD((p for p in again.parameters() if p.requires_grad), lr=0.1)
    optimizer.step()
    assert all(part[9 - 3 :].any() for part in all_parts(again).values())


def test_new_gates_are_the_mean_of_the_others():
    model = adapted()
    layer = model[0].linear
    moka.grow(model, {"0.linear": 8})
    gates = layer.moka_gate["default"].softmax(0)
    torch.testing.assert_close(gates[6:], gates[:6].mean().expand(2))
    assert [len(y.shapes["default"]) for y in moka.adapter_layers(model).values()] == [8, 6, 6, 6]


def test_new_shapes_are_what_the_layer_lacks():
    plan = plan_shapes(36, 24, 7)
    model = adapted(r=7)
    layer = model[0].linear
    moka.prune(model, keep=7)
    left = list(layer.shapes["default"])
    moka.grow(model, 7, shapes="balanced")
    assert layer.shapes["default"][: len(left)] == tuple(left)
    assert sorted(layer.shapes["default"]) == sorted(plan)
    lora = adapted(shapes=[(36, 1, 1, 24)] * 2, target_modules=["0.linear"])
    moka.grow(lora, 5)
    assert lora[0].linear.shapes["default"] == (moka.shapes.KronShape(36, 1, 1, 24),) * 5


def scores_of(model, values):
    """Scores of the 4 layers from rows of numbers."""
    return dict(zip(moka.importance(model), torch.tensor(values), strict=True))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"energy": 0.9}, [2, 1, 1, 1]),  # 9 + 8 of the first, the best of the others: 173 of 189.3
        ({"energy": 0.95}, [3, 1, 1, 1]),
        ({"energy": 1e-9}, [1, 1, 1, 1]),
        ({"energy": 1.0}, [3, 3, 3, 3]),
        ({"elbow": True}, [3, 1, 1, 1]),  # 9 8 5 4 lie before the bend
        ({"keep": 4}, [1, 1, 1, 1]),
        ({"keep": 7}, [3, 2, 1, 1]),
        ({"keep": 99}, [3, 3, 3, 3]),
    ],
)
def test_rules(rule, expected):
    model = adapted(r=3)
    values = [[4.0, 9.0, 8.0], [0.2, 5.0, 0.3], [0.1, 0.2, 0.1], [0.1, 0.1, 0.2]]
    left = moka.prune(model, scores=scores_of(model, values), **rule)
    assert list(left.values()) == expected


def test_equal_scores_have_no_bend():
    model = adapted(r=3)
    assert set(moka.prune(model, elbow=True, scores=scores_of(model, [[1.0] * 3] * 4)).values()) == {3}


def test_sensitivity_is_the_change_of_the_loss():
    model, x = adapted(shapes="identity", r=4, gate="linear").double(), X.double()
    (loss := model(x).square().mean()).backward()
    found = moka.importance(model, sensitivity=True)
    layer, path = model[1].linear, "1.linear"
    for i in range(4):
        with torch.no_grad():
            layer.moka_gate["default"][i] *= 1 - 1e-6
            change = (loss - model(x).square().mean()).item()
            layer.moka_gate["default"][i] /= 1 - 1e-6
        assert found[path][i].item() == pytest.approx(abs(change) / 1e-6, rel=1e-3)
    moka.prune(model, keep=8, scores=found)
    with pytest.raises(StateError, match="has no gradients; call backward"):
        moka.importance(adapted(), sensitivity=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: moka.prune(model, energy=0.9),
        lambda model: moka.prune(model, elbow=True),
        lambda model: moka.grow(model, 8),
        lambda model: moka.reallocate(model, 13),
        lambda model: moka.truncate(model, 2),
    ],
)
def test_nothing_depends_on_the_default_device(change):
    model, same = adapted(), adapted()
    with torch.device("meta"):  # what is made there by mistake has no values
        counts = change(model)
    assert counts == change(same)
    torch.testing.assert_close(model(X), same(X))


@torch.no_grad()
def test_reallocate_keeps_the_budget():
    model = adapted()
    before = all_parts(model)
    values = torch.full((4, 6), 0.1)
    values[0, :3], values[2, 0] = 3.0, 3.0
    now = moka.reallocate(model, budget=16, share=0.5, scores=scores_of(model, values.tolist()))
    # the best 8: three and one of 3.0, which draw new ones, and others of 0.1
    assert sum(now.values()) == 16
    counts = list(now.values())
    assert counts[0] > counts[2] > counts[3] >= 1
    for (path, part), scores in zip(all_parts(model).items(), values, strict=True):
        old = before[path][(scores > 1).nonzero().flatten()]
        if len(old):
            assert relative_error(part[: len(old)], old) < 1e-6
        assert now[path] == len(part)
    assert sum(moka.reallocate(model, budget=40).values()) == 40
    for layer in moka.adapter_layers(model).values():
        layer.moka_B["default"].zero_()
    assert sum(moka.reallocate(model, budget=13).values()) == 13


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@torch.no_grad()
def test_truncate_is_what_nested_training_saw(fields, tmp_path):
    model = adapted(**fields)
    moka.grow(model, {"0.linear": 7})
    layers = moka.adapter_layers(model)
    expected = {}
    for path, layer in layers.items():
        alpha = restricted_alpha(layer, "default", 3)
        if fields.get("gate", "softmax") == "softmax":
            assert alpha.sum().item() == pytest.approx(fields.get("scale", 3.0))
        factors = layer.factors("default")[:3]
        terms = zip(alpha, factors, strict=True)
        expected[path] = torch.stack([a.double() * torch.kron(A.double(), B.double()) for a, (A, B) in terms])
    assert set(moka.truncate(model, 3).values()) == {3}
    for path, part in all_parts(model).items():
        assert relative_error(part, expected[path]) < close(fields)
    assert torch.equal(reloaded(model, tmp_path)(X), model(X))
    assert set(moka.truncate(model, 99).values()) == {3}


def test_restricted_gates_pass_gradients_on():
    layer = adapted()[0].linear
    restricted_alpha(layer, "default", 2)[0].backward()
    gradient = layer.moka_gate["default"].grad
    assert gradient[:2].all() and gradient[2:].abs().max() < 1e-6 * gradient[:2].abs().max()
    whole = restricted_alpha(layer, "default", 6)
    torch.testing.assert_close(whole, layer.alpha("default"))


def test_a_4_bit_base_and_one_adapter_of_two():
    model = moka.inject(moka.quantize(tiny_model()), MokaConfig(QV, r=2))
    moka.inject(model, MokaConfig(QV, r=2), "second")
    randomized(model)
    moka.set_adapter(model, ["default", "second"])
    other = {p: parts(y, "second") for p, y in moka.adapter_layers(model).items()}
    moka.set_adapter(model, ["second"])
    moka.prune(model, keep=5)
    for path, layer in moka.adapter_layers(model).items():
        assert torch.equal(parts(layer, "second"), other[path])
        assert not layer.moka_A["default"].requires_grad and layer.moka_A["second"].requires_grad
        assert layer.active_adapters == ["second"]


def test_peft_saves_and_loads_what_was_rebuilt(tmp_path):
    peft = pytest.importorskip("peft")
    from moka.integrations.peft import MokaConfig as PeftConfig

    config = PeftConfig(target_modules=QV, r=4, task_type="CAUSAL_LM", r_pattern={"v_proj": 3})
    model = randomized(peft.get_peft_model(tiny_model(), config)).eval()
    assert sum(moka.prune(model, keep=7).values()) == 7
    logits = model(IDS).logits
    assert set(moka.grow(model, 5).values()) == {5}
    assert relative_error(model(IDS).logits, logits) < 1e-5
    assert next(iter(moka.importance(model))) == "model.layers.0.self_attn.q_proj"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    moka.truncate(model, 2)
    merged = model.merge_and_unload()
    assert relative_error(merged(IDS).logits, logits) > 1e-3

"""Injection: which layers, what an error leaves behind, several adapters, disabling and ejecting."""

import copy
import hashlib

import pytest
import torch
from tiny import tiny_model
from torch import nn

import moka
from moka import MokaConfig
from moka.errors import ConfigError, InjectionError, StateError
from moka.layers import MokaLinear, NF4Linear
from moka.trained_copy import TrainedCopy


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.v_proj = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 16)

    def forward(self, x):
        return x + self.out(self.norm(self.v_proj(self.q_proj(x).tanh())))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(16, 11, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)
CONFIG = MokaConfig(r=5)


def snapshot(model):
    """Everything an error must leave as it was: modules, flags, tensors and attributes."""
    return (
        {path: id(module) for path, module in model.named_modules(remove_duplicate=False)},
        {name: (id(p), p.requires_grad, digest(p)) for name, p in model.named_parameters()},
        {path: module.training for path, module in model.named_modules()},
        sorted(vars(model)),
    )


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


def test_injection_changes_no_output_and_freezes_the_base():
    model = Net()
    before = model(IDS)
    assert moka.inject(model, CONFIG) is model
    assert torch.equal(model(IDS), before)
    paths = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj")]
    assert list(moka.adapter_layers(model)) == paths
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.moka_{part}.default" for path in paths for part in ("A", "B", "gate")}
    assert model.moka_config == {"default": CONFIG}


@pytest.mark.parametrize("first", [True, False], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_failure_at_any_layer_is_rolled_back(monkeypatch, k, error, first):
    model = Net()
    if not first:
        moka.inject(model, MokaConfig(target_modules=["out"], modules_to_save=["embed"]), "zero")
        moka.inject(model, MokaConfig(target_modules=["q_proj"]), "one")
    before, active, original = snapshot(model), moka.active_adapters(model), MokaLinear.add_adapter
    calls = []

    def failing(self, name, *args):
        calls.append(name)
        original(self, name, *args)
        if len(calls) == k:
            raise error("planted")

    monkeypatch.setattr(MokaLinear, "add_adapter", failing)
    with pytest.raises(error, match="planted"):
        moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]), "two")
    assert snapshot(model) == before
    assert moka.active_adapters(model) == active
    monkeypatch.undo()
    moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]), "two")


def test_failure_after_the_layers_are_in_place_is_rolled_back(monkeypatch):
    model = Net()
    before = snapshot(model)
    planted = iter([True])

    def failing(self, names):
        if next(planted, False):
            assert "layers.0.q_proj" in moka.adapter_layers(model)
            raise KeyboardInterrupt

    monkeypatch.setattr(MokaLinear, "set_adapter", failing)
    with pytest.raises(KeyboardInterrupt):
        moka.inject(model, CONFIG)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["../x", "/abs", "", "a.b", "x" * 65, "a\0", "ab\u202ec", "-x"])
def test_adapter_names(name):
    with pytest.raises(ConfigError, match="adapter_name"):
        moka.inject(Net(), CONFIG, name)


@pytest.mark.parametrize("config", [{"r": 4}, None, object()], ids=["dict", "None", "object"])
def test_a_config_of_another_kind_is_refused(config):
    with pytest.raises(ConfigError, match=r"got a builtins\.\w+, expected a moka\.MokaConfig"):
        moka.inject(Net(), config)


@pytest.mark.parametrize("arguments", [("base", CONFIG), (CONFIG, Net()), (None, CONFIG)])
def test_what_is_no_model_is_refused(arguments):
    with pytest.raises(
        ConfigError, match=r"model: got a .*expected a torch\.nn\.Module .*inject\(model, config\)"
    ):
        moka.inject(*arguments)


def test_a_name_is_used_once():
    model = moka.inject(Net(), CONFIG)
    before = snapshot(model)
    with pytest.raises(StateError, match="adapter 'default' exists already"):
        moka.inject(model, CONFIG)
    assert snapshot(model) == before


def test_layers_that_are_not_called_as_linear_layers_are_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InjectionError, match=r"0: cannot adapt a .*Scaled"):
        moka.inject(nn.Sequential(Scaled(8, 8)), MokaConfig(target_modules="all-linear"))
    with pytest.raises(InjectionError, match=r"0\.out_proj: cannot adapt"):
        moka.inject(nn.Sequential(nn.MultiheadAttention(8, 2)), MokaConfig(target_modules=["out_proj"]))


def test_a_shared_layer_is_adapted_once():
    model = Net()
    model.layers[2].q_proj = model.layers[0].q_proj
    model.layers[1] = model.layers[0]
    moka.inject(model, CONFIG)
    layers = moka.adapter_layers(model)
    assert list(layers) == ["layers.0.q_proj", "layers.0.v_proj", "layers.2.v_proj"]
    assert model.layers[2].q_proj is model.layers[0].q_proj is layers["layers.0.q_proj"]
    notes = moka.summary(model).layers[0].notes
    assert notes == ("also reached as layers.1.q_proj, layers.2.q_proj",)
    moka.eject(model)
    assert isinstance(model.layers[2].q_proj, nn.Linear) and model.layers[2].q_proj is model.layers[0].q_proj


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    moka.inject(model, CONFIG)
    assert all(p.is_meta for p in model.parameters())
    real = Net().requires_grad_(False)
    for path, layer in moka.adapter_layers(model).items():
        layer.base_layer = copy.deepcopy(real.get_submodule(path))
    with pytest.raises(StateError, match=r"adapter 'default' is on the meta device.*reset_adapter"):
        model.layers[0].q_proj(torch.randn(2, 16))
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    for path, layer in moka.adapter_layers(model).items():
        layer.base_layer.load_state_dict(real.get_submodule(path).state_dict())
        layer.reset_adapter("default")
    assert torch.equal(model(IDS), real(IDS))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method:DeprecationWarning"
)  # torch's own, on first use
def test_wrapped_models_are_refused():
    compiled = torch.compile(Net())
    inplace = Net()
    inplace.layers[1].compile()
    for model, kind in (
        (compiled, "OptimizedModule"),
        (nn.Sequential(compiled), "0 is"),
        (inplace, "layers.1 is"),
    ):
        with pytest.raises(StateError, match=rf"{kind}.*inject first, then torch.compile"):
            moka.inject(model, CONFIG)


def test_an_optimizer_that_cannot_know_the_adapter():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="SGD was built before moka.inject and does not know the 18 adapter"):
        moka.inject(model, CONFIG)
    del optimizer


def test_disabled_is_the_base_whatever_happens():
    model = Net()
    base = model(IDS)
    moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]))
    randomize(model)
    adapted = model(IDS)
    assert not torch.equal(adapted, base)
    with moka.disabled(model) as same:
        assert same is model and torch.equal(model(IDS), base)
        with moka.disabled(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), moka.disabled(model):
            raise error
        assert torch.equal(model(IDS), adapted)


def test_eject_returns_the_original_objects():
    model = Net()
    model.layers[0].norm.weight.requires_grad_(False)
    before, base = snapshot(model), model(IDS)
    moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]))
    randomize(model)
    assert moka.eject(model) is model
    assert snapshot(model) == before and torch.equal(model(IDS), base)
    with pytest.raises(StateError, match="holds no adapter"):
        moka.eject(model)


def test_several_adapters_add_up():
    model = Net()
    moka.inject(model, MokaConfig(r=5), "one")
    randomize(model)
    moka.inject(model, MokaConfig(target_modules=["q_proj"], r=3, gate="linear"), "two")
    assert moka.active_adapters(model) == ["two"]
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
    randomize(model)
    layer, x = model.layers[0].q_proj, torch.randn(4, 16)
    y = {}
    for names in ("one", "two", ("one", "two"), ()):
        moka.set_adapter(model, names)
        y[names] = layer(x).double()
    base = y[()]
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.allclose(y["one"] + y["two"] - base, y["one", "two"], rtol=0, atol=1e-5)
    assert torch.allclose(
        y["one"] - base, x.double() @ layer.delta_weight("one").double().T, rtol=0, atol=1e-5
    )
    with pytest.raises(StateError, match=r"'three' does not exist; the model has \['one', 'two'\]"):
        moka.set_adapter(model, ["one", "three"])
    model.layers[0].v_proj(torch.randn(4, 16))  # has no adapter "two"


def test_modules_to_save_are_trained_beside_their_original():
    model = Net()
    head = model.lm_head
    moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]))
    assert isinstance(model.lm_head, TrainedCopy) and not head.weight.requires_grad
    trained = model.lm_head.modules_to_save["default"]
    before = digest(head.weight), digest(trained.weight)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS).square().mean().backward()
    optimizer.step()
    del optimizer
    assert digest(head.weight) == before[0] and digest(trained.weight) != before[1]
    assert model.lm_head.weight is trained.weight
    moka.inject(model, MokaConfig(r=5, modules_to_save=["lm_head"]), "other")
    with pytest.raises(ConfigError, match="each train this module"):
        moka.set_adapter(model, ["default", "other"])
    quantized = nn.Sequential(NF4Linear.from_linear(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(InjectionError, match="0 holds 4-bit"):
        moka.inject(quantized, MokaConfig(target_modules=["1"], modules_to_save=["0"]))


def test_summary():
    model = moka.inject(Net(), MokaConfig(r=5, target_modules=["q_proj", "out", "lm_head"], strict=False))
    result = moka.summary(model)
    assert len(result.layers) == 7 and result.trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    first = result.layers[0]
    assert (first.path, first.base, first.shape, len(first.shapes)) == (
        "layers.0.q_proj",
        "linear",
        (16, 16),
        5,
    )
    assert first.parameters == sum(s.a_numel + s.b_numel for s in first.shapes) + 5
    assert result.layers[-1].notes == ("out_features 11 is prime, so a factor is 1 x 11",)
    text = str(result)
    assert "layers.*.q_proj  3" in text and "4x4*4x4 (1)" in text and f"{result.trainable:,} of" in text
    assert "note: lm_head: out_features 11 is prime" in text
    with pytest.raises(StateError, match="holds no adapter"):
        moka.summary(Net())
    assert moka.summary(moka.inject(moka.quantize(Net()), CONFIG)).total - result.total == (
        moka.summary(moka.inject(Net(), CONFIG)).total - result.total
    )


def test_copies_are_independent():
    model = moka.inject(Net(), CONFIG)
    randomize(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    with torch.no_grad():
        twin.layers[0].q_proj.moka_B["default"].zero_()
    assert not torch.equal(twin(IDS), model(IDS))
    moka.eject(twin)
    assert moka.active_adapters(model) == ["default"]


def test_what_would_leave_out_the_adapter_is_refused(tmp_path):
    model = moka.inject(tiny_model(), moka.MokaConfig(["q_proj"], r=2))
    with pytest.raises(StateError, match=r"call moka\.save_adapter .*or moka\.merge and moka\.eject first"):
        model.save_pretrained(tmp_path)
    moka.eject(copy.deepcopy(model)).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = moka.quantize(tiny_model())
    for change in (lambda m: m, lambda m: moka.eject(moka.inject(m, moka.MokaConfig(["q_proj"], r=2)))):
        with pytest.raises(StateError, match=r"4-bit weights .*quantize it again.*moka merge"):
            change(model).save_pretrained(tmp_path)
        with pytest.raises(StateError, match="4-bit weights"):
            copy.deepcopy(model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    adapted = moka.inject(model, moka.MokaConfig("all-linear", r=2))
    dense = moka.eject(moka.merge(adapted, into=torch.bfloat16), into=torch.bfloat16)
    dense.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()

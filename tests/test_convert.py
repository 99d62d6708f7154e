"""LoRA, LoKr and full fine-tuning as MoKA, and MoKA as LoKr: against dense updates and peft itself."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import nn

import moka
from moka import MokaConfig, convert
from moka.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, NonFiniteError
from moka.shapes import KronShape

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's call

IDS = torch.arange(3, 23).view(1, 20)
QV = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def no_search_for_optimizers(monkeypatch):
    """The search goes through all objects of the process, which takes longer than everything else here."""
    monkeypatch.setattr(sys.modules["moka.inject"], "optimizers_of", lambda model: [])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def by_peft(config, folder=None):
    """A tiny model with a random adapter of peft, saved."""
    model = peft.get_peft_model(tiny_model(), config).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    if folder:
        model.save_pretrained(folder)
    return model


def deltas(model):
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {n.removeprefix("base_model.model."): m.get_delta_weight("default") for n, m in layers.items()}


LORAS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {"r": 2, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"0.self_attn.v_proj": 9}},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
def test_a_lora_in_its_own_shapes_is_exact(fields, tmp_path):
    lora = by_peft(peft.LoraConfig(target_modules=QV, **fields), tmp_path)
    shapes = {"q_proj": [(64, 1, 1, 64)] * 4, "v_proj": [(32, 1, 1, 64)] * 4}
    model = tiny_model()
    report = convert.from_lora(tmp_path, model, MokaConfig(QV, shapes=shapes))
    assert report.discarded_share < 1e-11 and report.rank == 4
    for path, delta in deltas(lora).items():
        assert relative_error(moka.delta_weight(model.get_submodule(path)), delta) < 1e-5
    assert relative_error(model(IDS).logits, lora(IDS).logits) < 1e-4
    state = {name: tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    again = tiny_model()
    convert.from_lora(state, again, MokaConfig(QV, shapes=shapes))
    for path, (A, B) in {
        p: [state[f"base_model.model.{p}.lora_{x}.weight"] for x in "AB"] for p in deltas(lora)
    }.items():
        assert relative_error(moka.delta_weight(again.get_submodule(path)), B @ A) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("gate", ["softmax", "linear", "none"])
def test_the_discarded_energy_is_that_of_the_singular_values(gate, tmp_path):
    lora = by_peft(peft.LoraConfig(target_modules=QV, r=8), tmp_path)
    shapes = {"q_proj": [(8, 8, 8, 8)] * 5, "v_proj": [(4, 8, 8, 8)] * 5}
    model = tiny_model()
    report = convert.from_lora(tmp_path, model, MokaConfig(QV, shapes=shapes, gate=gate, scale=0.7), "new")
    for layer in report.layers:
        delta, (ma, na, mb, nb) = deltas(lora)[layer.path].double(), shapes[layer.path.rpartition(".")[2]][0]
        R = delta.view(ma, mb, na, nb).transpose(1, 2).reshape(ma * na, mb * nb)
        tail = torch.linalg.svdvals(R)[5:].square().sum().item()
        written = moka.delta_weight(model.get_submodule(layer.path), "new").double()
        assert tail > 0.1 * layer.energy
        assert layer.discarded == pytest.approx(tail, rel=1e-3)
        assert (delta - written).square().sum().item() == pytest.approx(tail, rel=1e-3)
        assert layer.energy == pytest.approx(delta.square().sum().item(), rel=1e-5)
        assert layer.rank == 5
    assert model.model.layers[0].self_attn.q_proj.active_adapters == ["new"]


def test_fits_of_several_shapes_and_identities():
    torch.manual_seed(0)
    update = torch.randn(24, 12)
    shapes = tuple(
        KronShape(*s) for s in [(4, 6, 6, 2), (6, 4, 4, 3), (4, 6, 6, 2), (3, 3, 8, 4, 1), (12, 6, 2, 2, 2)]
    )

    def loss(kinds):
        rest = update - sum(torch.kron(A, B) for A, B in convert.fit(update, kinds))
        return rest.square().sum().item()

    assert (
        loss(shapes) < loss(shapes[:3]) < loss(shapes[:2]) < loss(shapes[:1]) < update.square().sum().item()
    )
    for kind in shapes[3:]:
        ((A, B),) = convert.fit(update, (kind,))
        twice = convert.fit(update, (kind, kind))
        torch.testing.assert_close(sum(torch.kron(*term) for term in twice), torch.kron(A, B))
        # least squares: the rest is orthogonal to every component of the kind
        rest = (update - torch.kron(A, B)).view(kind.ma, kind.mb, kind.na, kind.nb)
        dims = (0, 2) if kind.identity == 1 else (1, 3)
        assert rest.diagonal(dim1=dims[0], dim2=dims[1]).sum(-1).abs().max() < 1e-4
    zero = convert.fit(torch.zeros(24, 12), shapes)
    assert not sum(torch.kron(A, B) for A, B in zero).any()
    low = torch.kron(torch.randn(4, 6), torch.randn(6, 2))
    terms = convert.fit(low, shapes[:1] * 3)
    torch.testing.assert_close(sum(torch.kron(A, B) for A, B in terms), low)


@torch.no_grad()
def test_full_fine_tuning():
    base, tuned = tiny_model(), tiny_model()
    full = moka.inject(tiny_model(), MokaConfig(QV, r=2, shapes="balanced"))
    for parameter in full.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    for path, layer in moka.adapter_layers(full).items():
        tuned.get_submodule(path).weight += layer.delta_weight()
    model = tiny_model()
    report = convert.from_weights(base, tuned.state_dict(), model, MokaConfig(QV, r=2, shapes="balanced"))
    # two shapes, fitted in turns: not exact, and most of it
    assert report.discarded_share < 0.5 and len(report.layers) == 4
    exact = convert.from_weights(
        base,
        tuned,
        tiny_model(),
        MokaConfig(QV, shapes={"q_proj": [(64, 1, 1, 64)] * 64, "v_proj": [(32, 1, 1, 64)] * 32}),
    )
    assert exact.discarded_share < 1e-10
    tuned.model.norm.weight += 1
    with pytest.warns(UserWarning, match=r"1 tensors differ .*left out: \['model\.norm\.weight'\]"):
        convert.from_weights(base, tuned, tiny_model(), MokaConfig(QV, r=2))
    with pytest.raises(CheckpointMismatchError, match=r"q_proj\.weight: missing in base"):
        convert.from_weights({}, tuned, tiny_model(), MokaConfig(QV))


LOKRS = {
    "full": {"r": 64, "alpha": 20},
    "low rank": {"r": 2, "alpha": 3, "decompose_both": True},
    "patterns": {
        "r": 2,
        "alpha": 3,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 9},
    },
    "factor": {"r": 64, "decompose_factor": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", LOKRS.values(), ids=LOKRS)
def test_lokr_there_and_back(fields, tmp_path):
    lokr = by_peft(peft.LoKrConfig(target_modules=QV, **fields), tmp_path / "lokr")
    model = convert.from_lokr(tmp_path / "lokr", tiny_model())
    for path, delta in deltas(lokr).items():
        assert relative_error(moka.delta_weight(model.get_submodule(path)), delta) < 1e-6
    moka.save_adapter(model, tmp_path / "moka")
    loaded = moka.load_adapter(tiny_model(), tmp_path / "moka")
    convert.to_lokr(loaded, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "back")).eval()
    for path, delta in deltas(lokr).items():
        assert relative_error(deltas(again)[path], delta) < 1e-6
    assert relative_error(again(IDS).logits, lokr(IDS).logits) < 1e-5
    written = (tmp_path / "back" / "adapter_model.safetensors").read_bytes()
    convert.to_lokr(torch.compile(loaded), tmp_path / "back")  # over its own kind
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == written


@torch.no_grad()
def test_gate_and_scale_go_into_the_lokr(tmp_path):
    config = MokaConfig(["q_proj"], shapes=[(8, 8, 8, 8, 2)], gate="linear", scale=0.5)
    model = moka.inject(tiny_model(), config)
    for layer in moka.adapter_layers(model).values():
        nn.init.normal_(layer.moka_A["default"])
        layer.moka_gate["default"].fill_(-3.0)
    convert.to_lokr(model, tmp_path)
    lokr = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    for path, delta in deltas(lokr).items():
        assert relative_error(delta, moka.delta_weight(model.get_submodule(path))) < 1e-6


def test_alpha_beside_the_factors(tmp_path):
    lokr = by_peft(peft.LoKrConfig(target_modules=["q_proj"], r=2, alpha=2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state, path = load_file(file), "model.layers.0.self_attn.q_proj"
    save_file({**state, f"base_model.model.{path}.alpha": torch.tensor(6.0)}, file)
    model = convert.from_lokr(tmp_path, tiny_model())
    assert relative_error(moka.delta_weight(model.get_submodule(path)), 3 * deltas(lokr)[path]) < 1e-6


def test_what_a_lokr_cannot_hold(tmp_path):
    model = moka.inject(tiny_model(), MokaConfig(QV, r=2))
    with pytest.raises(ConfigError, match="expected one component per layer") as caught:
        convert.to_lokr(model, tmp_path / "out")
    assert str(caught.value).count("_proj") == 1  # not every layer of the model
    model = moka.inject(tiny_model(), MokaConfig(["q_proj"], shapes=[(2, 16, 32, 4)]))
    with pytest.raises(ConfigError, match=r"2x16\*32x4.*one decompose_factor"):
        convert.to_lokr(model, tmp_path / "out")
    model = moka.inject(tiny_model(), MokaConfig(["q_proj"], shapes=[(8, 8, 8, 8)]))
    moka.save_adapter(model, tmp_path / "own")
    with pytest.raises(ConfigError, match="'MOKA', which the LOKR would replace"):
        convert.to_lokr(model, tmp_path / "own")
    assert not (tmp_path / "out").exists()


def edited(folder, settings=(), tensors=()):
    """Changes the files of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **dict(settings)}))
    file = folder / "adapter_model.safetensors"
    state = {**load_file(file), **dict(tensors)}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


KEY = "base_model.model.model.layers.0.self_attn.q_proj."
EDITS = [
    ({"peft_type": "LOHA"}, {}, CheckpointFormatError, "the type 'LOHA', expected LORA"),
    ({"use_dora": True}, {}, CheckpointMismatchError, r"\['use_dora'\] have no counterpart"),
    (
        {},
        {KEY + "lora_magnitude_vector": torch.ones(3)},
        CheckpointMismatchError,
        "has no counterpart in MoKA",
    ),
    ({}, {KEY + "lora_A.weight": None}, CheckpointMismatchError, "q_proj'.*factors are missing"),
    ({}, {KEY + "lora_B.weight": torch.full((64, 2), torch.nan)}, NonFiniteError, "q_proj: the update holds"),
    (
        {},
        {KEY + "lora_B.weight": torch.ones(32, 2)},
        CheckpointMismatchError,
        r"\(32, 64\), expected \(64, 64\)",
    ),
    ({"alpha_pattern": {"(a+)+": 1}}, {}, CheckpointMismatchError, "regular expression"),
]


@pytest.mark.parametrize(("settings", "tensors", "error", "message"), EDITS)
def test_loras_that_are_refused(settings, tensors, error, message, tmp_path):
    by_peft(peft.LoraConfig(target_modules=QV, r=2), tmp_path)
    edited(tmp_path, settings, tensors)
    model = tiny_model()
    with pytest.raises(error, match=message):
        convert.from_lora(tmp_path, model, MokaConfig(QV, r=2))
    assert not moka.adapter_layers(model)


def test_layers_that_are_left_out(tmp_path):
    by_peft(peft.LoraConfig(target_modules=QV, r=2), tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"leaves out .*layers\.0\.self_attn\.v_proj"):
        convert.from_lora(tmp_path, tiny_model(), MokaConfig(["q_proj"]))
    model = tiny_model()
    report = convert.from_lora(tmp_path, model, MokaConfig([*QV, "k_proj"]))
    assert len(report.layers) == 4 and len(moka.adapter_layers(model)) == 6
    assert not moka.delta_weight(model.model.layers[0].self_attn.k_proj).any()


def test_lokrs_that_are_refused(tmp_path):
    by_peft(peft.LoKrConfig(target_modules=["q_proj"], r=2), tmp_path)
    edited(tmp_path, tensors={KEY + "lokr_t2": torch.ones(2, 2, 3, 3)})
    with pytest.raises(CheckpointMismatchError, match="lokr_t2: has no counterpart"):
        convert.from_lokr(tmp_path, tiny_model())
    edited(tmp_path, tensors={KEY + "lokr_t2": None, KEY + "lokr_w2_a": None})
    with pytest.raises(CheckpointMismatchError, match="expected a matrix lokr_w2"):
        convert.from_lokr(tmp_path, tiny_model())
    edited(tmp_path, tensors={KEY + "lokr_w2_b": None, KEY + "lokr_w2": torch.ones(8, 8, 3, 3)})
    with pytest.raises(CheckpointMismatchError, match=r"'lokr_w2': \[8, 8, 3, 3\]"):
        convert.from_lokr(tmp_path, tiny_model())
    edited(tmp_path, tensors={KEY + "lokr_w2": torch.ones(9, 8)})
    with pytest.raises(ConfigError, match="has the product 72 x 64"):
        convert.from_lokr(tmp_path, tiny_model())


def test_a_folder_without_an_adapter_is_named(tmp_path):
    for settings in (None, '{"peft_type": "LORA"}'):  # no file at all, then no weights
        if settings:
            (tmp_path / "adapter_config.json").write_text(settings)
        with pytest.raises(FileNotFoundError, match=r"adapter_.*expected the folder of a saved adapter"):
            convert.from_lora(tmp_path, tiny_model(), MokaConfig(QV))


def test_a_fit_reaches_16_bit_factors(tmp_path):
    lora = by_peft(peft.LoraConfig(target_modules=QV, r=4), tmp_path)
    shapes = {"q_proj": [(64, 1, 1, 64)] * 4, "v_proj": [(32, 1, 1, 64)] * 4}
    model = tiny_model()
    convert.from_lora(tmp_path, model, MokaConfig(QV, shapes=shapes, adapter_dtype="bfloat16"))
    for path, delta in deltas(lora).items():
        assert relative_error(moka.delta_weight(model.get_submodule(path)), delta) < 1e-2


@pytest.mark.parametrize(
    "fields",
    [{"init": "residual"}, {"gate": "matrix", "shapes": "even"}, {"gate": "routed"}, {"tie": "A"},
     {"magnitude": True}, {"gate": "topk(1)"}],
)  # fmt: skip
def test_a_fit_needs_factors_that_it_alone_decides(fields, tmp_path):
    by_peft(peft.LoraConfig(target_modules=QV, r=2), tmp_path)
    model = tiny_model()
    with pytest.raises(ConfigError, match="expected"):
        convert.from_lora(tmp_path, model, MokaConfig(QV, r=2, **fields))
    assert not moka.adapter_layers(model)

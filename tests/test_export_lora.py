"""MoKA adapters as peft's LoRA: read back by peft itself, and held against the singular values."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

import moka
from moka import MokaConfig
from moka.cli.app import app
from moka.errors import ConfigError, NonFiniteError, StateError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's call

IDS = torch.arange(3, 43).view(2, 20)
#: by last name: updates of rank at most 1*4 + 1*2 = 6, and 4*8 = 32 (all of v_proj)
LOW = {"q_proj": [(1, 16, 64, 4), (32, 1, 2, 64)], "v_proj": [(4, 8, 8, 8)] * 4}


def adapted(targets=("q_proj", "v_proj"), shapes=LOW, std=0.1, **fields):
    """A dense tiny model with a random adapter."""
    config = MokaConfig(target_modules=list(targets), shapes=shapes, **fields)
    model = moka.inject(tiny_model(), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5 if "gate" in name else std**0.5)
    return model


def by_peft(folder):
    return peft.PeftModel.from_pretrained(tiny_model(), str(folder)).eval()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("rank_pattern", [False, True])
def test_exact_at_full_rank(rank_pattern, tmp_path):
    model = adapted()
    export = moka.export_lora(model, tmp_path, rank_pattern=rank_pattern)
    ranks = {layer.path.rpartition(".")[2]: layer.rank for layer in export.layers}
    assert ranks == {"q_proj": 6, "v_proj": 32} and export.rank == 32
    assert export.discarded_share < 1e-11
    lora = by_peft(tmp_path)
    want, base = model(IDS).logits, tiny_model()(IDS).logits
    assert relative_error(lora(IDS).logits, want) < 1e-5 < 1e-2 < relative_error(base, want)
    for path, layer in moka.adapter_layers(model).items():
        module = lora.get_submodule(f"base_model.model.{path}")
        assert isinstance(module, peft.tuners.lora.Linear) and module.scaling["default"] == 1.0
        own = ranks[path.rpartition(".")[2]]
        assert module.r["default"] == (own if rank_pattern else 32)
        assert relative_error(module.get_delta_weight("default"), layer.delta_weight()) < 1e-5
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in lora.modules()) == 4


@torch.no_grad()
def test_truncation_is_the_best_of_its_rank(tmp_path):
    model = adapted()
    export = moka.export_lora(model, tmp_path, rank=5)
    lora, squares = by_peft(tmp_path), [0.0, 0.0]
    for layer in export.layers:
        delta = model.get_submodule(layer.path).delta_weight().double()
        S = torch.linalg.svdvals(delta)
        tail, total = S[5:].square().sum().item(), S.square().sum().item()
        written = lora.get_submodule(f"base_model.model.{layer.path}").get_delta_weight("default").double()
        assert torch.linalg.matrix_rank(written.float()) == layer.rank == 5
        assert (delta - written).square().sum().item() == pytest.approx(tail, rel=1e-3)
        assert layer.energy == pytest.approx(total, rel=1e-5)
        assert layer.discarded_share == pytest.approx(tail / total, rel=1e-3) and tail > 0.01 * total
        squares = [squares[0] + tail, squares[1] + total]
    assert export.discarded_share == pytest.approx(squares[0] / squares[1], rel=1e-3)
    assert f"4 layers, r = 5, discarded energy {export.discarded_share:.2e}" in str(export)
    first = export.layers[0]
    assert f"{first.path}  64 x 64, rank 5, discarded energy {first.discarded_share:.2e}" in str(export)


@torch.no_grad()
@pytest.mark.parametrize("rank_pattern", [False, True])
def test_energy_takes_the_smallest_rank(rank_pattern, tmp_path):
    model = adapted(targets=["q_proj", "v_proj", "down_proj"], shapes="balanced")
    export = moka.export_lora(model, tmp_path, energy=0.9, rank_pattern=rank_pattern)
    for layer in export.layers:
        S = torch.linalg.svdvals(model.get_submodule(layer.path).delta_weight().double()).square()
        share = S.cumsum(0) / S.sum()
        assert share[layer.rank - 1] >= 0.9 > share[layer.rank - 2]
        assert layer.discarded_share == pytest.approx(1 - share[layer.rank - 1].item(), rel=1e-3)
    assert len({layer.rank for layer in export.layers}) > 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(export.layers)
    smaller = {layer.path: layer.rank for layer in export.layers if layer.rank < export.rank}
    assert config["rank_pattern"] == config["alpha_pattern"] == (smaller if rank_pattern else {})
    assert config["r"] == config["lora_alpha"] == export.rank
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    for layer in export.layers:
        rank = layer.rank if rank_pattern else export.rank
        key = f"base_model.model.{layer.path}.lora_"
        assert tensors[key + "A.weight"].shape == (rank, layer.shape[1])
        assert tensors[key + "B.weight"].shape == (layer.shape[0], rank)
    lora = by_peft(tmp_path)
    assert all(m.scaling["default"] == 1 for m in lora.modules() if isinstance(m, peft.tuners.lora.Linear))
    capped = moka.export_lora(model, tmp_path, energy=0.9, rank=3)
    assert {layer.rank for layer in capped.layers} == {3}


@torch.no_grad()
def test_the_randomized_decomposition_is_as_good_as_the_full_one(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 240), nn.Linear(240, 160))
    config = MokaConfig(
        ["0", "1"], shapes={"0": [(2, 160, 120, 1), (16, 10, 15, 16)], "1": [(160, 1, 1, 240)]}
    )
    moka.inject(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state = torch.get_rng_state()
    export = moka.export_lora(model, tmp_path / "a", rank=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    moka.export_lora(model, tmp_path / "b", rank=8)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    S = torch.linalg.svdvals(model[0].delta_weight().double()).square()
    assert export.layers[0].discarded_share == pytest.approx((S[8:].sum() / S.sum()).item(), rel=0.01)
    # the bound by the sizes of the factors: one component of rank 1, found among few directions
    assert export.layers[1].rank == 1 and export.layers[1].discarded_share < 1e-11


@torch.no_grad()
def test_one_adapter_of_several_on_a_4_bit_base(tmp_path):
    model = moka.inject(moka.quantize(tiny_model()), MokaConfig(["q_proj"]), "first")
    moka.inject(model, MokaConfig(["layers.1.self_attn.v_proj"], shapes="identity"), "second")
    for layer in moka.adapter_layers(model).values():
        for table in (layer.moka_A, layer.moka_B):
            for parameter in table.values():
                parameter.normal_()
    export = moka.export_lora(model, tmp_path, "second")
    path = "model.layers.1.self_attn.v_proj"
    assert [layer.path for layer in export.layers] == [path]
    # a last name would select layers that this adapter leaves alone
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [path]
    module = by_peft(tmp_path).get_submodule(f"base_model.model.{path}")
    expected = moka.delta_weight(model.get_submodule(path), "second")
    assert relative_error(module.get_delta_weight("default"), expected) < 1e-5


def test_a_compiled_model_gives_the_same_file(tmp_path):
    model = adapted()
    moka.export_lora(model, tmp_path / "a")
    moka.export_lora(torch.compile(model), tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_update_of_zero(tmp_path):
    export = moka.export_lora(moka.inject(tiny_model(), MokaConfig()), tmp_path)
    assert export.rank == 1 and export.discarded_share == 0.0
    assert torch.equal(by_peft(tmp_path)(IDS).logits, tiny_model()(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0, expected a positive integer"),
        ({"rank": True}, "rank: got True"),
        ({"energy": 0.0}, "energy: got 0.0, expected a share above 0"),
        ({"energy": 1.5}, "energy: got 1.5"),
        ({"energy": float("nan")}, "energy: got nan"),
    ],
)
def test_options_out_of_range(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        moka.export_lora(adapted(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(tmp_path):
    model = adapted()
    with pytest.raises(StateError, match=r"'other' does not exist; the model has \['default'\]"):
        moka.export_lora(model, tmp_path, "other")
    moka.save_adapter(model, tmp_path / "own")
    before = (tmp_path / "own" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"own: holds an adapter of type 'MOKA'.*another folder"):
        moka.export_lora(model, tmp_path / "own")
    assert (tmp_path / "own" / "adapter_model.safetensors").read_bytes() == before
    layer = model.model.layers[1].self_attn.v_proj
    moka.export_lora(model, tmp_path / "lora", rank=2)
    before = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    layer.moka_A["default"].data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.v_proj: .*NaN or infinity"):
        moka.export_lora(model, tmp_path / "lora", rank=2)
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match=r"trains \['lm_head'\] in full.*moka\.merge"):
        moka.export_lora(adapted(modules_to_save=["lm_head"]), tmp_path / "x")
    with torch.device("meta"):
        meta = moka.inject(nn.Sequential(nn.Linear(8, 8)), MokaConfig(["0"]))
    with pytest.raises(StateError, match=r"0: .*meta device"):
        moka.export_lora(meta, tmp_path / "x")
    shared = nn.Sequential(nn.Linear(8, 8))
    shared.append(shared[0])
    with pytest.raises(ConfigError, match="1: shares its layer"):
        moka.export_lora(moka.inject(shared, MokaConfig(["0"])), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = moka.inject(moka.quantize(tiny_model(), double_quant=True), MokaConfig())
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    moka.save_adapter(model, tmp_path / "adapter")
    places = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "lora", "--model", tmp_path / "model"]

    def run(*options):
        return CliRunner().invoke(app, ["export-lora", *map(str, (*places, *options))])

    result = run("--energy", "0.5", "--rank", "4", "--rank-pattern")
    assert result.exit_code == 0, result.output
    assert "discarded energy" in result.output and "4 layers, r = 4" in result.output
    assert by_peft(tmp_path / "lora").peft_config["default"].base_model_name_or_path == str(
        tmp_path / "model"
    )
    assert run("--energy", "2").exit_code == 2

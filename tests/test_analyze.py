"""`moka analyze` and `moka convert`: figures held against dense matrices in fp64, and the two commands."""

import json
import math
import sys

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

import moka
from moka import MokaConfig, convert
from moka.cli.app import app
from moka.errors import StateError

IDS = torch.arange(3, 23).view(1, 20)


@pytest.fixture(autouse=True)
def no_search_for_optimizers(monkeypatch):
    """The search goes through all objects of the process, which takes longer than everything else here."""
    monkeypatch.setattr(sys.modules["moka.inject"], "optimizers_of", lambda model: [])


def adapted(model, **fields):
    moka.inject(model, MokaConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **fields}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1.0 if "gate" in name else 0.3)
    return model


def entropy(values):
    shares = values / values.sum()
    return -(shares * shares.log()).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_figures(quantized):
    model = adapted(moka.quantize(tiny_model()) if quantized else tiny_model(), scale=0.7, gate="linear")
    layers = moka.analyze(model)
    assert [layer.path for layer in layers] == list(moka.adapter_layers(model))
    for figures in layers:
        layer = model.get_submodule(figures.path)
        alpha, factors = layer.alpha("default").double(), layer.factors("default")
        parts = torch.stack([torch.kron(A.double(), B.double()) for A, B in factors]) * alpha[:, None, None]
        weight, delta, norms = layer.base_weight(), parts.sum(0), parts.flatten(1).norm(dim=1)
        weight = (weight.dequantize(torch.float32) if quantized else weight).double()
        rows = ((weight + delta).norm(dim=1) / weight.norm(dim=1) - 1).abs()
        expected = {
            "importance": norms.tolist(),
            "energy_share": (norms.square() / norms.square().sum()).tolist(),
            "effective_components": math.exp(entropy(norms.square())),
            "gate": layer.moka_gate["default"].tolist(),
            "gate_entropy": entropy(layer.moka_gate["default"].abs()),
            "norm": delta.norm().item(),
            "relative_norm": (delta.norm() / weight.norm()).item(),
            "row_change_mean": rows.mean().item(),
            "row_change_max": rows.max().item(),
            "effective_rank": math.exp(entropy(torch.linalg.svdvals(delta).square())),
        }
        for name, value in expected.items():
            assert getattr(figures, name) == pytest.approx(value, rel=1e-4), name
        assert figures.shapes == tuple(str(shape) for shape in layer.shapes["default"])


def test_costly_spectra_and_zero_updates():
    one = adapted(tiny_model(), shapes=[(8, 8, 8, 8)], target_modules=["q_proj"])
    (first, second), (dense, _) = moka.analyze(one, max_svd=0), moka.analyze(one)
    delta = one.get_submodule(first.path).delta_weight().double()
    assert first.effective_rank == pytest.approx(
        math.exp(entropy(torch.linalg.svdvals(delta).square())), rel=1e-4
    )
    assert dense == first != second
    assert {y.effective_rank for y in moka.analyze(adapted(tiny_model()), max_svd=31)} == {None}
    for figures in moka.analyze(moka.inject(tiny_model(), MokaConfig(r=3))):
        assert (
            figures.norm
            == figures.effective_components
            == figures.effective_rank
            == figures.row_change_max
            == 0
        )
        assert figures.gate_entropy == pytest.approx(math.log(3)) and figures.energy_share == (0, 0, 0)
    with pytest.raises(StateError, match="merged"):
        moka.analyze(moka.merge(one))


@pytest.fixture
def folder(tmp_path):
    """A model, and commands on it."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def run(folder, *options):
    places = ["--model", folder / "model", "--quantize", "none"]
    result = CliRunner().invoke(app, [*map(str, (*options, *places))])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_analyze_command(folder):
    pytest.importorskip("matplotlib")
    model = adapted(tiny_model())
    moka.save_adapter(model, folder / "adapter")
    files = {"--json": folder / "figures.json", "--plot": folder / "energy.png"}
    output = run(folder, "analyze", "-a", folder / "adapter", *(x for pair in files.items() for x in pair))
    assert "model.layers.1.self_attn.v_proj" in output and '"layers"' not in output
    figures = json.loads(files["--json"].read_text())
    assert figures["components"] == 16 and len(figures["layers"]) == 4
    norms = [layer.delta_weight().norm() for layer in moka.adapter_layers(model).values()]
    assert figures["norm"] == pytest.approx(torch.stack(norms).norm().item(), rel=1e-5)
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's call
def test_the_convert_command(folder):
    peft = pytest.importorskip("peft")
    model = adapted(tiny_model(), shapes=[(8, 8, 8, 8)], target_modules=["q_proj"])
    moka.export_lora(model, folder / "lora")
    settings = ["target_modules=[q_proj]", "shapes=[[8, 8, 8, 8]]"]
    output = run(folder, "convert", "-a", folder / "lora", "-o", folder / "moka", *settings)
    assert "2 layers, r = 1, discarded energy" in output
    run(folder, "convert", "-a", folder / "moka", "-o", folder / "lokr")
    run(folder, "convert", "-a", folder / "lokr", "-o", folder / "again")
    logits = model(IDS).logits
    lokr = peft.PeftModel.from_pretrained(tiny_model(), str(folder / "lokr")).eval()
    for other in (moka.load_adapter(tiny_model(), folder / "again"), lokr):
        assert ((other(IDS).logits - logits).norm() / logits.norm()).item() < 1e-4
    assert convert.kind_of(folder / "again") == "MOKA"
    options = ["convert", "-a", folder / "lokr", "-o", folder / "x", "r=3"]
    result = CliRunner().invoke(app, [*map(str, options)])
    assert result.exit_code == 2 and "expected no settings: a LOKR converts as it is" in result.output

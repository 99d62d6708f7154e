"""Adapter files with factors in 8 or 4 bits: what returns, how far off, how large, and forged ones."""

import json

import pytest
import safetensors.torch
import torch
from adapter_files import adapted, assert_refused, base, randomize, rewrite, same, state
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

import moka
from moka import packed
from moka.checkpoint import CONFIG, WEIGHTS
from moka.cli.app import app
from moka.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, NonFiniteError

SCHEMES = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PREFIX = "base_model.model.0.q."
ODD = {"shapes": [[1, 1, 16, 16], [4, 1, 4, 16]], "target_modules": ["q"]}  # A has 5 entries, 4 bits 3 bytes
CONFIGS = {
    "defaults": {},
    "bf16 factors": {"adapter_dtype": "bfloat16"},
    "an identity": {"shapes": {"q": [[4, 4, 4, 4, 1]], "v": "balanced"}},
    "odd": ODD,
    "gate matrix": {"gate": "matrix", "shapes": [[4, 4, 4, 4]] * 2, "target_modules": ["q"]},
    "low rank": {"shapes": [[4, 4, 4, 4, 0, "dense", "lowrank(2)"]], "target_modules": ["q"], "gate": "none"},
    "tied": {"tie": "A", "magnitude": True},
    "regex and in full": {
        "target_modules": r".*\.(q|v)",
        "r_pattern": {r"0\.[vw]": 2},
        "modules_to_save": ["norm"],
    },
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_loaded_is_stored_as_the_same_bytes(tmp_path, name, scheme):
    model = adapted(**CONFIGS[name])
    assert max(moka.save_adapter(model, tmp_path / "a", quantize=scheme).values()) > 1e-3
    fresh = moka.load_adapter(base(), tmp_path / "a")
    exact, loaded = state(model), state(fresh)
    assert exact.keys() == loaded.keys()
    for key, tensor in exact.items():
        factor = ".moka_A." in key or ".moka_B." in key
        assert torch.equal(tensor, loaded[key]) != (factor and tensor.numel() > 0), key
    assert set(moka.save_adapter(fresh, tmp_path / "b", quantize=scheme).values()) == {0.0}
    moka.load_adapter(randomize(fresh, 7), tmp_path / "b")  # into the adapter that is there
    moka.load_adapter(model, tmp_path / "b")
    assert same(fresh, loaded) and same(model, loaded)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(SCHEMES), st.sampled_from(DTYPES), st.integers(1, 200))
def test_each_entry_is_within_half_a_step(data, scheme, dtype, count):
    """Half of absmax / Q, and half a unit in the last place of the dtype; packing again changes no bit."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    low = {torch.float16: -8, torch.bfloat16: -40, torch.float32: -45}[dtype]  # subnormal numbers too
    high = {torch.float16: 4, torch.bfloat16: 37, torch.float32: 37}[dtype]
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    x *= (
        10.0
        ** torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=4, max_size=4)))[
            torch.arange(count) // 64
        ].double()
    )
    tensors = {"x.moka_A": x.to(dtype), "x.moka_gate": torch.ones(3)}
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    stored = packed.pack(tensors, scheme)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    assert found == packed.packed_layout(layout, scheme)
    back = packed.unpack(stored, layout, scheme, "file")
    groups = [t["x.moka_A"].double().split(64) for t in (tensors, back)]
    for old, new in zip(*groups, strict=True):
        absmax = old.abs().max()
        step = absmax / packed.LARGEST[scheme]
        rounding = torch.finfo(dtype).eps / 2 * absmax.clamp(min=torch.finfo(dtype).smallest_normal)
        assert (old - new).abs().max() <= step / 2 + rounding
        assert torch.equal(new.abs().max(), absmax)
    again = packed.pack(back, scheme)
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_the_layout_of_four_bits():
    x = torch.tensor([7.0, -7.0, 1.0, 0.0, -3.0]) / 2
    stored = packed.pack({"moka_A": x.clone(), ".moka_B": x}, "int4")
    assert stored[".moka_B_int4"].tolist() == [0x79, 0x10, 0xD0]
    assert stored[".moka_B_absmax"].tolist() == [3.5] and torch.equal(stored["moka_A"], x)
    assert packed.pack({".moka_B": torch.zeros(70)}, "int8")[".moka_B_absmax"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("scheme", "share"), [("int8", 8.5 / 32), ("int4", 4.5 / 32)])
def test_the_file_is_as_small_as_it_says(tmp_path, scheme, share):
    model = moka.inject(nn.Sequential(nn.Linear(1024, 1024)), moka.MokaConfig(target_modules=["0"]))
    randomize(model, 1)
    moka.save_adapter(model, tmp_path / "float")
    moka.save_adapter(model, tmp_path / "small", quantize=scheme)
    full, small = ((tmp_path / d / WEIGHTS).stat().st_size for d in ("float", "small"))
    assert small <= share * full + 2048  # the header


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "tied"])  # its magnitude changes delta_weight
def test_the_error_is_that_of_the_dense_updates(tmp_path, name, scheme):
    model = adapted(**CONFIGS[name])
    errors = moka.save_adapter(model, tmp_path, quantize=scheme)
    loaded = moka.load_adapter(base(), tmp_path)
    layers = [moka.adapter_layers(m) for m in (model, loaded)]
    assert list(errors) == list(layers[0])
    for path, error in errors.items():
        old, new = (moka.delta_weight(own[path], "default").double() for own in layers)
        assert error == pytest.approx(((old - new).norm() / old.norm()).item(), rel=1e-4)


def test_errors_without_one_update(tmp_path):
    routed = moka.save_adapter(adapted(gate="routed"), tmp_path, quantize="int8")
    assert all(1e-3 < error < 0.05 for error in routed.values())
    fresh = moka.inject(base(), moka.MokaConfig(target_modules=["q"], r=2))  # B is zero
    assert set(moka.save_adapter(fresh, tmp_path, quantize="int8").values()) == {0.0}
    assert moka.save_adapter(fresh, tmp_path) == {}


def test_what_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize: got 'int3', expected one of \(None, 'int8', 'int4'\)"):
        moka.save_adapter(adapted(), tmp_path / "x", quantize="int3")
    assert not (tmp_path / "x").exists()
    model = adapted()
    model[0].q.moka_B["default"].data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.q\.moka_B holds NaN"):
        moka.save_adapter(model, tmp_path / "x", quantize="int8")
    assert not (tmp_path / "x").exists()


# Forged files: the digests are right


def forge(tmp_path, scheme, edit, error, match, **flags):
    moka.save_adapter(adapted(**ODD), tmp_path, quantize=scheme)
    rewrite(tmp_path, edit)
    assert_refused(base(), tmp_path, error, match, **flags)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -float("inf")])
def test_bad_scales(tmp_path, scheme, value):
    def edit(tensors, body):
        tensors[f"{PREFIX}moka_B_absmax"][1] = value

    finite = value == -1.0
    match = f"{PREFIX}moka_B_absmax holds {'a negative' if finite else 'NaN or inf'}"
    forge(tmp_path, scheme, edit, CheckpointFormatError if finite else NonFiniteError, match)
    if value == -float("inf"):
        assert_refused(base(), tmp_path, CheckpointFormatError, "negative", allow_nonfinite=True)


@pytest.mark.parametrize("byte", [0x80, 0x08])
def test_integers_beyond_the_largest(tmp_path, byte):
    def edit(tensors, body, scheme="int4"):
        tensors[f"{PREFIX}moka_A_{scheme}"].view(torch.uint8)[0] = byte

    forge(tmp_path, "int4", edit, CheckpointFormatError, "moka_A_int4 holds an integer below -7")
    if byte == 0x80:
        moka.save_adapter(adapted(**ODD), tmp_path, quantize="int8")
        rewrite(tmp_path, lambda tensors, body: edit(tensors, body, "int8"))
        assert_refused(base(), tmp_path, CheckpointFormatError, "moka_A_int8 holds an integer below -127")


def test_bits_after_the_last_entry(tmp_path):
    def edit(tensors, body):
        tensors[f"{PREFIX}moka_A_int4"][-1] |= 1

    forge(tmp_path, "int4", edit, CheckpointFormatError, "moka_A_int4 has bits set after its last entry")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["", "absmax"])
def test_tensors_of_other_sizes_or_none(tmp_path, scheme, name):
    name = f"{PREFIX}moka_A_{name or scheme}"

    def longer(tensors, body):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    def other_dtype(tensors, body):
        tensors[name] = tensors[name].half()

    def absent(tensors, body):
        del tensors[name]

    for edit, kind in ((longer, "shape or dtype"), (other_dtype, "shape or dtype"), (absent, "1 missing")):
        forge(tmp_path, scheme, edit, CheckpointMismatchError, f"{kind}: {name}")


@pytest.mark.parametrize("value", ["int2", "INT8", "", "a" * 999, None, 8, ["int8"], {"int8": 1}])
def test_unknown_schemes(tmp_path, value):
    def edit(tensors, body):
        body["quantize"] = value

    forge(tmp_path, "int8", edit, ConfigError, r"stored as .{1,60} this moka reads \('int8', 'int4'\)")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_that_is_not_the_tensors(tmp_path, scheme):
    """Another one, or none in the manifest; or one for tensors in floating point."""
    other = next(s for s in SCHEMES if s != scheme)

    def edit(tensors, body):
        body["quantize"] = other

    forge(tmp_path, scheme, edit, CheckpointMismatchError, f"missing: {PREFIX}moka_A_{other}")
    forge(tmp_path, scheme, lambda tensors, body: body.pop("quantize"), CheckpointMismatchError, "missing")
    moka.save_adapter(adapted(**ODD), tmp_path)
    rewrite(tmp_path, edit)
    assert_refused(base(), tmp_path, CheckpointMismatchError, f"missing: {PREFIX}moka_A_{other}")


def test_tied_factors_must_agree(tmp_path):
    moka.save_adapter(adapted(tie="A"), tmp_path, quantize="int8")

    def edit(tensors, body):
        tensors["base_model.model.1.q.moka_A_int8"][0] ^= 1

    rewrite(tmp_path, edit)
    assert_refused(base(), tmp_path, CheckpointMismatchError, "differs from that of another layer")


def test_integers_only_where_they_are_announced(tmp_path):
    """In an adapter without the entry, and in a LoRA."""
    moka.save_adapter(adapted(), tmp_path)
    name = f"{PREFIX}moka_A"
    rewrite(tmp_path, lambda tensors, body: tensors.update({name: tensors[name].to(torch.int8)}))
    assert_refused(base(), tmp_path, CheckpointMismatchError, f"{name} I8 .*expected F32")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    safetensors.torch.save_file({"0.lora_A.weight": torch.ones(1, 4, dtype=torch.int8)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointFormatError, match=r"dtype 'I8', expected one of \['BF16'"):
        moka.convert.from_lora(tmp_path, base(), moka.MokaConfig())


# peft and the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model and a random adapter of it."""
    path = tmp_path_factory.mktemp("packed")
    tiny_model().save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    model = tiny_model()
    model.config.name_or_path = f"{path}/model"
    moka.save_adapter(randomize(moka.inject(moka.quantize(model), moka.MokaConfig(r=4)), 1), path / "float")
    return path


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert_writes_both_ways(folder, tmp_path):
    result = convert("-a", folder / "float", "-o", tmp_path / "int8", "--to", "int8")
    assert result.exit_code == 0, result.output
    lines = result.stdout.replace(",", "").splitlines()
    errors = [float(line.split()[-1]) for line in lines if "relative error of the update" in line]
    assert len(errors) == 4 and all(1e-3 < error < 0.05 for error in errors)
    sizes = [(d / WEIGHTS).stat().st_size for d in (folder / "float", tmp_path / "int8")]
    assert sizes[1] < sizes[0]
    assert f"{WEIGHTS}: {sizes[0]} bytes -> {sizes[1]} bytes" in lines
    for start, scheme in (("int8", "float"), ("float", "int8")):
        again = convert("-a", tmp_path / start, "-o", tmp_path / scheme, "--to", scheme)
        assert again.exit_code == 0, again.output
        assert ("relative error" in again.stdout) == (scheme == "int8")
    result = convert("-a", tmp_path / "float", "-o", tmp_path / "again", "--to", "int8")
    assert result.exit_code == 0 and "relative error of the update 0.00e+00" in result.stdout
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "int8" / WEIGHTS).read_bytes()


def test_convert_stores_a_lora_in_few_bits(folder, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": f"{folder}/model"}
    torch.manual_seed(0)
    path, size = "base_model.model.model.layers.0.self_attn.q_proj.lora_", (64, 64)
    tensors = {f"{path}A.weight": torch.randn(2, size[1]), f"{path}B.weight": torch.randn(size[0], 2)}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    options = "target_modules=[q_proj]", "layers_to_transform=[0]", "r=2", "shapes=[[64,1,1,64],[64,1,1,64]]"
    result = convert("-a", tmp_path, "-o", tmp_path / "int8", "--to", "int8", *options)
    assert result.exit_code == 0, result.output
    assert "discarded energy" in result.stdout and result.stdout.count("relative error of the update") == 1
    loaded = moka.load_adapter(moka.quantize(tiny_model()), tmp_path / "int8")
    (layer,) = moka.adapter_layers(loaded).values()
    update = tensors[f"{path}B.weight"] @ tensors[f"{path}A.weight"]
    error = (moka.delta_weight(layer, "default") - update).norm() / update.norm()
    printed = float(result.stdout.partition("of the update ")[2].split()[0])
    assert 1e-3 < error < 0.03 and printed == pytest.approx(error.item(), rel=0.01)


def test_convert_refuses_other_ways(folder, tmp_path):
    result = convert("-a", folder / "float", "-o", tmp_path / "x", "--to", "fp8")
    assert result.exit_code == 2 and not (tmp_path / "x").exists()
    assert "to: got 'fp8', expected one of ('float', 'int8', 'int4')" in result.stderr


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's call
def test_peft_refuses_by_name(folder, tmp_path):
    """Also where the configuration was swapped for one of floating-point factors."""
    peft = pytest.importorskip("peft")
    import moka.integrations.peft  # noqa: F401

    assert convert("-a", folder / "float", "-o", tmp_path, "--to", "int4").exit_code == 0
    assert json.loads((tmp_path / CONFIG).read_text())["format_version"] == 2
    with (
        pytest.warns(UserWarning, match="Unexpected keyword arguments"),
        pytest.raises(ConfigError, match=r"int8 or int4.*moka convert .*--to float"),
    ):
        peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    (tmp_path / CONFIG).write_bytes((folder / "float" / CONFIG).read_bytes())
    with pytest.raises(CheckpointMismatchError, match="tensors are missing"):
        peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path))

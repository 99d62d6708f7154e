"""Adapter files between moka and peft, hostile ones included, and hot swapping."""

import json

import pytest
import safetensors.torch
import torch
from adapter_files import same as same_state
from adapter_files import state
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import BASES, Case, logits, randomize, same
from torch import nn

import moka
from moka.checkpoint import CONFIG, WEIGHTS
from moka.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    MokaError,
    NonFiniteError,
    StateError,
    UnsafeFileError,
)
from moka.integrations.peft import MokaConfig, hotswap_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft uses what transformers deprecates
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # peft's, offline
]
KINDS = {
    "defaults": {},
    "shapes": {"shapes": {"q_proj": "identity", "v_proj": [(8, 8, 4, 8), (4, 4, 8, 16)]}, "gate": "linear"},
    "one side": {"shapes": "identity", "r": 1, "gate": "none", "scale": 3.0},
    "pattern": {"r_pattern": {"v_proj": 2}, "layers_to_transform": [1], "exclude_modules": ["k_proj"]},
    "in full": {"modules_to_save": ["norm"], "target_modules": "all-linear", "r": 2},
    "16 bits": {"adapter_dtype": "bfloat16"},
}


def fields(kind):
    return {"target_modules": ["q_proj", "v_proj"], "r": 4, **KINDS[kind]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_what_moka_saves_peft_loads(tmp_path, base, kind):
    case = Case("MoKA", base, tmp_path)
    model = moka.inject(case.base(), moka.MokaConfig(**fields(kind))).eval()
    randomize(model, "default", 1)
    moka.save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), str(tmp_path))
    assert same(logits(loaded), logits(model), 1e-6) and not same(logits(loaded), logits(case.base()), 1e-2)
    low = PeftModel.from_pretrained(case.base(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(low), logits(loaded))
    layers = moka.adapter_layers(low).values(), moka.adapter_layers(model).values()
    assert all(a.shapes == b.shapes for a, b in zip(*layers, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_what_peft_saves_moka_loads(tmp_path, base, kind):
    case = Case("MoKA", base, tmp_path)
    model = case.model(**fields(kind))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved by peft, without a fingerprint"):
        loaded = moka.load_adapter(case.base(), tmp_path).eval()
    assert same(logits(loaded), logits(model), 1e-6) and not same(logits(loaded), logits(case.base()), 1e-2)
    with pytest.warns(UserWarning, match="was saved by peft"):  # again, into the adapter that is there
        assert torch.equal(logits(moka.load_adapter(loaded, tmp_path)), logits(loaded))


def test_factors_of_16_bits_are_read_as_such(tmp_path):
    """As trainers leave them: peft's configuration does not say so."""
    case = Case("MoKA", "float", tmp_path)
    model = case.model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved by peft"):
        loaded = moka.load_adapter(case.base(), tmp_path).eval()
    layer = next(iter(moka.adapter_layers(loaded).values()))
    assert layer.configs["default"].adapter_dtype == "bfloat16"
    assert (
        layer.moka_A["default"].dtype == torch.bfloat16 and layer.moka_gate["default"].dtype == torch.float32
    )
    assert same(logits(loaded), logits(model), 1e-6)


def saved(folder):
    """A small adapter saved by peft, and a base to load it into."""
    model = get_peft_model(small(), MokaConfig(target_modules=["0", "1"], r=2))
    randomize(model, "default", 1)
    model.save_pretrained(folder)
    return small()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))


def edit(folder, **changes):
    path = folder / CONFIG
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "DELETE"}))


def assert_refused(folder, model, error, message):
    before = state(model)
    with pytest.raises(error, match=message):
        moka.load_adapter(model, folder)
    assert same_state(model, before) and not getattr(model, "moka_config", {})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"_custom_modules": "os.system"}, UnsafeFileError, "'_custom_modules' is unknown"),
        ({"runtime_config": {}}, UnsafeFileError, "'runtime_config' is unknown"),
        ({"target_modules": "(a+)+$"}, UnsafeFileError, "'target_modules' is a regular expression"),
        ({"exclude_modules": ".*"}, UnsafeFileError, "'exclude_modules' is a regular expression"),
        ({"r_pattern": {"(a+)+$": 2}}, UnsafeFileError, "'r_pattern' is a regular expression"),
        ({"peft_type": "LORA"}, CheckpointFormatError, "'LORA'"),
        ({"peft_type": ["MOKA"]}, CheckpointFormatError, "expected an adapter of MOKA"),
        ({"format_version": "DELETE"}, CheckpointFormatError, "expected an adapter of MOKA"),
        ({"format_version": 99}, ConfigError, "newer moka"),
        ({"r": 1e9}, ConfigError, "r: got"),
        ({"auto_mapping": {"base_model_class": ["x"]}}, CheckpointFormatError, "auto_mapping"),
        ({"task_type": {"a": 1}}, CheckpointFormatError, "task_type"),
        ({"trainable_token_indices": [1]}, CheckpointMismatchError, "trains tokens"),
        ({"r": 3}, CheckpointMismatchError, "does not fit this model"),
        ({"shapes": [[1, 1, 16, 16]]}, CheckpointMismatchError, "does not fit this model"),
        ({"target_modules": ["0"]}, CheckpointMismatchError, "unexpected"),
        ({"target_modules": ["2"]}, CheckpointMismatchError, "does not fit this model"),
    ],
)
def test_hostile_configurations(tmp_path, changes, error, message):
    model = saved(tmp_path)
    edit(tmp_path, **changes)
    assert_refused(tmp_path, model, error, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "MOKA", "peft_type": "MOKA"}', "duplicate key"),
        ('{"peft_type": "MOKA", "scale": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected an adapter of MOKA"),
        ("\ufeff", "not JSON"),
        (" " * (2 << 20), "no adapter needs as many"),
    ],
)
def test_hostile_json(tmp_path, text, message):
    model = saved(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    assert_refused(tmp_path, model, CheckpointFormatError, message)


def test_hostile_files(tmp_path):
    folder = tmp_path / "adapter"
    model = saved(folder)
    config = (folder / CONFIG).read_bytes()
    (folder / CONFIG).unlink()
    assert_refused(folder, model, CheckpointFormatError, "no manifest and no adapter_config.json")
    (tmp_path / "elsewhere.json").write_bytes(config)
    (folder / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    assert_refused(folder, model, UnsafeFileError, "outside its directory")
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_bytes(b"\xff" + config)
    assert_refused(folder, model, CheckpointFormatError, "not UTF-8")
    (folder / CONFIG).write_bytes(config)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    for value, error, message in (
        (torch.full_like(tensors[name], torch.nan), NonFiniteError, "NaN or infinity"),
        (tensors[name].double(), CheckpointMismatchError, "another shape or dtype"),
        (tensors[name].repeat(2), CheckpointMismatchError, "another shape or dtype"),
    ):
        safetensors.torch.save_file({**tensors, name: value}, folder / WEIGHTS, {"format": "pt"})
        assert_refused(folder, model, error, message)
    # a part of an adapter
    safetensors.torch.save_file({name: tensors[name]}, folder / WEIGHTS, {"format": "pt"})
    assert_refused(folder, model, CheckpointMismatchError, "missing")
    with pytest.raises(CheckpointMismatchError, match="are missing"):
        PeftModel.from_pretrained(model, folder)


def test_models_of_peft_are_told_what_to_call(tmp_path):
    model = get_peft_model(Case("MoKA", "float", tmp_path).base(), MokaConfig(target_modules=["q_proj"]))
    with pytest.raises(StateError, match=r"adapters of peft; save them with model\.save_pretrained"):
        moka.save_adapter(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(StateError, match=r"adapters of peft; load further ones with model\.load_adapter"):
        moka.load_adapter(model, tmp_path / "out")
    for call, instead in (
        (moka.merge, "merge with model.merge_and_unload"),
        (moka.eject, "take them out with model.unload or merge_and_unload"),
        (lambda m: moka.set_adapter(m, "default"), "choose with model.set_adapter"),
        (lambda m: moka.export_lora(m, tmp_path / "lora"), "save them with model.save_pretrained"),
    ):
        with pytest.raises(StateError, match=f"the model holds adapters of peft; {instead}"):
            call(model)
    for config in (MokaConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ConfigError, match=r"expected a moka\.MokaConfig; those of peft go to peft\.get"):
            moka.inject(Case("MoKA", "float", tmp_path).base(), config)


def test_truncated_configuration(tmp_path):
    """Cut anywhere, it is refused by an error of moka."""
    model = saved(tmp_path)
    text = (tmp_path / CONFIG).read_bytes()
    for end in range(0, len(text) - 2, 37):
        (tmp_path / CONFIG).write_bytes(text[:end])
        with pytest.raises(MokaError):
            moka.load_adapter(model, tmp_path)


def test_an_adapter_of_another_kind_is_not_mistaken_for_ones_own(tmp_path):
    model = saved(tmp_path)
    moka.inject(model, moka.MokaConfig(target_modules=["0", "1"], r=2, gate="linear"))
    with pytest.raises(CheckpointMismatchError, match="gate 'softmax'"):
        moka.load_adapter(model, tmp_path)


def test_hot_swap_keeps_the_compiled_model(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(0)
        model = get_peft_model(small(), MokaConfig(target_modules=["0", "1"], r=2))
        randomize(model, "default", seed)
        model.save_pretrained(tmp_path / str(seed))
    expected, x = model, torch.randn(3, 16)
    model = PeftModel.from_pretrained(small(), str(tmp_path / "1"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(x)
        hotswap_adapter(compiled, str(tmp_path / "2"))
        after = compiled(x)
        assert len(graphs) == 1
        assert not same(after, before) and same(after, expected(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (MokaConfig(target_modules=["0", "1"], r=3), CheckpointMismatchError, "r 3 "),
        (MokaConfig(target_modules=["0", "1"], r=2, scale=1.0), CheckpointMismatchError, "scale 1.0"),
        (MokaConfig(target_modules=["0"], r=2), CheckpointMismatchError, "3 tensors are missing"),
        (LoraConfig(target_modules=["0"], r=2), CheckpointMismatchError, "expected MoKA"),
    ],
)
def test_hot_swap_refuses_what_does_not_fit(tmp_path, other, error, message):
    get_peft_model(small(), other).save_pretrained(tmp_path)
    model = get_peft_model(small(), MokaConfig(target_modules=["0", "1"], r=2))
    before = state(model)
    with pytest.raises(error, match=message):
        hotswap_adapter(model, str(tmp_path))
    assert same_state(model, before)


def test_hot_swap_needs_an_unmerged_adapter(tmp_path):
    saved(tmp_path)
    model = PeftModel.from_pretrained(small(), str(tmp_path))
    with pytest.raises(StateError, match="'other' does not exist"):
        hotswap_adapter(model, str(tmp_path), "other")
    model.merge_adapter()
    with pytest.raises(StateError, match="merged"):
        hotswap_adapter(model, str(tmp_path))


def test_weighted_adapters_of_peft_are_checked(tmp_path):
    model = get_peft_model(small(), MokaConfig(target_modules=["0"], r=2, modules_to_save=["1"]))
    with pytest.raises(ConfigError, match="train modules in full"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model = get_peft_model(small(), MokaConfig(target_modules=["0"], r=2))
    with pytest.raises(ConfigError, match="combination_type: got 'ties'"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "ties")
    with pytest.raises(StateError, match="exists already"):
        model.add_weighted_adapter(["default"], [1.0], "default")
    with pytest.raises(ConfigError, match="adapters: got"):
        model.add_weighted_adapter(["other"], [1.0], "sum")
    with pytest.raises(ConfigError, match="adapter_name"):
        model.add_weighted_adapter(["default"], [1.0], "a.b")
    assert list(model.peft_config) == ["default"]

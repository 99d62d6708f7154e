"""MoKA as a method of peft: the scenarios, the configuration, and what is refused."""

import dataclasses
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_cases import BASES, TOKENS, Case, Skip, active, adapter_gradients, logits, randomize, same
from peft_scenarios import SCENARIOS
from tiny import tiny_model
from torch import nn
from transformers import LlamaForSequenceClassification

import moka
from moka.bases import is_linear4bit
from moka.errors import ConfigError, InjectionError, MergeError, StateError
from moka.integrations.peft import MOKA, MokaConfig, MokaPeftLinear, register
from moka.layers import MokaLinear
from moka.shapes import KronShape

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft uses what transformers deprecates
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # peft's, offline
]
#: Not for MoKA, by decision: see docs/peft.md.
REFUSED = {"Beside other methods in one model (`mixed=True`)": "not compatible"}


def case(tmp_path, base="float"):
    return Case("MoKA", base, tmp_path)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, base, tmp_path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft and transformers, about each other
            if name in REFUSED:
                with pytest.raises(ValueError, match=REFUSED[name]):
                    SCENARIOS[name](case(tmp_path, base))
            else:
                SCENARIOS[name](case(tmp_path, base))
    except Skip:
        pass  # there is no such thing on this base


def test_configuration_has_the_fields_of_moka():
    own = {field.name: field for field in dataclasses.fields(moka.MokaConfig)}
    here = {field.name: field for field in dataclasses.fields(MokaConfig)}
    assert own.keys() <= here.keys()
    assert MokaConfig(target_modules=["q_proj", "v_proj"]).to_moka() == moka.MokaConfig()
    fields = {
        "target_modules": ["q"], "exclude_modules": ["k"], "layers_to_transform": (1,), "r": 3,
        "gate": "linear", "shapes": {"q": "identity"}, "scale": 2.0, "init": "swapped", "dropout": 0.1,
        "gate_temperature": 2.0, "train": ("A", "gate"), "tie": "A", "nested": True, "magnitude": False,
        "gate_dropout": 0.2, "path": "factored", "r_pattern": {"q": 2}, "modules_to_save": ["n"],
        "adapter_dtype": "bfloat16", "strict": False,
    }  # fmt: skip
    assert fields.keys() == own.keys()
    assert MokaConfig(**fields).to_moka() == moka.MokaConfig(**fields)


def test_a_lora_script_keeps_its_arguments():
    config = MokaConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
        target_modules={"v_proj", "q_proj"}, rank_pattern={"v_proj": 4},
    )  # fmt: skip
    assert (config.scale, config.dropout, config.r_pattern) == (32, 0.05, {"v_proj": 4})
    assert config.target_modules == ["q_proj", "v_proj"]
    assert isinstance(config, PeftConfig) and config.peft_type == "MOKA" and config.peft_type.value == "MOKA"
    layer = MokaPeftLinear(nn.Linear(64, 64))
    layer.add_adapter("a", config.to_moka(), [KronShape(8, 8, 8, 8)] * 16)
    # as in LoRA, each of the 16 terms counts alpha/r
    assert torch.allclose(layer.alpha("a"), torch.full((16,), 32 / 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"lora_alpha": 8, "scale": 4.0}, "lora_alpha is another name of scale"),
        ({"lora_dropout": 2.0}, "dropout: got 2.0"),
        ({"target_modules": []}, "target_modules"),
        ({"gate": "top"}, "gate: got 'top'"),
        ({"format_version": 99}, "install a newer moka"),
    ],
)
def test_configuration_is_checked_on_construction(fields, message):
    with pytest.raises(ConfigError, match=message):
        MokaConfig(**fields)


def test_unknown_fields_of_lora_are_refused():
    with pytest.raises(TypeError, match="use_dora"):
        MokaConfig(use_dora=True)


def test_configuration_file(tmp_path):
    config = MokaConfig(target_modules=["b", "a"], shapes=[(2, 2, 2, 2)], task_type="CAUSAL_LM")
    config.target_modules = set(config.target_modules)  # as peft does when it shortens the list
    config.save_pretrained(tmp_path)
    first = (tmp_path / "adapter_config.json").read_bytes()
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, MokaConfig) and loaded.to_moka() == config.to_moka()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == first


def test_registration_gives_way_to_peft():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MOKA"] is MokaConfig
    register()  # again: no error, no change
    assert str(MOKA) == "PeftType.MOKA" and MOKA == "MOKA" and hash(MOKA) == hash("MOKA")
    tables = {"MOKA": PeftConfig}, {}, {}
    with pytest.raises(ImportError, match="has MoKA built in"):
        register(*tables)
    assert tables == ({"MOKA": PeftConfig}, {}, {})


def test_one_layer_class_serves_both(tmp_path):
    """What the peft layer adds is names: both compute by the same method."""
    model = case(tmp_path).model()
    layers = list(moka.adapter_layers(model).values())
    assert layers and all(type(layer) is MokaPeftLinear for layer in layers)
    assert MokaPeftLinear.forward is MokaLinear.forward
    assert len(moka.summary(model).layers) == len(layers)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, InjectionError, "'q_prj' matches no module"),
        ({"target_modules": "q_proj"}, InjectionError, r"the list \['q_proj'\]"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, InjectionError, "leaves out all"),
        ({"target_modules": ["input_layernorm"]}, InjectionError, "cannot adapt"),
        ({"shapes": [(3, 3, 3, 3)]}, ConfigError, "expected 64 x 64"),
        ({"r_pattern": {"x_proj": 2}}, InjectionError, "r_pattern key 'x_proj' matches no module"),
        ({"layers_to_transform": [5]}, InjectionError, "no layer"),
        ({"modules_to_save": ["nrm"]}, InjectionError, "modules_to_save: 'nrm' matches no module"),
    ],
)
def test_a_bad_configuration_leaves_the_model_alone(tmp_path, fields, error, message):
    model = case(tmp_path).base()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        get_peft_model(model, case(tmp_path).config(**fields))
    assert list(model.modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bad_adapter_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter_name"):
        get_peft_model(case(tmp_path).base(), case(tmp_path).config(), adapter_name="../x")


def test_4_bit_weights_are_not_trained_in_full(tmp_path):
    with pytest.raises(InjectionError, match="modules_to_save"):
        get_peft_model(case(tmp_path, "nf4").base(), case(tmp_path).config(modules_to_save=["o_proj"]))


def test_a_classifier_is_trained_with_its_head():
    """peft adds the heads to `modules_to_save`; all-linear leaves them alone."""
    config = tiny_model().config
    config.num_labels = 3
    model = get_peft_model(
        LlamaForSequenceClassification(config),
        MokaConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2),
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "moka_" not in n}
    assert trained == {"base_model.model.score.modules_to_save.default.weight"}
    assert len(moka.adapter_layers(model)) == 14
    bare = LlamaForSequenceClassification(config)
    bare.add_adapter(MokaConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    assert len(moka.adapter_layers(bare)) == 14


def test_peft_and_inject_do_not_mix(tmp_path):
    model = moka.inject(case(tmp_path).base(), moka.MokaConfig(r=2))
    with pytest.raises(StateError, match=r"moka\.eject"):
        get_peft_model(model, case(tmp_path).config())
    with pytest.raises(StateError, match="adapters of peft"):
        moka.inject(case(tmp_path).model(), moka.MokaConfig(r=2))


def test_every_linear4bit_keeps_its_bytes(tmp_path):
    """Also those that are not adapted: gradients pass through them too."""
    model = case(tmp_path, "bitsandbytes").model(as_it_comes=True)
    layers = [m for m in model.modules() if is_linear4bit(m)]
    assert len(layers) > 4 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_factors_stay_fp32_beside_a_bf16_base(tmp_path):
    model = case(tmp_path).base().bfloat16()
    model.add_adapter(case(tmp_path).config(), "default")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "moka_" in name else torch.bfloat16), name
    assert logits(model).dtype == torch.bfloat16
    # also on the way through the meta device
    saved = case(tmp_path).model()
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case(tmp_path).base().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    expected = dict(saved.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert "moka_" not in name or torch.equal(parameter, expected[name]), name


def test_mixed_batches_with_modules_trained_in_full():
    """peft's own wrapper of such a module gets the names of its rows too, repeated as beam search does."""
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = {"target_modules": ["q_proj"], "r": 2}
    model = get_peft_model(model, MokaConfig(modules_to_save=["lm_head"], **config))
    model.add_adapter("second", MokaConfig(modules_to_save=["lm_head"], **config))
    model.add_adapter("third", MokaConfig(**config))  # its rows go through the original head
    for seed, name in enumerate(("default", "second", "third")):
        randomize(model, name, seed, 0.1)
    names, options = ["second", "third", "default", "second"], {"max_new_tokens": 4, "pad_token_id": 2}
    got = logits(model.eval(), adapter_names=names)
    beams = model.generate(input_ids=TOKENS, adapter_names=names, num_beams=2, do_sample=False, **options)
    for row, name in enumerate(names):
        tokens = TOKENS[row : row + 1]
        with active(model, name):
            assert same(got[row : row + 1], logits(model, tokens))
            alone = model.generate(input_ids=tokens, num_beams=2, do_sample=False, **options)
        assert torch.equal(beams[row, : alone.shape[1]], alone[0])


def test_a_module_with_two_paths_is_adapted_in_both(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.append(model[0])
    x, shared = torch.randn(3, 16), model[0]
    tuned = get_peft_model(model, MokaConfig(target_modules=["0"], r=2))
    assert model[0] is model[2] and isinstance(model[2], MokaPeftLinear)
    randomize(tuned, "default", 1)
    expected = tuned(x)
    plain = tuned.merge_and_unload()
    assert plain[0] is plain[2] and plain[0] is not shared and isinstance(plain[0], nn.Linear)
    assert same(plain(x), expected)


def test_merging_into_4_bits_is_refused_when_it_erases_the_update(tmp_path):
    model = case(tmp_path, "nf4").model()
    randomize(model, "default", 1, 0.01)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="into="):
            merge()
        assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="changes the update"):
        model.merge_adapter(force=True)
    with pytest.raises(StateError, match="merged already"):
        model.merge_adapter()
    with pytest.raises(StateError, match="do not exist"):
        model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")
    with pytest.raises(StateError, match="unmerge"):
        next(iter(moka.adapter_layers(model).values())).delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("base", ["bitsandbytes", "nf4"])
def test_merging_into_16_bits_gives_a_plain_model(tmp_path, base):
    model = case(tmp_path, base).model()
    adapted, plain = logits(model), model.merge_and_unload(into=torch.bfloat16)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert all(type(m) is nn.Linear for n, m in plain.named_modules() if n.endswith("_proj"))
    assert same(logits(plain).float(), adapted, 0.1)
    plain.save_pretrained(tmp_path / "plain")
    loaded = type(plain).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(plain))
    assert plain.to(torch.float32).dtype == torch.float32  # which transformers refuses to a quantized model


def test_gates_and_factors_learn_through_every_base(tmp_path):
    for base in BASES:
        gradients = adapter_gradients(case(tmp_path, base).model().train())
        assert gradients and all(grad is not None and grad.any() for grad in gradients.values()), base


@pytest.mark.parametrize("missing", ["peft"])
def test_without_peft_the_import_names_the_extra(missing, monkeypatch):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("moka.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"moka\[peft\]"):
        importlib.import_module("moka.integrations.peft")


PAGE = (Path(__file__).parent.parent / "docs" / "peft.md").read_text(encoding="utf-8")


def test_the_guide_maps_every_field_of_lora():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {field.name for field in dataclasses.fields(LoraConfig)} - named == set()


def test_the_table_of_scenarios_is_complete():
    """And MoKA is never wrong in it, nor worse than LoRA but where that is decided."""
    rows = PAGE.partition("<!-- table: scenarios -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows[2:]}
    assert list(cells) == list(SCENARIOS)
    assert [name for name, row in cells.items() if not {*row[4:]} <= {"yes", "-"}] == list(REFUSED)


def test_moka_s_own_configuration_is_named():
    with pytest.raises(
        AttributeError, match=r"peft takes MokaConfig of moka\.integrations\.peft, .*from_moka"
    ):
        peft.get_peft_model(tiny_model(), moka.MokaConfig(["q_proj"]))

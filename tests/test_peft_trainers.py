"""Trainers of transformers and TRL with `peft_config=MokaConfig(...)` on a 4-bit model."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import SENTENCES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import moka
from moka.integrations.peft import MokaConfig

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn of themselves
CONFIG = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"}
LEARNING_RATE = 1e-4  # a step of Adam is as large; next to 1 the numbers of bf16 are 2^-8 = 4e-3 apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved base model with its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def base(folder, kind="bitsandbytes"):
    if kind == "nf4":
        return moka.quantize(AutoModelForCausalLM.from_pretrained(folder))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )


def gates(model):
    return {name: p for name, p in model.named_parameters() if "moka_gate" in name}


def shift_gates(model):
    """Away from zero, where bf16 is fine enough for small steps; all by the same, so nothing else changes."""
    for parameter in gates(model).values():
        parameter.data.add_(1.0)


def assert_gates_moved(model):
    assert gates(model)
    for name, parameter in gates(model).items():
        assert parameter.dtype == torch.float32, name
        moved = (parameter - 1).abs().max()
        assert 0 < moved < 2.0**-9, name  # less than half a step of bf16 below 1


def arguments(kind, output, **fields):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "report_to": [],
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "bf16": True,
    }
    return kind(str(output), **{**defaults, **fields})


def token_rows(count=8):
    tokens = torch.randint(3, 300, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.parametrize("kind", ["bitsandbytes", "nf4"])
def test_trainer_resumes_where_it_stopped(folder, tmp_path, kind):
    def train(**kwargs):
        torch.manual_seed(0)
        model = get_peft_model(base(folder, kind), MokaConfig(**CONFIG))
        options = arguments(TrainingArguments, tmp_path, learning_rate=3e-3)
        Trainer(model, options, train_dataset=token_rows()).train(**kwargs)
        return model

    whole = train()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "checkpoint-2").iterdir()
    }
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert trained and any("moka_B" in name and p.any() for name, p in trained.items())
    for name, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name]), name
    loaded = PeftModel.from_pretrained(base(folder, kind), tmp_path / "checkpoint-4")
    for name, parameter in loaded.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name


def test_sft_trainer_keeps_gates_in_fp32(folder, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": text} for text in SENTENCES * 3]
    trainer = SFTTrainer(
        base(folder),
        arguments(SFTConfig, tmp_path, max_length=32),
        train_dataset=as_dataset(rows),
        processing_class=tiny_tokenizer(),
        peft_config=MokaConfig(**CONFIG),
    )
    factors = {p.dtype for name, p in trainer.model.named_parameters() if "moka_B" in name}
    assert factors == {torch.bfloat16}  # TRL casts what is trained; the gates refuse
    shift_gates(trainer.model)
    trainer.train()
    assert_gates_moved(trainer.model)
    # peft's file notes no dtype; both ways of loading it give the trained values
    with pytest.warns(UserWarning, match="saved by peft"):
        loaded = moka.load_adapter(base(folder), tmp_path / "checkpoint-4")
    layer = next(iter(moka.adapter_layers(loaded).values()))
    assert layer.moka_B["default"].dtype == torch.bfloat16
    trained = dict(trainer.model.named_parameters())
    for path, layer in moka.adapter_layers(loaded).items():
        for table in (name for name in layer.adapter_layer_names if "default" in getattr(layer, name)):
            assert torch.equal(
                getattr(layer, table)["default"], trained[f"base_model.model.{path}.{table}.default"]
            )


@pytest.mark.parametrize(("kind", "tolerance"), [("bitsandbytes", 2e-2), ("nf4", 1e-6)])
def test_dpo_trainer(folder, tmp_path, kind, tolerance):
    """The reference is the model without its adapter: the same to the bit, except that bitsandbytes' layers
    round to bf16 in another order."""
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "Question: ", "chosen": text, "rejected": text[::-1]} for text in SENTENCES * 3]
    trainer = DPOTrainer(
        base(folder, kind),
        args=arguments(DPOConfig, tmp_path, max_length=48),
        train_dataset=as_dataset(rows),
        processing_class=tiny_tokenizer(),
        peft_config=MokaConfig(**CONFIG),
    )
    shift_gates(trainer.model)
    trainer.train()
    assert_gates_moved(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=tolerance)
    assert json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())["peft_type"] == "MOKA"


def as_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)

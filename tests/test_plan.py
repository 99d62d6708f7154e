"""Plans from a configuration alone: the paper's parameter counts, and agreement with a real model."""

import subprocess
import sys
import weakref

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka import MokaConfig
from moka.errors import ConfigError, InjectionError
from moka.plan import meta_model

LLAMA2_7B = LlamaConfig()
LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("config", "factors", "base"),
    [(LLAMA2_7B, 5_242_880, 6_738_415_616), (LLAMA3_8B, 3_932_160, 8_030_261_248)],
    ids=["LLaMA2-7B", "LLaMA3-8B"],
)
def test_the_papers_parameter_counts(config, factors, base):
    plan = moka.plan(config, MokaConfig(target_modules=["q_proj", "v_proj"], r=10))
    assert (plan.factor_parameters, plan.gate_parameters, plan.layers) == (factors, 640, 64)
    assert plan.base_parameters == base
    identity = moka.plan(config, MokaConfig(shapes="identity"))
    assert 2_100_000 <= identity.factor_parameters <= 4_200_000
    assert moka.plan(config, MokaConfig(gate="none")).parameters == factors


def test_a_meta_model_counts_as_its_injection_does():
    model = meta_model(LLAMA3_8B)
    moka.inject(model, MokaConfig())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.is_meta for p in trained)
    assert sum(p.numel() for p in trained) == 3_932_160 + 640


def test_agreement_with_a_real_model():
    model, config = tiny_model(), MokaConfig("all-linear", r=5, adapter_dtype="bfloat16")
    before = [id(m) for m in model.modules()]
    plan = moka.plan(model, config, dtype=torch.float32)
    assert [id(m) for m in model.modules()] == before
    assert plan == moka.plan(model.config, config, dtype=torch.float32)
    moka.quantize(model)
    weights = [m.nf4_weight() for m in model.modules() if type(m).__name__ == "NF4Linear"]
    assert plan.memory_bytes["nf4_weights"] == sum(w.packed.nbytes for w in weights)
    assert plan.memory_bytes["nf4_absmax"] == sum(w.nbytes - w.packed.nbytes for w in weights)
    assert plan.memory_bytes["other_weights"] == sum(p.nbytes for p in model.parameters())
    assert plan == moka.plan(model, config, dtype=torch.float32)
    moka.inject(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained)
    assert plan.memory_bytes["adapter"] == plan.memory_bytes["gradients"] == sum(p.nbytes for p in trained)
    assert plan.memory_bytes["optimizer"] == 8 * plan.parameters


def test_operations_per_token():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    plan = moka.plan(model, MokaConfig(["0"], shapes=[(8, 4, 4, 16)]), quantized=False)
    macs = min(8 * 16 * (4 + 4), 4 * 4 * (16 + 8))
    assert plan.flops_per_token == {
        "base_forward": 2 * (64 * 32 + 32 * 16),
        "base_backward": 2 * (64 * 32 + 32 * 16),
        "adapter_forward": 2 * macs,
        "adapter_backward": 6 * macs,
    }
    assert plan.memory_bytes["nf4_weights"] == 0


def test_activations():
    def activations(**options):
        return moka.plan(LLAMA2_7B, MokaConfig(), **options).memory_bytes["activations"]

    assert activations(batch=2, sequence=512) == activations() == 4 * activations(sequence=256)
    assert activations(gradient_checkpointing=True) < activations() / 5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist: those given to `add` and all made within the block."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors):
        for storage in [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, storage):
        self.live -= self.sizes.pop(storage)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize(
    ("targets", "dropout", "dtype", "sizes"),
    [
        (["q_proj", "v_proj"], 0.1, torch.float32, {"num_key_value_heads": 1}),
        (["q_proj", "v_proj"], 0.0, torch.bfloat16, {"vocab_size": 4000}),
        ("all-linear", 0.1, torch.bfloat16, {"vocab_size": 300}),
        ("all-linear", 0.0, torch.float32, {"num_hidden_layers": 6}),
    ],
)
def test_memory_is_what_training_takes(targets, dropout, dtype, sizes, checkpointing):
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    llama = LlamaConfig(**{"vocab_size": 1024, **shape, **sizes}, use_cache=False)
    config = MokaConfig(targets, r=4, dropout=dropout)
    options = {"batch": 4, "sequence": 128, "dtype": dtype, "gradient_checkpointing": checkpointing}
    plan = moka.plan(llama, config, **options)
    model = moka.quantize(LlamaForCausalLM(llama).to(dtype).train(), double_quant=True)
    moka.inject(model, config)
    if checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 300, (4, 128))

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()  # makes the optimizer's state
    live = LiveBytes()
    live.add([*model.parameters(), *model.buffers(), *(list(s.values()) for s in optimizer.state.values())])
    with live:
        step()
    assert plan.total_bytes == pytest.approx(live.peak, rel=0.1)


def test_text_and_data():
    plan = moka.plan(LLAMA2_7B, MokaConfig(), batch=4)
    text = str(plan)
    assert "5,243,520 (5,242,880 in factors, 640 in gates" in text and "batch 4 x 1024 tokens" in text
    assert plan.to_dict()["total_bytes"] == sum(plan.memory_bytes.values()) == plan.total_bytes
    with pytest.raises(ConfigError, match="optimizer: got 'adam'"):
        moka.plan(LLAMA2_7B, MokaConfig(), optimizer="adam")
    with pytest.raises(InjectionError, match="'query' matches no module"):
        moka.plan(LLAMA2_7B, MokaConfig(["query"]))


def test_importing_moka_loads_nothing_heavy():
    code = """
import sys, moka, torch
assert not {"transformers", "bitsandbytes", "peft"} & set(sys.modules)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""peft's LoRA layer as one operation: same numbers, and peft's own forward for all that is not plain LoRA."""

import copy
import logging
import pickle

import pytest
import torch
from test_accelerate import DTYPES, K, N, enable_checkpointing, gradients, load, make_layer, qlora
from tiny import tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moka
from helpers import BACKENDS, assert_close_by_rule, roundings
from moka import functional, nf4
from moka.accelerated import Accelerated, FusedLora
from moka.bases import is_linear4bit
from moka.substitute import restore

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft's call
]


def lora_block(compute="fp32", adapter="fp32", r=4, names=("default",), device=None, marked=True, **options):
    """`Linear4bit` (with a bias) under peft's LoRA, random values in both factors; not accelerated.

    marked: the model says that it is loaded in 4 bits, as those of transformers do; peft asks it.
    """
    block = nn.Sequential(make_layer(DTYPES[compute], device=device))
    block.is_loaded_in_4bit = marked
    for name in names:
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], **options)
        peft.inject_adapter_in_model(config, block, adapter_name=name)
    block[0].set_adapter(names[0])
    assert type(block[0]) is (peft.tuners.lora.bnb.Linear4bit if marked else peft.tuners.lora.Linear)
    for name, parameter in block.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(DTYPES[adapter])
    return block


def unfused(block):
    """A copy with peft's forward, on the accelerated base."""
    block = copy.deepcopy(block)
    restore(block[0])
    return block


def run(block, x, dy, autocast=False):
    """y and all gradients by name."""
    block.zero_grad()
    inputs = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = block(inputs)
    y.backward(dy)
    trained = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": inputs.grad} | trained


@pytest.fixture
def fused_calls(monkeypatch):
    """A list that grows at each call of the operation."""
    calls, original = [], functional.nf4_lora
    monkeypatch.setattr(functional, "nf4_lora", lambda *args: (calls.append(args), original(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("given", "compute", "adapter", "autocast"),
    [
        ("fp32", "fp32", "fp32", False),
        ("bf16", "bf16", "bf16", False),
        ("fp16", "fp16", "fp16", False),
        ("bf16", "bf16", "fp32", False),
        ("fp32", "bf16", "fp32", False),
        ("fp32", "bf16", "bf16", False),
        ("bf16", "fp32", "bf16", False),
        ("bf16", "bf16", "fp32", True),
        ("fp32", "bf16", "fp32", True),
        ("fp32", "fp32", "bf16", True),
    ],
)
@pytest.mark.parametrize(
    ("r", "tokens", "marked"),
    [(1, 40, True), (5, 21, False), (16, 3, True), (3, 300, True), (16, 300, False)],
)
def test_values_and_gradients(given, compute, adapter, autocast, r, tokens, marked, device, fused_calls):
    block = lora_block(compute, adapter, r, marked=marked)
    block[0].base_layer.bias.requires_grad_()  # as by LoraConfig(bias="all")
    x, dy = torch.randn(2, tokens, K).to(DTYPES[given]), torch.randn(2, tokens, N).to(DTYPES[given])
    plain = run(block, x, dy, autocast)
    moka.accelerate(block)
    got = run(block, x, dy, autocast)
    assert len(fused_calls) == 1 and list(got) == list(plain) and len(got) == 5

    low = torch.bfloat16 if autocast else DTYPES[adapter]
    t = {name: p.detach() for name, p in block.named_parameters()}
    A, B = (t[f"0.lora_{f}.default.weight"].to(low).double().requires_grad_() for f in "AB")
    bias = t["0.base_layer.bias"].double().requires_grad_()
    rounded = (x.to(low) if autocast else x).double().requires_grad_()
    weight = nf4.from_bitsandbytes(block[0].base_layer).dequantize(torch.float64)
    y = rounded @ weight.T + bias + 2 * rounded @ A.T @ B.T
    exact = (y.detach(), *torch.autograd.grad(y, (rounded, bias, A, B), dy.double()))

    product = torch.bfloat16 if autocast else DTYPES[compute]
    coarsest = max((DTYPES[given], product, low), key=lambda dtype: torch.finfo(dtype).eps)
    dtypes = [coarsest, coarsest, coarsest, low, low]
    for (name, actual), reference, dtype in zip(got.items(), exact, dtypes, strict=True):
        assert actual.dtype == plain[name].dtype
        if "lora_" in name and not x.is_cuda:  # computed in this dtype, not in a wider and slower one
            assert torch.equal(actual, actual.to(low).to(actual.dtype))
        count = roundings(x) + 3  # of x or dy, of the small product, of A or B, and of the result
        assert_close_by_rule(
            actual.to(dtype), reference, plain[name].to(dtype), dtype, count, reduces_tokens=True
        )


@pytest.mark.parametrize("train", ["neither", "A", "B", "x"])
def test_only_needed_gradients_are_computed(train, fused_calls):
    block = moka.accelerate(lora_block())
    x, dy = torch.randn(7, K), torch.randn(7, N)
    full = run(block, x, dy)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(f"lora_{train}" in name)
    inputs = x.clone().requires_grad_(train == "x")
    y = block(inputs)
    assert len(fused_calls) == 2 and torch.equal(y, full["y"]) and y.requires_grad == (train != "neither")
    if train != "neither":
        block.zero_grad()
        y.backward(dy)
        grads = {"dx": inputs.grad} | {name: p.grad for name, p in block.named_parameters()}
        present = {name for name, grad in grads.items() if grad is not None}
        assert present == ({"dx"} if train == "x" else {f"0.lora_{train}.default.weight"})
        assert all(torch.equal(grads[name], full[name]) for name in present)


def test_backward_under_autocast():
    """It runs in the dtypes of the forward."""
    block = moka.accelerate(lora_block())
    x, dy = torch.randn(7, K), torch.randn(7, N)
    expected = run(block, x, dy)
    block.zero_grad()
    inputs = x.clone().requires_grad_()
    y = block(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
    assert torch.equal(inputs.grad, expected["dx"])
    assert torch.equal(block[0].lora_A["default"].weight.grad, expected["0.lora_A.default.weight"])


def two(**options):
    return lora_block(names=("default", "other"), **options)


def set_both(layer):
    layer.set_adapter(["default", "other"])


def no_dropout(layer):
    layer.lora_dropout["default"].p = 0.0


def hook(module):
    module.register_forward_hook(lambda module, args, output: output + 1)


def own_forward(layer):
    layer.lora_B["default"].forward = lambda u: torch.zeros(u.shape[0], N)


CASES = {  # name: (the block, what is done to it after accelerate, whether it is one operation then)
    "plain": (lora_block, lambda m: None, True),
    "not marked as 4-bit": (lambda: lora_block(marked=False), lambda m: None, True),
    "rslora": (lambda: lora_block(use_rslora=True), lambda m: None, True),
    "scaled": (lora_block, lambda m: m.scale_layer(3.0), True),
    "dropout in training": (lambda: lora_block(lora_dropout=0.5), lambda m: m.train(), False),
    "dropout in evaluation": (lambda: lora_block(lora_dropout=0.5), lambda m: m.eval(), True),
    "dropout of 0": (lambda: lora_block(lora_dropout=0.5), no_dropout, True),
    "disabled": (lora_block, lambda m: m.enable_adapters(False), False),
    "enabled again": (lora_block, lambda m: (m.enable_adapters(False), m.enable_adapters(True)), True),
    "merged": (lora_block, lambda m: m.merge(), False),
    "unmerged": (lora_block, lambda m: (m.merge(), m.unmerge()), True),
    "another adapter": (two, lambda m: m.set_adapter("other"), True),
    "two adapters": (two, set_both, False),
    "one of two deleted": (two, lambda m: (set_both(m), m.delete_adapter("default")), True),
    "no adapter": (two, lambda m: m.set_adapter([]), False),
    "DoRA": (lambda: lora_block(use_dora=True), lambda m: None, False),
    "lora_bias": (lambda: lora_block(lora_bias=True), lambda m: None, False),
    "hook on A": (lora_block, lambda m: hook(m.lora_A["default"]), False),
    "hook on the base": (lora_block, lambda m: hook(m.base_layer), False),
    "forward of its own": (lora_block, own_forward, False),
    "base decelerated": (lora_block, lambda m: restore(m.base_layer), False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_plain_lora_is_left_to_peft(case, device, fused_calls):
    make, change, fused = CASES[case]
    block = moka.accelerate(make())
    change(block[0])
    x, results = torch.randn(5, K), []
    for model in (block, unfused(block)):
        torch.manual_seed(0)  # of dropout
        results.append(model(x))
    assert len(fused_calls) == fused
    if fused:
        torch.testing.assert_close(*results)
        assert not torch.allclose(results[0], block[0].base_layer(x))
    else:
        assert torch.equal(*results)


def test_adapter_names_are_left_to_peft(fused_calls):
    block = moka.accelerate(two())
    x, names = torch.randn(3, K), ["default", "__base__", "other"]
    assert torch.equal(block[0](x, adapter_names=names), unfused(block)[0](x, adapter_names=names))
    assert not fused_calls


def test_dtypes_that_peft_refuses(fused_calls):
    block = moka.accelerate(lora_block())
    with peft.helpers.disable_input_dtype_casting(block), pytest.raises(RuntimeError, match="same dtype"):
        block(torch.randn(5, K).bfloat16())
    block[0].lora_B.double()
    with pytest.raises(RuntimeError, match="same dtype"):
        block(torch.randn(5, K))
    assert not fused_calls


def test_back_and_copies(device, fused_calls):
    block = lora_block()
    x, dy = torch.randn(5, K), torch.randn(5, N)
    before, state, modules = run(block, x, dy), block.state_dict(), list(block.modules())
    moka.accelerate(block)
    assert isinstance(block[0], FusedLora) and isinstance(block[0], peft.tuners.lora.LoraLayer)
    assert list(moka.accelerated_layers(block)) == ["0.base_layer"]
    after = run(block, x, dy)
    assert not all(torch.equal(after[name], before[name]) for name in before)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(other[0], FusedLora) and isinstance(other[0].base_layer, Accelerated)
        assert all(map(torch.equal, run(other, x, dy).values(), after.values()))
        assert type(moka.decelerate(other)[0]) is peft.tuners.lora.bnb.Linear4bit
    assert len(fused_calls) == 3 and isinstance(block[0], FusedLora)
    assert list(block.modules()) == modules and list(block.state_dict()) == list(state)
    moka.decelerate(block)
    assert [type(m) for m in (block[0], block[0].base_layer)] == [
        peft.tuners.lora.bnb.Linear4bit,
        bnb.nn.Linear4bit,
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run(block, x, dy).items())
    assert len(fused_calls) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "base"
    tiny_model().save_pretrained(path)
    return path


def test_adapters_added_after_accelerate(folder, caplog, device):
    model = qlora(moka.accelerate(load(folder, device)))
    assert not any(isinstance(m, FusedLora) for m in model.modules())
    model.model.model.layers[1].mlp.up_proj.forward = lambda x: x  # as a library that patches instances does
    with caplog.at_level(logging.INFO, logger="moka"):
        moka.accelerate(model)
        moka.accelerate(model)
    assert [r.message for r in caplog.records] == [
        "0 of 14 Linear4bit layers accelerated",
        "13 of 14 LoRA layers of peft fused with their base",
        "0 of 14 Linear4bit layers accelerated",
        "0 of 14 LoRA layers of peft fused with their base",
    ]


def test_a_model_with_checkpointing(folder, device, fused_calls):
    """A training step of each kind, as one operation per layer, and once more for what is recomputed."""
    model = qlora(load(folder, device))
    plain = gradients(model)
    moka.accelerate(model)
    fused = gradients(model)
    assert len(fused_calls) == 14 and list(fused) == list(plain)
    for name, gradient in plain.items():
        assert (gradient - fused[name]).norm() < 1e-5 * gradient.norm(), name
    enable_checkpointing(model, reentrant=False)
    again = gradients(model.train())
    assert len(fused_calls) == 3 * 14
    assert all(map(torch.equal, fused.values(), again.values()))
    merged = model.merge_and_unload()
    assert not any(isinstance(m, FusedLora) for m in merged.modules())
    assert {type(m).__name__ for m in merged.modules() if is_linear4bit(m)} == {"AcceleratedLinear4bit"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
@torch._dynamo.config.patch(
    specialize_float=True
)  # dynamic=True traces twice to find out that scales are fixed
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", BACKENDS[-1]])  # as a default it would be part of what is compiled
def test_compiles_in_one_graph(autocast, device):
    torch._dynamo.reset()
    block = moka.accelerate(lora_block(names=("default", "other"), device=device).to(device))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for name in ("default", "other"):
        block[0].set_adapter(name)
        for tokens in (20, 33):
            x, dy = torch.randn(tokens, K, device=device), torch.randn(tokens, N, device=device)
            want, got = (run(model, x, dy, autocast) for model in (block, compiled))
            assert len(want) == len(got) == 4 and all(map(torch.equal, want.values(), got.values()))
    assert counter.frame_count == 2  # one for each adapter

"""bitsandbytes' layers on moka's kernels: the same numbers, and nothing else changed."""

import copy
import logging
import pickle

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moka
from helpers import BACKENDS, assert_close_by_rule, roundings
from moka import MokaConfig, nf4
from moka.accelerate import Accelerated
from moka.bases import is_linear4bit
from moka.errors import StateError

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

N, K = 128, 192
IDS = torch.arange(3, 43).view(2, 20)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft's call
]


def make_layer(compute_dtype=torch.float32, double_quant=True, quant_type="nf4", device=None, kind=None):
    """A `Linear4bit` with a frozen bias in fp32."""
    kind = kind or bnb.nn.Linear4bit
    layer = kind(K, N, compute_dtype=compute_dtype, compress_statistics=double_quant, quant_type=quant_type)
    layer.requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False  # its kernels compute in bf16 and pass no gradient
    return layer.to(device or torch.get_default_device())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("accelerate") / "base"
    tiny_model().save_pretrained(path)
    return path


def load(folder, device):
    """As users load a model for QLoRA."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": str(device)}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if is_linear4bit(module):
            module.support_avx512bf16_for_cpu = False
    return model


def qlora(model):
    """peft's LoRA on every linear layer, with random values."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model):
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_state(before, after):
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_input_gradients(dtype, double_quant, tokens, device):
    dtype = DTYPES[dtype]
    layer = make_layer(dtype, double_quant)
    x, dy = torch.randn(2, tokens, K).to(dtype), torch.randn(2, tokens, N).to(dtype)
    weight = nf4.from_bitsandbytes(layer).dequantize(torch.float64)
    bias = layer.bias.to(dtype).double()
    exact = x.double() @ weight.T + bias, dy.double() @ weight

    def run():
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(dy)
        return y.detach(), inputs.grad

    eager = run()
    assert moka.accelerate(layer) is layer
    for got, reference, plain in zip(run(), exact, eager, strict=True):
        assert_close_by_rule(got, reference, plain, dtype, roundings(x))


@pytest.mark.parametrize(
    ("compute", "given"),
    [(None, "fp32"), (None, "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"), ("bf16", "bf16")],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_bitsandbytes(compute, given, autocast, device):
    layers = make_layer(DTYPES.get(compute)), moka.accelerate(make_layer(DTYPES.get(compute)))
    x = torch.randn(5, K).to(DTYPES[given])
    results = []
    for layer in layers:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            results.append((layer(x).dtype, layer.compute_dtype, layer.compute_type_is_set))
    assert results[0] == results[1]


def test_the_product_runs_in_the_compute_dtype(device):
    layer = moka.accelerate(make_layer(torch.bfloat16))
    x = torch.randn(5, K)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_a_training_step_of_peft(folder, device):
    model = qlora(load(folder, device))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    before = gradients(model)
    exact = gradients(dense64(model))
    assert moka.accelerate(model) is model and len(moka.accelerated_layers(model)) == 14
    after = gradients(model)
    assert list(before) == list(after) == list(exact) and len(before) == 1 + 2 * 14
    if device.type == "cpu":  # other kernels did it; on a GPU both libraries leave fp32 to cuBLAS
        assert not all(map(torch.equal, before.values(), after.values()))
    for name, plain in before.items():
        # rounding errors of a whole model: sums over layers, where no limit of a single product holds
        errors = [(g.double() - exact[name]).norm() for g in (plain, after[name])]
        assert errors[1] <= 2 * errors[0] + 2**-18 * exact[name].norm(), name
    assert list(model.modules()) == modules
    assert_same_state(state, model.state_dict())
    assert all(isinstance(m, bnb.nn.Linear4bit) for m in moka.accelerated_layers(model).values())
    moka.decelerate(model)
    again = gradients(model)
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())
    assert {type(m) for m in modules if is_linear4bit(m)} == {bnb.nn.Linear4bit}


def dense64(model):
    """A copy in float64 with the dequantized weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_linear4bit(child):
                dense = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                weight = nf4.from_bitsandbytes(child).dequantize(torch.float64)
                dense.weight = nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, dense)
    return model.double()


def enable_checkpointing(model, reentrant):
    inner = model.get_base_model()
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the older one last
        if enable := getattr(inner, name, None):
            enable({"use_reentrant": reentrant})
            break


def test_checkpointing_saving_and_merging_with_peft(folder, tmp_path, device):
    models = [qlora(load(folder, device)), qlora(moka.accelerate(load(folder, device)))]
    assert isinstance(models[1].model.model.layers[0].mlp.up_proj, peft.tuners.lora.bnb.Linear4bit)
    plain = gradients(models[1])
    enable_checkpointing(models[1], reentrant=True)
    models[1].enable_input_require_grads()
    assert all(map(torch.equal, plain.values(), gradients(models[1].train()).values()))
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    files = [(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]
    merged = [model.merge_and_unload() for model in models]
    assert_same_state(*(model.state_dict() for model in merged))
    assert len(moka.accelerated_layers(merged[1])) == 14  # and without an adapter they still compute
    logits = [model.eval()(IDS.to(device)).logits.double() for model in merged]
    assert (logits[0] - logits[1]).norm() < 1e-5 * logits[0].norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
@pytest.mark.parametrize("device", ["cpu", BACKENDS[-1]])  # as a default it would be part of what is compiled
def test_compiles_in_one_graph(folder, device):
    torch._dynamo.reset()
    block = nn.Sequential(make_layer(device=device), nn.SiLU(), nn.Linear(N, K, device=device))
    block.append(make_layer(None, device=device))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, K, device=device)
    before = compiled(x)
    moka.accelerate(block)  # a model compiled earlier is compiled anew
    results = []
    for function in (compiled, block):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad))
    torch.testing.assert_close(*results)
    assert not torch.equal(before, results[0][0])


def test_copies_and_moves(device):
    block = moka.accelerate(nn.Sequential(make_layer()))
    x = torch.randn(3, K)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    for other in copies:
        assert isinstance(other[0], Accelerated) and torch.equal(other(x), block(x))
        assert type(moka.decelerate(other)[0]) is bnb.nn.Linear4bit
    assert isinstance(block[0], Accelerated)
    y = block(x).cpu()
    assert torch.equal(block.to("cpu").to(device)(x).cpu(), y)  # moving makes new tensors
    packed = block[0].weight.data.clone()
    assert torch.equal(block.half()[0].weight.data, packed) and block[0].bias.dtype == torch.float16


def test_no_evaluation_repacks_a_layer():
    """bitsandbytes does on a CPU with AVX512-BF16, after which no gradient passes."""
    layer = make_layer(device="cpu").eval()
    layer.support_avx512bf16_for_cpu = True
    before = layer.weight.data.clone()
    moka.accelerate(layer)
    with torch.no_grad():
        layer(torch.randn(3, K))
    assert torch.equal(layer.weight.data, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_twice_and_back(caplog):
    layer = make_layer(kind=lambda *a, quant_type, **k: bnb.nn.LinearNF4(*a, **k))
    model = nn.Sequential(layer, nn.Linear(N, K), make_layer())
    model.append(model[2])  # shared
    with caplog.at_level(logging.INFO, logger="moka"):
        moka.accelerate(model)
        kinds = [type(m) for m in model]
        moka.accelerate(model)
        assert [type(m) for m in model] == kinds
        moka.decelerate(model)
    assert [r.message for r in caplog.records] == [
        "2 of 2 Linear4bit layers accelerated",
        "0 of 2 Linear4bit layers accelerated",
        "2 Linear4bit layers decelerated",
    ]
    assert [type(m) for m in model] == [bnb.nn.LinearNF4, nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear4bit]
    with pytest.raises(StateError, match="nothing to decelerate"):
        moka.decelerate(model)


class Other(bnb.nn.Linear4bit):
    def forward(self, x):
        return super().forward(x) + 1


def repacked():
    layer = make_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    return layer


def patched():
    layer = make_layer()
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_layer(quant_type="fp4"), "quant_type: got 'fp4', expected 'nf4'"),
        (lambda: bnb.nn.Linear4bit(K, N, quant_type="nf4"), "holds no quantized weight yet"),
        (repacked, "repacked by a CPU forward pass.*reload the model"),
        (lambda: make_layer(kind=Other), "Other has a forward of its own"),
        (patched, "Linear4bit has a forward of its own"),
    ],
)
def test_what_cannot_be_accelerated_is_named(make, message):
    model = nn.ModuleDict({"good": make_layer(), "bad": make(), "worse": make()})
    with pytest.raises(StateError, match=rf"^bad, worse: .*{message}.*strict=False leaves these"):
        moka.accelerate(model)
    assert not moka.accelerated_layers(model)
    with pytest.warns(UserWarning, match=rf"^left to bitsandbytes: bad, worse: .*{message}"):
        moka.accelerate(model, strict=False)
    assert list(moka.accelerated_layers(model)) == ["good"]
    with pytest.raises(StateError, match=message):
        moka.accelerate(nn.ModuleDict({"bad": model["bad"]}), strict=False)


def test_nothing_to_accelerate():
    with pytest.raises(StateError, match=r"no Linear4bit layer of bitsandbytes.*load_in_4bit=True"):
        moka.accelerate(nn.Sequential(nn.Linear(4, 4)))


def test_layers_with_hooks_of_accelerate(device):
    """They keep the bound forward in the instance: it has to change with the class."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer = make_layer(torch.bfloat16)
    x = torch.randn(5, K)
    expected = moka.accelerate(copy.deepcopy(layer))(x)
    assert not torch.equal(layer(x), expected)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    moka.accelerate(layer)
    assert torch.equal(layer(x), expected)
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)
    moka.decelerate(layer)
    assert not torch.equal(layer(x), expected)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert torch.equal(moka.accelerate(layer)(x), expected)


def test_beside_adapters_of_moka(device):
    block = nn.ModuleDict({"a": make_layer(), "b": make_layer()})
    x = torch.randn(5, K)
    expected = [moka.accelerate(copy.deepcopy(layer))(x) for layer in block.values()]
    moka.accelerate(moka.inject(block, MokaConfig(target_modules=["a"])))
    with moka.disabled(block):
        assert torch.equal(block["a"](x), expected[0])
    assert torch.equal(block["b"](x), expected[1])
    assert list(moka.accelerated_layers(moka.eject(block))) == ["a", "b"]


def test_a_class_that_was_replaced_since():
    model = nn.Sequential(moka.accelerate(make_layer()))
    model[0].__class__ = type("Wrapped", (type(model[0]),), {})
    with pytest.raises(StateError, match=r"0: its class was replaced since moka\.accelerate, by Wrapped"):
        moka.decelerate(model)

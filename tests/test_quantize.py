"""Quantizing a model, against bitsandbytes: the same bits, the same outputs, the same training."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from helpers import assert_close_by_rule, roundings
from moka import MokaConfig, nf4
from moka.bases import NF4Linear
from moka.errors import ConfigError, InjectionError, StateError
from moka.quantize import dequantize

IDS = torch.arange(3, 63).view(3, 20)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama():
    """In multiples of the block size: for other sizes bitsandbytes 0.50 dequantizes wrongly on the CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).train()


def bitsandbytes_model(model, double_quant=True, compute_dtype=torch.float32):
    """The model with its linear layers but the head in bitsandbytes' NF4, as transformers loads it."""
    bnb = pytest.importorskip("bitsandbytes")
    for path, linear in list(model.named_modules()):
        if path.endswith(LINEARS):
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=compute_dtype,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double_quant
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return model.to(torch.get_default_device())


def both(double_quant=True):
    model = llama()
    return bitsandbytes_model(copy.deepcopy(model), double_quant), moka.quantize(
        model, double_quant=double_quant
    )


def test_what_is_quantized_and_what_is_not():
    model = llama()
    assert moka.quantize(model) is model
    report = model.moka_quantization
    assert len(report.quantized) == 14 and all(path.endswith(LINEARS) for path in report.quantized)
    assert report.skipped == {"lm_head": "output embedding"}
    assert all(isinstance(model.get_submodule(path), NF4Linear) for path in report.quantized)
    held = sum(model.get_submodule(path).nf4_weight().nbytes for path in report.quantized)
    assert report.bytes_after == held < report.bytes_before / 5
    assert "14 layers in NF4" in str(report) and "skipped lm_head: output embedding" in str(report)


def test_layers_left_dense():
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    moka.quantize(model, exclude_modules=["3"])
    assert model.moka_quantization.quantized == ("1",)
    assert model.moka_quantization.skipped == {"2": "shares its weight with an embedding", "3": "excluded"}
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert "0.out_proj" in moka.quantize(model).moka_quantization.skipped


def test_a_shared_layer_stays_shared():
    linear = nn.Linear(8, 8)
    model = moka.quantize(nn.Sequential(linear, nn.Linear(8, 8), linear))
    assert model[0] is model[2] is not model[1]
    dequantize(model.append(nn.Sequential(model[0])), torch.bfloat16)
    assert type(model[0]) is nn.Linear and model[0] is model[2] is model[3][0] is not model[1]


def test_dense_weights_are_let_go_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = NF4Linear.from_linear.__func__

    def watching(cls, *args):
        gc.collect()
        alive.append(sum(w() is not None for w in weights))
        return original(cls, *args)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(watching))
    moka.quantize(model)
    assert alive == [4, 3, 2, 1]


def test_what_is_refused():
    model = moka.inject(llama(), MokaConfig(r=5))
    with pytest.raises(StateError, match=r"moka\.quantize first"):
        moka.quantize(model)
    with pytest.raises(ConfigError, match="blocksize: got 48"):
        moka.quantize(llama(), blocksize=48)
    with pytest.raises(InjectionError, match=r"'q_prj'.* matches no module"):
        moka.quantize(llama(), exclude_modules=["q_prj"])
    with pytest.raises(InjectionError, match=r"expression for the whole path.*the list \['q_proj'\]"):
        moka.quantize(llama(), exclude_modules="q_proj")
    with pytest.raises(InjectionError, match=r"no dense linear layer to quantize.*excluded"):
        moka.quantize(nn.Sequential(nn.Linear(8, 8)), exclude_modules="0")
    with pytest.raises(InjectionError, match=r"in 4 bits already; call moka\.inject"):
        moka.quantize(moka.quantize(llama()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_linear_by_the_rule(dtype, bias, device):
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    layer = NF4Linear.from_linear(linear, 32)
    weight = layer.nf4_weight().dequantize(torch.float64)
    shift = 0 if linear.bias is None else linear.bias.detach()
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, 96).to(dtype).requires_grad_()
        y = layer(x)
        eager = x @ weight.to(dtype).T + shift
        assert_close_by_rule(y, x.double() @ weight.T + shift, eager, dtype, roundings(x))
        dy = torch.ones_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert_close_by_rule(dx, dy.double() @ weight, dy @ weight.to(dtype), dtype, roundings(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bits_are_those_of_bitsandbytes(double_quant, device):
    theirs, ours = both(double_quant)
    for path in ours.moka_quantization.quantized:
        a, b = nf4.from_bitsandbytes(theirs.get_submodule(path)), ours.get_submodule(path).nf4_weight()
        assert (a.shape, a.blocksize, a.double_quant) == (b.shape, b.blocksize, double_quant)
        for name in ("packed", "absmax", "absmax2", "code2", "offset"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x.flatten(), y.flatten()), (path, name)


def train(model, targets):
    """Losses of six steps; an evaluation in the middle may leave a bare Linear4bit without gradients."""
    ids = IDS.to(model.device)
    torch.manual_seed(1)
    moka.inject(model, MokaConfig(targets, r=5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(6):
        if step == 3:
            model.eval()
            with torch.inference_mode():
                losses.append(model(ids, labels=ids).loss.item())
            model.train()
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_agrees_with_bitsandbytes_to_the_bit(device):
    """With every 4-bit layer adapted, both models run the same operators on the same bits."""
    theirs, ours = both()
    ids = IDS.to(device)
    before = [model(ids).logits for model in (theirs, ours)]
    losses = [train(model, "all-linear") for model in (theirs, ours)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.05
    assert torch.equal(theirs.eval()(ids).logits, ours.eval()(ids).logits)
    trained = dict(ours.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in theirs.named_parameters() if ".moka_" in name)
    for model, base in zip((theirs, ours), before, strict=True):
        with moka.disabled(model):
            assert torch.equal(model(ids).logits, base)


def test_training_agrees_where_bitsandbytes_keeps_some_layers(device):
    """Layers that are not adapted run bitsandbytes' own products, which add up in another order."""
    theirs, ours = both()
    assert torch.allclose(theirs(IDS.to(device)).logits, ours(IDS.to(device)).logits, rtol=0, atol=1e-5)
    losses = [train(model, ["q_proj", "v_proj"]) for model in (theirs, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] - 0.05


def test_every_layer_of_bitsandbytes_is_kept_from_repacking():
    model, _ = both()
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU with AVX512-BF16
    moka.inject(model, MokaConfig(r=5))
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    moka.eject(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_transformers_is_told_of_the_adapter():
    """Its Trainer refuses a quantized model that it takes for one without adapters."""
    model = moka.inject(moka.quantize(llama()), MokaConfig(r=5))
    assert model._hf_peft_config_loaded
    assert not moka.eject(model)._hf_peft_config_loaded


def test_a_repacked_or_unquantized_layer_is_refused():
    model, _ = both()
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(StateError, match=r"layers\.1\.mlp\.up_proj: .*repacked.*reload the model"):
        moka.inject(model, MokaConfig(r=5))
    bnb = pytest.importorskip("bitsandbytes")
    fresh = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    with pytest.raises(StateError, match=r"0: .*no quantized weight yet"):
        moka.inject(fresh, MokaConfig(["0"]))
    fp4 = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="fp4")).to("cpu")
    with pytest.raises(StateError, match="0: quant_type: got 'fp4'"):
        moka.inject(fp4, MokaConfig(["0"]))
    int8 = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    with pytest.raises(InjectionError, match=r"0: cannot adapt a .*Linear8bitLt"):
        moka.inject(int8, MokaConfig("all-linear"))

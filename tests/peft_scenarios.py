"""What people do with an adapter in peft: `test_peft.py` does it with MoKA, `peft_table.py` with LoRA too.

A scenario fails with an AssertionError when the result is silently wrong.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import safetensors.torch
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from peft_cases import (
    TOKENS,
    Case,
    Skip,
    Wrong,
    active,
    adapter_gradients,
    add_delta,
    count_parameters,
    files,
    logits,
    mixed,
    quantization,
    randomize,
    same,
)

from moka.inject import stop_repacking
from moka.integrations.peft import hotswap_adapter

SCENARIOS: dict[str, Callable[[Case], None]] = {}


def scenario(function: Callable[[Case], None]) -> Callable[[Case], None]:
    """Enters a function under its docstring, which is its row in the table."""
    SCENARIOS[str(function.__doc__).rstrip(".")] = function
    return function


@scenario
def starts(case: Case) -> None:
    """`get_peft_model` starts as the base and learns."""
    base = logits(case.base())
    model = get_peft_model(case.base(), case.config())
    assert same(logits(model.eval()), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@scenario
def evaluation_between_steps(case: Case) -> None:
    """Gradients after an evaluation on the CPU."""
    model = case.model(as_it_comes=True)
    logits(model.eval())
    assert all(grad is not None and grad.any() for grad in adapter_gradients(model.train()).values())


@scenario
def save_and_load(case: Case) -> None:
    """`save_pretrained`, `PeftModel.from_pretrained`."""
    model = case.model()
    model.save_pretrained(case.folder)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files(case.folder)
    loaded = PeftModel.from_pretrained(case.base(), case.folder)
    assert torch.equal(logits(loaded), logits(model))


@scenario
def low_cpu_mem_usage(case: Case) -> None:
    """`low_cpu_mem_usage=True`."""
    model = case.model()
    model.save_pretrained(case.folder)
    loaded = PeftModel.from_pretrained(case.base(), case.folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.is_meta for p in loaded.parameters())


@scenario
def auto_peft_model(case: Case) -> None:
    """`AutoPeftModelForCausalLM.from_pretrained`."""
    if case.kind == "nf4":
        raise Skip
    model = case.model()
    model.save_pretrained(case.folder)
    options = {"quantization_config": quantization()} if case.kind == "bitsandbytes" else {}
    loaded = AutoPeftModelForCausalLM.from_pretrained(case.folder, **options)
    stop_repacking(loaded)
    assert torch.equal(logits(loaded), logits(model))


@scenario
def transformers_adapters(case: Case) -> None:
    """transformers' `add_adapter`, `load_adapter`, `set_adapter`, `delete_adapter`."""
    expected = case.model()
    expected.save_pretrained(case.folder)
    model, base = case.base(), logits(case.base())
    model.add_adapter(case.config(), "first")
    assert same(logits(model), base)
    randomize(model, "first", 3)
    first = logits(model)
    model.load_adapter(str(case.folder), "second")
    model.set_adapter("second")
    assert same(logits(model), logits(expected), 1e-6)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    model.disable_adapters()
    assert same(logits(model), base)
    model.enable_adapters()
    model.delete_adapter("first")
    assert same(logits(model), logits(expected), 1e-6)


@scenario
def several_adapters(case: Case) -> None:
    """Several adapters: `add_adapter`, `set_adapter`, `delete_adapter`, `disable_adapter`."""
    model, base = case.model(), logits(case.base())
    first = logits(model)
    model.add_adapter("second", case.config(target_modules=["k_proj", "v_proj"]))
    assert torch.equal(logits(model), first)
    randomize(model, "second", 2)
    model.set_adapter("second")
    second = logits(model)
    assert not same(second, first) and not same(second, base)
    with model.disable_adapter():
        assert same(logits(model), base)
    assert torch.equal(logits(model), second)
    model.base_model.set_adapter(["default", "second"])
    assert not same(logits(model), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


@scenario
def modules_to_save(case: Case) -> None:
    """`modules_to_save`."""
    model = case.model(modules_to_save=["norm"])
    assert any("norm.modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())
    model.save_pretrained(case.folder)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), case.folder)), logits(model))


@scenario
def trainable_tokens(case: Case) -> None:
    """`trainable_token_indices`."""
    model = get_peft_model(case.base(), case.config(trainable_token_indices={"embed_tokens": [5, 6]}))
    adapter_gradients(model.train())
    assert any("trainable_tokens" in name and p.grad is not None for name, p in model.named_parameters())
    randomize(model, "default", 1)
    model.eval().save_pretrained(case.folder)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), case.folder)), logits(model))


@scenario
def rank_pattern(case: Case) -> None:
    """`rank_pattern`."""
    few, many = (count_parameters(case.model(rank_pattern={"v_proj": r})) for r in (2, 6))
    model = case.model(rank_pattern={"v_proj": 6})
    assert many > few
    model.save_pretrained(case.folder)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), case.folder)), logits(model))


@scenario
def layers_to_transform(case: Case) -> None:
    """`layers_to_transform`, `exclude_modules`."""
    model = case.model(layers_to_transform=[1])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.1." in name for name in trained)
    model = case.model(layers_to_transform=[0, 1], exclude_modules=["0.self_attn.v_proj"])
    trained = {".".join(n.split(".")[4:7]) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"}


@scenario
def all_linear(case: Case) -> None:
    """`target_modules="all-linear"`."""
    model = case.model(target_modules="all-linear")
    trained = {name.split(".")[6] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model.save_pretrained(case.folder)
    assert torch.equal(logits(PeftModel.from_pretrained(case.base(), case.folder)), logits(model))


@scenario
def regex(case: Case) -> None:
    """`target_modules` as a regular expression."""
    model = case.model(target_modules=r".*\.0\..*\.q_proj")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.0.self_attn.q_proj" in name for name in trained)


@scenario
def merge(case: Case) -> None:
    """`merge_adapter`, `unmerge_adapter` keep what was learned."""
    model = case.model()
    before, adapted = logits(case.base()), logits(model)
    model.merge_adapter()
    error = (logits(model) - adapted).norm() / (adapted - before).norm()
    if error > (1e-3 if case.kind == "float" else 0.3):
        raise Wrong(f"{error:.0%} of the update lost")
    model.unmerge_adapter()
    assert same(logits(model), adapted)


@scenario
def unmerge(case: Case) -> None:
    """`unmerge_adapter` restores the bits of the base."""
    model, before = case.model(), logits(case.base())
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        error = (logits(model) - before).norm() / before.norm()
    if error:
        raise Wrong(f"off by {error:.0e}")


@scenario
def merge_and_unload(case: Case) -> None:
    """`merge_and_unload` keeps what was learned."""
    model = case.model()
    randomize(model, "default", 1, 0.05)
    before, adapted = logits(case.base()), logits(model)
    into = {"into": torch.float32} if case.method == "MoKA" and case.kind != "float" else {}
    plain = model.merge_and_unload(**into)
    assert not any("default" in name for name in plain.state_dict())
    error = (logits(plain) - adapted).norm() / (adapted - before).norm()
    if error > 1e-3:
        raise Wrong(f"{error:.0%} of the update lost")


@scenario
def deepcopy(case: Case) -> None:
    """`copy.deepcopy`."""
    model = case.model()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    randomize(twin, "default", 2)
    assert not same(logits(twin), logits(model))


@scenario
def gradient_checkpointing(case: Case) -> None:
    """Gradient checkpointing, both kinds."""
    model = case.model()
    expected = adapter_gradients(model.train())
    for reentrant in (False, True):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, grad in adapter_gradients(model).items():
            assert grad is not None and same(grad, expected[name]), name
        model.gradient_checkpointing_disable()


@scenario
def compiles(case: Case) -> None:
    """`torch.compile` sees one graph."""
    explained = torch._dynamo.explain(case.model())(input_ids=TOKENS, use_cache=False)
    torch._dynamo.reset()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@scenario
def mixed_batch(case: Case) -> None:
    """Mixed batch: `model(x, adapter_names=[...])`."""
    model, names, expected = mixed(case)
    assert same(logits(model, adapter_names=names), expected)


@scenario
def mixed_batch_gradients(case: Case) -> None:
    """Mixed batch: training."""
    model, names, _ = mixed(case)
    model.base_model.set_adapter(["default", "second"])
    got = adapter_gradients(model.train(), adapter_names=names)
    for name in ("default", "second"):
        model.set_adapter(name)
        mine = [i for i, row in enumerate(names) if row == name]
        model.zero_grad()
        labels = torch.full_like(TOKENS, -100)
        labels[mine] = TOKENS[mine]  # the mean over its rows; the mixed batch has the mean over all
        model(input_ids=TOKENS, labels=labels).loss.backward()
        for path, parameter in model.named_parameters():
            if name in path.split(".") and parameter.grad is not None:
                scale, grad = len(mine) / len(names), got[path]
                assert grad is not None and same(grad, parameter.grad * scale), path


@scenario
def mixed_generation(case: Case) -> None:
    """Mixed batch: `generate`, beam search included."""
    model, names, _ = mixed(case)
    for options in ({"num_beams": 1}, {"num_beams": 2}):
        options |= {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
        got = model.generate(input_ids=TOKENS, adapter_names=names, **options)
        for row, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else active(model, name):
                alone = model.generate(input_ids=TOKENS[row : row + 1], **options)
            assert torch.equal(got[row, : alone.shape[1]], alone[0])


@scenario
def weighted(case: Case) -> None:
    """`add_weighted_adapter` is the exact sum."""
    model = case.model()
    model.add_adapter("second", case.config())
    randomize(model, "second", 2)
    kind = {"combination_type": "cat"}  # LoRA's exact one
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", **kind)
    model.set_adapter("sum")
    total = logits(model)
    expected = case.base()
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = 0.7 * layer.get_delta_weight("default") + 0.3 * layer.get_delta_weight("second")
            add_delta(expected.get_submodule(path), delta.detach())
    assert same(total, logits(expected))
    model.save_pretrained(case.folder, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(case.base(), case.folder / "sum")
    assert same(logits(loaded), total, 1e-6)


@scenario
def hotswap(case: Case) -> None:
    """Hot swap into the same parameters."""
    second = case.model(seed=2)
    second.save_pretrained(case.folder)
    model = case.model()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    swap = hotswap_adapter if case.method == "MoKA" else peft_hotswap_adapter
    swap(model, str(case.folder), "default")
    assert torch.equal(logits(model), logits(second))
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


@scenario
def to_lora(case: Case) -> None:
    """Conversion to LoRA (`convert_to_lora`)."""
    if case.method == "LoRA":
        raise Skip
    model = case.model()
    config, state = peft.tuners.lora.conversion.convert_to_lora(model, 0.9999999)
    # the same bits, in a layer that LoRA knows
    base = case.base() if case.kind == "float" else Case(case.method, "bitsandbytes", case.folder).base()
    plain = get_peft_model(base, config).eval()
    peft.set_peft_model_state_dict(plain, state)
    assert same(logits(plain), logits(model), 1e-2)


@scenario
def wrong_file(case: Case) -> None:
    """A file that lacks half of the adapter is refused."""
    case.model().save_pretrained(case.folder)
    path = case.folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    half = dict(sorted(tensors.items())[: len(tensors) // 2])
    safetensors.torch.save_file(half, path, {"format": "pt"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(case.base(), case.folder)
    except (ValueError, RuntimeError):
        return
    raise Wrong("loaded in part")


@scenario
def mixed_methods(case: Case) -> None:
    """Beside other methods in one model (`mixed=True`)."""
    get_peft_model(case.base(), case.config(), mixed=True)

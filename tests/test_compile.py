"""`torch.compile` of a whole adapted model: one graph for all blocks and lengths, results of eager mode."""

import copy

import pytest
import torch
from test_quantize import bitsandbytes_model
from tiny import tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

import moka
from moka import MokaConfig

LENGTHS = (20, 21, 33)  # sizes that no other dimension has
BASES = {"bitsandbytes": bitsandbytes_model, "moka": lambda m: moka.quantize(m, double_quant=True)}
pytestmark = [  # of torch's own tracer
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled or counted by the tests before."""
    torch._dynamo.reset()
    counters.clear()


def adapted(base):
    """Two blocks on a 4-bit base with random adapters on every linear layer."""
    model = moka.inject(BASES[base](tiny_model()), MokaConfig("all-linear", r=4, dropout=0.0))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    # all blocks are alike then: the input of each requires a gradient, none asks for the state of its cache
    model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def tokens(length):
    return torch.arange(3, 3 + 2 * length).view(2, length)


def train(model):
    """Losses of a step per length, and the adapter after them."""
    trained = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for length in LENGTHS:
        optimizer.zero_grad()
        loss = model(tokens(length), labels=tokens(length)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in trained.items()}


@pytest.mark.parametrize("base", BASES)
def test_training_steps(base):
    model = adapted(base)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    compiled = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    (want, expected), (got, parameters) = train(model), train(compiled)
    assert got == pytest.approx(want, rel=1e-6) and want[0] != pytest.approx(want[1], rel=1e-3)
    assert list(parameters) == list(expected) and len(parameters) == 2 * 7 * 3
    for name, value in expected.items():
        change = (value - start[name]).norm()  # in fp32, sums in another order, over three steps
        assert change > 0 and (parameters[name] - value).norm() < 1e-4 * change, name
    assert counters["stats"]["unique_graphs"] == 1  # for every block, every length and every step
    assert not counters["graph_break"]


def test_inductor():
    """The code it generates around the operators, their output in its own layouts."""
    block = adapted("moka").model.layers[0].mlp.train()
    compiled = torch.compile(block, fullgraph=True)
    x, results = torch.randn(2, 20, 64), []
    for function in (block, compiled):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 2 + 3 * 3
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
def test_generation_with_a_static_cache(base):
    model = adapted(base).eval()
    model.disable_input_require_grads()  # its hook breaks the graph in torch 2.11
    options = {"use_cache": True, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = model.generate(tokens(7), **options)
    static = options | {"cache_implementation": "static"}
    assert torch.equal(model.generate(tokens(7), **static), want)
    assert not counters["stats"]
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # transformers compiles by itself on GPUs alone
    for length in (7, 9):
        want = model.generate(tokens(length), **static)
        got = model.generate(tokens(length), **static, compile_config=compiling)
        assert torch.equal(got, want)
    with moka.disabled(model):
        assert not torch.equal(model.generate(tokens(9), **options), want)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("name", ["gralora", "kron-vera", "lora-xs", "kron-lora"])
def test_presets_compile_to_one_graph(name):
    """Factors are expanded, and constants made, within the graph."""
    options = {"gralora": {"r": 4}, "kron-lora": {"size": 8, "rank": 2}, "kron-vera": {"r": 3}}
    model = moka.inject(
        torch.nn.Sequential(torch.nn.Linear(64, 64)),
        moka.preset(name, target_modules=["0"], **options.get(name, {"r": 3})),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x = torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

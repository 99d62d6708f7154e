"""What CUDA adds to a correct result: streams, graphs, determinism, devices, the compiler, whole models."""

import copy
import gc
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_cuda_sanitize
import torch
from test_cuda import PERIODIC, make_layer
from test_quantize import bitsandbytes_model, train
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka import functional

pytestmark = pytest.mark.cuda
ops = torch.ops.moka
TOKENS = (1, 8, 16, 40, 64, 128, 300)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Tensors are made on the GPU, unless a test says otherwise."""
    with torch.device("cuda"):
        yield


def batch(layer, tokens):
    """x and dy."""
    return layer.x(tokens), layer.x(tokens, transpose=True)


def forward(layer, x, A, B, alpha):
    """With the mixture, and the base alone."""
    y = functional.moka_linear(x, layer.weight, None, A, B, alpha, layer.shapes)
    return y, functional.nf4_linear(x.detach(), layer.weight)


def train_step(layer, x, dy, forward=forward):
    """Both results of forward, and the gradients of the first."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B, layer.alpha)]
    y, base = forward(layer, *leaves)
    return (y.detach(), base, *torch.autograd.grad(y, leaves, dy))


def equal(first, second):
    return all(map(torch.equal, first, second))


def test_side_stream():
    """The current stream is used: there the input arrives late, and memory that is freed is taken again."""
    layer = make_layer("square")
    for tokens in TOKENS:
        x, dy = batch(layer, tokens)
        want = train_step(layer, x, dy)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            got = train_step(layer, late, dy)
        train_step(layer, torch.full_like(x, torch.nan), dy)  # meanwhile, in temporary memory of its own
        torch.cuda.synchronize()
        assert equal(got, want)


def test_new_thread():
    """A thread without a context, as autograd starts them; memory comes from what the allocator holds."""
    layer = make_layer("square")
    args = (*layer.weight.op_args(), torch.bfloat16, *layer.mixture)
    want = ops.nf4_dequantize(*args).clone()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(ops.nf4_dequantize, *args).result(), want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["square", "wide"])
def test_graph(name):
    """Forward with and without mixture and the gradients, captured without a synchronization and replayed."""
    layer = make_layer(name)
    for tokens in TOKENS:
        x, dy = batch(layer, tokens)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train_step(layer, x, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                got = train_step(layer, x, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        x.normal_()
        dy.normal_()
        for t in got:
            t.fill_(torch.nan)
        for _ in range(2):
            graph.replay()
            assert equal(got, train_step(layer, x, dy))


@pytest.mark.parametrize("name", ["square", "wide"])
def test_repeats_are_equal(name):
    layer = make_layer(name)
    for tokens in TOKENS:
        x, dy = batch(layer, tokens)
        first = train_step(layer, x, dy)
        assert all(equal(train_step(layer, x, dy), first) for _ in range(20))


@pytest.fixture
def deterministic(monkeypatch):
    """torch's deterministic mode, in which torch.empty is filled with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", PERIODIC)
def test_deterministic_mode_on_poisoned_memory(name, deterministic):
    """No entry of a result or of a workspace is left unwritten and used."""
    layer = make_layer(name)
    for tokens in TOKENS:
        x, dy = batch(layer, tokens)
        first = train_step(layer, x, dy)
        assert all(t.isfinite().all() for t in first)
        assert all(equal(train_step(layer, x, dy), first) for _ in range(100 if tokens == 128 else 2))


def test_out_of_memory_leaves_nothing_behind():
    layer = make_layer("square")
    x, dy = batch(layer, 128)
    want = train_step(layer, x, dy)
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train_step(layer, x, dy)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert equal(train_step(layer, x, dy), want)


def mixed_device_calls():
    """(message, call): one argument on the CPU, the others on the GPU."""
    layer = make_layer("identities")
    x, dy = batch(layer, 2)
    w, (A, B, alpha, shapes) = layer.weight, layer.mixture
    none = (None, None, None, [])
    linear = lambda x, w, bias, *mix: lambda: ops.nf4_linear(x, *w, bias, *mix, False, "auto")  # noqa: E731
    args, bias = list(w.op_args()), torch.randn(layer.N).bfloat16()
    calls = {
        "packed is on cpu but x is on cuda": linear(x, w.to("cpu").op_args(), None, *none),
        "packed is on cuda:0 but x is on cpu": linear(x.cpu(), args, None, *none),
        "bias is on cpu but x is on cuda": linear(x, args, bias.cpu(), *none),
        "A is on cpu but packed is on cuda": linear(x, args, None, A.cpu(), B, alpha, shapes),
        "alpha is on cpu but x is on cuda": lambda: ops.kron_mix(x, A, B, alpha.cpu(), shapes, False, None),
        "add is on cpu but x is on cuda": lambda: ops.kron_mix(x, A, B, alpha, shapes, False, dy.cpu()),
        "grad_y is on cpu but x is on cuda": lambda: ops.kron_mix_grad(
            x, dy.cpu(), A, B, alpha, shapes, True, True, True
        ),
        "B is on cpu but weight is on cuda": lambda: ops.kron_add(w.dequantize(), A, B.cpu(), alpha, shapes),
    }
    for i, name in enumerate(("packed", "absmax", "absmax2", "code2", "offset")):
        moved = [*args[:i], args[i].cpu(), *args[i + 1 :]]
        message = (
            "absmax is on cuda:0 but packed is on cpu"
            if i == 0
            else f"{name} is on cpu but packed is on cuda"
        )
        calls[message] = lambda moved=moved: ops.nf4_dequantize(*moved, torch.bfloat16, *none)
    return calls


def test_mixed_devices_are_refused():
    for message, call in mixed_device_calls().items():
        with pytest.raises(RuntimeError, match=message):
            call()


@two_gpus
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_tensors_of_another_device_than_the_current(tokens):
    """In turn, and backward, which runs on a thread of its own per device."""
    with torch.device("cpu"):
        host = make_layer("square")
        x, dy = batch(host, tokens)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        layer = copy.copy(host)
        layer.weight = host.weight.to(device)
        layer.A, layer.B, layer.alpha = host.A.to(device), host.B.to(device), host.alpha.to(device)
        results.append([t.cpu() for t in train_step(layer, x.to(device), dy.to(device))])
        assert torch.cuda.current_device() == 0
    assert all(equal(result, results[0]) for result in results[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compile():
    layer = make_layer("square")
    x, dy = batch(layer, 128)
    compiled = torch.compile(forward, fullgraph=True)
    assert equal(train_step(layer, x, dy, compiled), train_step(layer, x, dy))


def llama(dtype):
    """Layers wide enough for every kernel of the training step."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, **sizes)
    return LlamaForCausalLM(config).to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_quantized_by_either_library_train_alike(dtype):
    """To the bit when every 4-bit layer is adapted: the same operators then run on the same bits."""
    losses = []
    for quantize in (lambda m: bitsandbytes_model(m, compute_dtype=dtype), moka.quantize):
        losses.append(train(quantize(llama(dtype)), "all-linear"))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.05


def test_every_kernel_is_sanitized():
    """The cases that run under compute-sanitizer launch every kernel of csrc/kernels."""
    kernels = Path(__file__).parents[1] / "csrc" / "kernels"
    source = "\n".join(path.read_text() for path in kernels.glob("*.cu*"))
    names = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", source))
    assert len(names) >= 10
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        test_cuda_sanitize.run_all()
        torch.cuda.synchronize()
    launched = {name for name in names for event in profile.key_averages() if name in event.key}
    assert launched == names


def test_import_leaves_the_gpu_alone():
    code = "import torch, moka, moka.integrations; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""Two processes, DDP and FSDP2: the same numbers as one, the same files, and refusals instead of divergence.

On a machine with two GPUs `pytest -m cuda tests/test_distributed.py` runs all of it on NCCL.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import WORLD
from tiny import tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moka
from helpers import LIMITS, errors
from moka import safefile
from moka.errors import ConfigError, StateError
from moka.integrations import distributed
from moka.integrations.distributed import STORAGE, full_adapters
from moka.integrations.preflight import check_distributed, is_fsdp_module
from moka.layout import full_tensor, is_sharded

STEPS, ROWS, TOKENS = 4, 4, 16
ADAPTER = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3}  # 3 gates do not divide by 2
STORAGES = {"": torch.uint8, "fp32": torch.float32, "bf16": torch.bfloat16}
BITSANDBYTES = pytest.param(
    "bitsandbytes",
    marks=pytest.mark.skipif(STORAGE.is_floating_point, reason="FSDP2 before torch 2.12"),
)


def device() -> str:
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def adapted(base: str = "nf4", seed: int = 1, **config) -> nn.Module:
    """The tiny model on a 4-bit base with an adapter whose every tensor is random.

    A base "..._fp32" has its packed bytes held as fp32 in FSDP2, as all have before torch 2.12.
    """
    kind, _, storage = base.partition("_")
    with torch.device("cpu"):
        model = tiny_model().train()
        if kind == "nf4":
            model = moka.quantize(model, double_quant=True)
    if kind == "bitsandbytes":
        to_bitsandbytes(model, STORAGES[storage])
    model = moka.inject(model.to(device()), moka.MokaConfig(**{**ADAPTER, **config}))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in trained(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, device="cpu"))
    return model


def shard(model: nn.Module, base: str, **options) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "STORAGE", torch.float32 if base.endswith("_fp32") else STORAGE)
        return moka.shard(model, **options)


def to_bitsandbytes(model: nn.Module, storage: torch.dtype) -> None:
    import bitsandbytes as bnb

    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and path != "lm_head":
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.float32, device="cpu", quant_storage=storage,
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, False, quant_type="nf4", module=layer, quant_storage=storage
            )
            model.set_submodule(path, layer.to(device()))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter, gathered; checks that every process has the same."""
    tensors = {name: full_tensor(p.detach()).cpu().clone() for name, p in trained(model).items()}
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, tensors)
    for name, tensor in tensors.items():
        assert all(torch.equal(other[name], tensor) for other in everyone), (
            f"{name} differs between processes"
        )
    return tensors


def optimize(model: nn.Module, call: nn.Module, rows: slice) -> list[float]:
    """Losses of some steps on `rows` of each batch."""
    data = torch.randint(
        0, 300, (STEPS, ROWS, TOKENS), generator=torch.Generator().manual_seed(3), device="cpu"
    )
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    losses = []
    for batch in data.to(device()):
        loss = call(input_ids=batch[rows], labels=batch[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """fp32 rounding: sums over tokens in another order, compounded over the steps."""
    u, limit, _ = LIMITS[torch.float32]
    error, _ = errors(actual, expected.double())
    assert error <= 2 * limit * u, f"{what}: {error / u:.1f} u"


def train_both(kind: str, base: str, config: dict) -> None:
    expected = adapted(base, **config)
    before = {name: p.detach().cpu().clone() for name, p in trained(expected).items()}
    expected_losses = optimize(expected, expected, slice(None))
    # another seed on the second process: all start from the first one's adapter
    model = adapted(base, seed=1 + dist.get_rank(), **config)
    if kind == "ddp":
        call = DistributedDataParallel(model)
    else:
        call = shard(model, base)
        assert all(is_sharded(p) for p in model.parameters())
    check_distributed(call)
    losses = torch.tensor(optimize(model, call, slice(dist.get_rank(), None, WORLD)), device=device())
    dist.all_reduce(losses)
    assert_near(losses.cpu() / WORLD, torch.tensor(expected_losses, device="cpu"), "losses")
    for name, tensor in whole(model).items():
        reference = trained(expected)[name].detach().cpu()
        assert_near(tensor, reference, name)
        assert not (tensor.numel() and torch.equal(tensor, before[name])), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("base", ["nf4", BITSANDBYTES, "bitsandbytes_fp32"])
def test_training_equals_one_process(processes, kind, base):
    processes.run(train_both, kind, base, {})


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("nf4", {"r": 1, "shapes": "identity", "gate": "linear"}),  # one side has no entries
        ("none", {"modules_to_save": ["norm"]}),
    ],
    ids=["identity", "dense"],
)
def test_training_of_other_adapters_equals_one_process(processes, kind, base, config):
    processes.run(train_both, kind, base, config)


def test_training_with_bytes_held_as_fp32_equals_one_process(processes):
    processes.run(train_both, "fsdp", "nf4_fp32", {})


def save_and_load(folder: Path, base: str) -> None:
    rank, written, write = dist.get_rank(), [], safefile.write_atomic
    model = adapted(base)
    moka.save_adapter(model, folder / f"whole{rank}")
    expected = whole(model)
    shard(model, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safefile, "write_atomic", lambda *args: (written.append(args[0].name), write(*args)))
        moka.save_adapter(model, folder / "sharded")
    assert len(written) == (2 if rank == 0 else 0)
    dist.barrier()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "sharded" / name).read_bytes() == (folder / f"whole{rank}" / name).read_bytes()

    for other in (adapted(base, seed=5), shard(adapted(base, seed=6), base)):
        moka.load_adapter(other, folder / "sharded")
        for name, tensor in whole(other).items():
            assert torch.equal(tensor, expected[name]), name
    optimize(other, other, slice(rank, None, WORLD))


@pytest.mark.parametrize("base", ["nf4", "nf4_fp32", BITSANDBYTES, "bitsandbytes_fp32", "none"])
def test_a_sharded_adapter_is_the_same_file(processes, tmp_path, base):
    processes.run(save_and_load, tmp_path, base)


def base_is_split(base: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = adapted(base)
    layers = [m for m in model.modules() if isinstance(m, moka.layers.NF4Linear)]
    for layer in layers:  # from 0x7f00 on, NaNs of both kinds among them
        entries = layer.packed.view(torch.int16)
        entries.copy_(torch.arange(0x7F00, 0x7F00 + len(entries), dtype=torch.int32))
    packed = [layer.packed.clone() for layer in layers]
    cast = torch.float32 if base.endswith("_fp32") or STORAGE.is_floating_point else torch.bfloat16
    shard(model, base, mp_policy=MixedPrecisionPolicy(param_dtype=cast))
    for layer, expected in zip(layers, packed, strict=True):
        assert layer.packed.to_local().nbytes == expected.nbytes // WORLD
        assert torch.equal(full_tensor(layer.packed).view(torch.uint8), expected)
    for module in model.modules():
        if is_fsdp_module(module):
            module.unshard()
    for layer, expected in zip(layers, packed, strict=True):
        assert not is_sharded(layer.packed) and torch.equal(layer.packed.view(torch.uint8), expected)
        assert torch.equal(layer.op_args()[0].view(torch.uint8), expected)
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()
    dense = moka.delta_weight(next(iter(moka.adapter_layers(adapted()).values())))
    layer = next(iter(moka.adapter_layers(model).values()))
    with full_adapters(model):
        assert torch.equal(moka.delta_weight(layer), dense)
    with pytest.raises(StateError, match="split over processes"):
        moka.merge(model)
    assert is_sharded(layer.moka_A["default"]) and layer.moka_A["default"].requires_grad


@pytest.mark.parametrize("base", ["nf4", "nf4_fp32"])
def test_the_4bit_base_is_split_and_adapters_can_be_looked_at(processes, base):
    processes.run(base_is_split, base)


def components_differ() -> None:
    """Each process drops other components; in DDP's strictest setting an unused tensor would be an error."""
    model = DistributedDataParallel(adapted(gate_dropout=0.5), find_unused_parameters=False)
    torch.manual_seed(dist.get_rank())
    optimize(model.module, model, slice(dist.get_rank(), None, WORLD))
    whole(model.module)


def test_components_unused_on_one_process(processes):
    processes.run(components_differ)


def refuse_ignored() -> None:
    from torch.distributed.fsdp import fully_shard

    model = adapted("none")
    fully_shard(model, ignored_params=set(trained(model).values()))
    with pytest.raises(ConfigError, match=r"ignore 18 trainable tensors \(.*moka_A"):
        check_distributed(model)


def refuse_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted("none")
    where = next(model.parameters()).device
    with pytest.raises(ConfigError, match=r"process 0: .*FSDP1 .* fsdp_version: 2"):
        check_distributed(FullyShardedDataParallel(model, use_orig_params=True, device_id=where))


def refuse_zero3() -> None:
    model = adapted()
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ConfigError, match=r"ZeRO-3 .*ZeRO-2"):
        moka.shard(model)


def refuse_two_dtypes() -> None:
    model = adapted(adapter_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"LlamaDecoderLayer trains torch\.bfloat16, torch\.float32"):
        moka.shard(model)
    assert not any(is_sharded(p) for p in model.parameters())


def refuse_storage_of_bitsandbytes() -> None:
    for base, patched, reason in (
        ("bitsandbytes", "bitsandbytes_fp32", "splits floating parameters alone"),
        ("bitsandbytes_bf16", "bitsandbytes", "copies floats below 32 bits by value"),
    ):
        model = adapted(base)
        held = rf"{STORAGES[base.partition('_')[2]]}; .*bnb_4bit_quant_storage=torch\.float32"
        with pytest.raises(ConfigError, match=rf"q_proj.*: FSDP2 .*{reason}.* {held}"):
            shard(model, patched)
        assert not any(is_sharded(p) for p in model.parameters())


def refuse_to_cast_bytes() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for base in ("nf4_fp32", "bitsandbytes_fp32"):
        model = adapted(base)
        with pytest.raises(ConfigError, match=r"param_dtype: got torch\.bfloat16, expected .*float32"):
            shard(model, base, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        assert not any(is_sharded(p) for p in model.parameters())


def refuse_other_config() -> None:
    with pytest.raises(
        ConfigError, match="process 1 differs from process 0 in r of adapter 'default': got 3, exp"
    ):
        check_distributed(adapted(r=2 + dist.get_rank()))


def refuse_other_shapes() -> None:
    model = adapted()
    layer = next(iter(moka.adapter_layers(model).values()))
    layer.moka_B["default"] = nn.Parameter(torch.zeros(5 + dist.get_rank(), device=device()))
    with pytest.raises(ConfigError, match=r"process 1 .* shape and dtype of .*moka_B.*\(6,\).*\(5,\)"):
        check_distributed(model)


def refuse_other_base() -> None:
    model = adapted()
    next(iter(moka.adapter_layers(model).values())).base_layer.packed[::3] += dist.get_rank()
    with pytest.raises(ConfigError, match="process 1 differs from process 0 in the base weights"):
        check_distributed(model)


def refuse_spread_layers() -> None:
    model = adapted()
    if dist.get_rank() == 1:
        model.model.norm.to("meta")
    with pytest.raises(ConfigError, match=r"process 1: its layers are spread over .*device_map"):
        check_distributed(model)


def refuse_other_settings() -> None:
    with pytest.raises(ConfigError, match="process 1 differs from process 0 in seed: got 1, expected 0"):
        check_distributed(adapted(), seed=dist.get_rank())


def refuse_without_adapter() -> None:
    with pytest.raises(StateError, match=r"moka\.inject"):
        check_distributed(tiny_model())


@pytest.mark.parametrize("name", sorted(name for name in globals() if name.startswith("refuse_")))
def test_refused_on_every_process(processes, name):
    processes.run(globals()[name])


def test_shard_needs_a_process_group():
    with pytest.raises(StateError, match="torchrun"):
        moka.shard(tiny_model())

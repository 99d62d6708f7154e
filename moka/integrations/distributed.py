"""Training in several processes: `shard` splits a model over them, `check_distributed` refuses in advance what
would go wrong without a word.

DDP needs neither: every process holds the whole model, and gradients of the adapter are averaged. FSDP2 splits
the frozen base too, so that a model need not fit one GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bases import NF4Linear, is_linear4bit
from ..errors import ConfigError, StateError
from ..inject import adapter_layers
from ..layout import full_tensor, is_sharded, part_of

FSDP1 = (
    "FSDP1 joins parameters into flat ones of a single floating dtype, from which no adapter can be saved; use FSDP2: "
    "moka.shard, or fsdp_version: 2 in accelerate's configuration"
)
ZERO3 = (
    "DeepSpeed ZeRO-3 does not split 4-bit weights and takes the adapter's tensors apart; use ZeRO-2, or FSDP2 where "
    "the base outgrows one GPU"
)


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Splits an adapted model over the processes with FSDP2, in place; call it on every process.

    One unit per decoder block (each module of the model's outermost `nn.ModuleList`s) and one for the rest. The
    packed 4-bit weights are split too, of moka's layers and of bitsandbytes', so that each of n processes holds
    an nth of them; their quantization constants (3% of them with double quantization, 11% without) stay whole.
    All processes start from the adapter of the first. Build the optimizer afterwards.

    Args:
        model: from `moka.inject`, whole and equal on every process; on its GPU, or on the CPU, from where it is
            moved unit by unit, so that no GPU ever holds all of it (not with bitsandbytes' layers).
        mesh: a `DeviceMesh`; None takes all processes.
        options: of `torch.distributed.fsdp.fully_shard`: `reshard_after_forward`, `mp_policy`, `offload_policy`.

    Returns:
        The same model.

    Raises:
        ConfigError: see `check_distributed`; or a unit would hold trainable tensors of several dtypes.
        StateError: the model has no adapter, or there is no process group.

    Example:
        >>> model = moka.shard(moka.inject(model, config))                               # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)  # doctest: +SKIP
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise StateError(
            "moka.shard: there is no process group; start with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    check_distributed(model)
    blocks = _blocks(model)
    for unit in (*blocks, model):
        _check_dtypes(unit, blocks)
    prepare_base(model)
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, **options)  # pyright: ignore[reportCallIssue]
    return model


def prepare_base(model: nn.Module) -> None:
    """Makes a model ready for `fully_shard`: packed weights become frozen parameters, which it splits (it leaves
    buffers whole), and all processes get the trainable tensors of the first. A side whose factors are all
    identities has no entries to train, and FSDP2 cannot reduce an empty gradient.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.hold_as_parameter()
        elif is_linear4bit(module) and module.quant_state is None:
            # fully_shard replaces the weight, and with it the copy of the quantization state that it carries
            module.quant_state = module.weight.quant_state  # pyright: ignore
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel() == 0:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            values = parameter.detach().to(_communication_device())
            dist.broadcast(values, src=0)
            parameter.data.copy_(values)


def check_distributed(model: nn.Module, **settings: Any) -> None:
    """Refuses what would diverge, hang or waste memory silently; call it on every process, before or after
    wrapping. Alone in the world it does nothing.

    Args:
        model: from `moka.inject`; wrapped or not.
        settings: further values that must be the same on every process.

    Raises:
        ConfigError: FSDP1; DeepSpeed ZeRO-3; layers spread over devices, or a GPU shared by two processes;
            trainable tensors that `fully_shard` was told to ignore; or processes whose configuration, adapter
            shapes, base or settings differ, naming process and field.
        StateError: the model has no adapter.

    Example:
        >>> check_distributed(model, learning_rate=3e-3)          # doctest: +SKIP
    """
    module: Any = getattr(model, "module", model)  # DistributedDataParallel
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if not getattr(module, "moka_config", {}):
        raise StateError("check_distributed: the model has no adapter; call moka.inject first")
    everyone: list[Any] = [None] * dist.get_world_size()
    problem = _problem(model)
    fields = {} if problem else _fields(module) | settings
    mine = {"problem": problem, "place": _place(module), "fields": fields}
    dist.all_gather_object(everyone, mine)  # a process that raised alone would leave the others waiting
    for rank, other in enumerate(everyone):
        if other["problem"]:
            raise ConfigError(f"process {rank}: {other['problem']}")
    places = [other["place"] for other in everyone]
    for place in places:
        if place[1].startswith("cuda") and places.count(place) > 1:
            raise ConfigError(
                f"{places.count(place)} processes use {place[1]} of {place[0]}; call "
                f"torch.cuda.set_device(local_rank) before loading, with device_map={{'': local_rank}}"
            )
    _compare([other["fields"] for other in everyone])


def is_fsdp_module(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def check_accelerator(accelerator: Any, model: nn.Module) -> None:
    """Refuses settings of an `accelerate.Accelerator` that cannot work, before the model is wrapped.

    Raises:
        ConfigError: naming the key of accelerate's configuration file.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but this one is in a group of {accelerator.num_processes} and would "
            f"train alone; on a CPU pass use_cpu=True to TrainingArguments"
        )
    fsdp, deepspeed = (getattr(accelerator.state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    if fsdp is not None and is_fsdp_module(model):
        raise ConfigError(
            "the model is split by moka.shard already; leave FSDP out of accelerate's configuration"
        )
    if fsdp is not None:
        wanted = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
        reasons = {
            "fsdp_version": FSDP1,
            "activation_checkpointing": "it renames the modules that an adapter's file names; pass "
            "gradient_checkpointing=true to the training run instead",
            "cpu_ram_efficient_loading": "it fills every process but the first with nothing before the model is "
            "quantized",
        }
        for name, value in wanted.items():
            if (got := getattr(fsdp, name)) != value:
                key = name if name.startswith("fsdp") else f"fsdp_{name}"
                raise ConfigError(f"{key}: got {got!r}, expected {value!r}: {reasons[name]}")
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ConfigError(f"zero_stage: got 3, expected at most 2: {ZERO3}")


def agree(fields: dict[str, Any]) -> None:
    """Every process must have the same values.

    Raises:
        ConfigError: naming the first process and field that differ from process 0.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fields)
    _compare(everyone)


def any_process(problem: str | None) -> str | None:
    """What the first process with a problem says, told to all of them; None if there is none.

    One number is exchanged unless there is a problem.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return problem
    count = torch.tensor(float(problem is not None), device=_communication_device())
    dist.all_reduce(count)
    if not count.item():
        return None
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    rank, said = next((rank, said) for rank, said in enumerate(everyone) if said is not None)
    return f"process {rank}: {said}"


@contextlib.contextmanager
def full_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block a sharded model's adapters are whole on every process: to plot or to analyse them, not
    for `forward`. Every process must enter it.
    """
    before: list[tuple[nn.ParameterDict, str, nn.Parameter]] = []
    try:
        for layer in adapter_layers(model).values():
            for table in (layer.moka_A, layer.moka_B, layer.moka_gate):
                for name, parameter in table.items():
                    before.append((table, name, parameter))
                    table[name] = nn.Parameter(full_tensor(parameter.detach()), requires_grad=False)
        yield
    finally:
        for table, name, parameter in before:
            table[name] = parameter


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, as a single process has it; every process must call this."""
    state = optimizer.state_dict()
    entries = {
        index: {k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_full_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole tensors, of which each process takes its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            k: part_of(v, parameters[index])
            if isinstance(v, Tensor) and v.shape == parameters[index].shape
            else v
            for k, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _communication_device() -> torch.device:
    """Where the process group wants its tensors: NCCL knows GPUs alone."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost module lists."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in _blocks(child)]


def _check_dtypes(unit: nn.Module, blocks: list[nn.Module]) -> None:
    inner = {p for block in blocks if block is not unit for p in block.parameters()}
    trained = [p for p in unit.parameters() if p.requires_grad and p not in inner]
    if len({p.dtype for p in trained}) > 1:
        raise ConfigError(
            f"FSDP2 averages gradients of one dtype per unit, {type(unit).__name__} trains {_dtypes(trained)}; use "
            f"adapter_dtype='float32' (gates are float32), and modules_to_save of a model in float32"
        )


def _compare(everyone: list[dict[str, Any]]) -> None:
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in {**first, **other}:
            got, expected = (repr(fields[name]) if name in fields else "nothing" for fields in (other, first))
            if got != expected:
                raise ConfigError(
                    f"process {rank} differs from process 0 in {name}: got {got[:300]}, expected "
                    f"{expected[:300]}; start every process with the same configuration and files"
                )


def _problem(model: nn.Module) -> str | None:
    """What is wrong with the model as this process holds it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    modules, parameters = list(model.modules()), list(model.parameters())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        return f"it trains {_dtypes(parameters)}, and {FSDP1}"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return ZERO3
    if any(is_fsdp_module(module) for module in modules):
        ignored = [n for n, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
        if ignored:
            return (
                f"FSDP2 was told to ignore {len(ignored)} trainable tensors ({ignored[0]}, ...), whose gradients "
                f"would not be averaged: the processes would drift apart; leave adapters out of ignored_params"
            )
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        return (
            f"its layers are spread over {devices} (device_map='auto'?); give each process one GPU: "
            f"device_map={{'': local_rank}}"
        )
    return None


def _dtypes(parameters: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(parameter.dtype) for parameter in parameters}))


def _place(model: nn.Module) -> tuple[str, str]:
    return socket.gethostname(), str(next(model.parameters()).device)


def _fields(model: Any) -> dict[str, Any]:
    """What must be the same on every process."""
    fields: dict[str, Any] = {}
    for name, config in model.moka_config.items():
        fields |= {f"{key} of adapter {name!r}": value for key, value in config.to_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fields[f"the shape and dtype of {name}"] = tuple(parameter.shape), str(parameter.dtype)
    return fields | {"the base weights": _base_digest(model)}


def _base_digest(model: nn.Module) -> str:
    """Of sizes and a few entries of each adapted layer's weight, as this process holds it."""
    digest = hashlib.sha256()
    for path, layer in adapter_layers(model).items():
        weight: Any = layer.base_layer.packed if isinstance(layer.base_layer, NF4Linear) else layer.weight
        digest.update(f"{path} {weight.dtype} {tuple(weight.shape)}".encode())
        if not is_sharded(weight):
            digest.update(_sample(weight.detach()).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor, count: int = 64) -> Tensor:
    entries = weight.flatten()
    sample = entries[:: -(-entries.numel() // count)].cpu()
    return sample.float() if sample.is_floating_point() else sample

"""What is refused in several processes: setups that would diverge, hang or waste memory without a word."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bases import NF4Linear, is_linear4bit
from ..errors import ConfigError, StateError
from ..inject import active_adapters, adapter_layers, require_adapters
from ..layout import is_sharded

FSDP1 = (
    "FSDP1 joins parameters into flat ones of a single floating dtype, from which no adapter can be saved; "
    "use FSDP2: moka.shard, or fsdp_version: 2 in accelerate's configuration"
)
ZERO3 = (
    "DeepSpeed ZeRO-3 does not split 4-bit weights and takes the adapter's tensors apart; use ZeRO-2, or "
    "FSDP2 where the base outgrows one GPU"
)


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
            f"{started} processes were started, but this one is in a group of {accelerator.num_processes} "
            f"and would train alone; on a CPU pass use_cpu=True to TrainingArguments"
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
            "cpu_ram_efficient_loading": "it leaves the model of every process but the first empty when it "
            "is quantized",
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


def check_dtypes(unit: nn.Module, blocks: list[nn.Module]) -> None:
    """The trainable tensors of a unit of FSDP2, those of `blocks` inside it apart, must have one dtype.

    Raises:
        ConfigError: naming the dtypes.
    """
    inner = {p for block in blocks if block is not unit for p in block.parameters()}
    trained = [p for p in unit.parameters() if p.requires_grad and p not in inner]
    if len({p.dtype for p in trained}) > 1:
        raise ConfigError(
            f"FSDP2 averages gradients of one dtype per unit, {type(unit).__name__} trains {_dtypes(trained)}"
            f"; use adapter_dtype='float32' (gates are float32), and modules_to_save of a model in float32"
        )


def require_adapter(model: nn.Module) -> str:
    """The one adapter that is trained, and saved; what else there is would show at the first checkpoint only.

    Raises:
        StateError: the model has none of `moka.inject`, or another number of active ones.
    """
    require_adapters(model, [], "train it with transformers.Trainer")
    if not getattr(model, "moka_config", {}):
        raise StateError("the model holds no adapter; call moka.inject first")
    active = active_adapters(model)
    if len(active) != 1:
        raise StateError(
            f"the trainer trains and saves one adapter, active are {active}; call "
            f"moka.set_adapter(model, name)"
        )
    return active[0]


def check_storage(model: nn.Module, storage: torch.dtype) -> None:
    """FSDP2 must be able to hold the weights of bitsandbytes; `storage` is what moka's own are held as.

    Not as 16-bit floats: those FSDP2 gathers by `torch._foreach_copy_`, which on a GPU takes them to fp32 and
    back, and so turns what happens to be a NaN, about one in a thousand pairs of bytes, into another one.

    Raises:
        ConfigError: it cannot, naming the layer and the way out.
    """
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if is_linear4bit(m)}
    for path, layer in layers.items():
        held: torch.dtype = layer.weight.dtype
        reason = None
        if held.is_floating_point and held.itemsize < 4:
            reason = "FSDP2 copies floats below 32 bits by value, which alters packed bytes"
        elif storage.is_floating_point and not held.is_floating_point:
            reason = f"FSDP2 of torch {torch.__version__} splits floating parameters alone"
        if reason:
            raise ConfigError(
                f"{path}: {reason}, and the weight is stored as {held}; load the model with "
                f"bnb_4bit_quant_storage=torch.float32, or let moka quantize it"
            )


def check_mixed_precision(model: nn.Module, storage: torch.dtype, mp_policy: Any) -> None:
    """FSDP2 casts floating parameters to `mp_policy.param_dtype`, which packed bytes do not survive.

    Raises:
        ConfigError: it would cast the weight of a 4-bit layer, named in the error.
    """
    param_dtype = getattr(mp_policy, "param_dtype", None)
    held: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        layer: Any = module
        if isinstance(layer, NF4Linear):
            held[path] = storage
        elif is_linear4bit(layer):
            held[path] = layer.weight.dtype
    for path, dtype in held.items():
        if dtype.is_floating_point and param_dtype not in (None, dtype):
            raise ConfigError(
                f"mp_policy.param_dtype: got {param_dtype}, expected None or {dtype}: {path} holds packed "
                f"4-bit weights as {dtype}, which FSDP2 would convert as if they were numbers"
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
                f"FSDP2 was told to ignore {len(ignored)} trainable tensors ({ignored[0]}, ...): their "
                f"gradients are not averaged and processes drift apart; leave adapters out of ignored_params"
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

"""Training in several processes: `shard` splits a model over them with FSDP2, base and adapter.

DDP does not need it: there every process holds the whole model, and the adapter's gradients are averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bases import NF4Linear, is_linear4bit
from ..errors import StateError
from ..inject import adapter_layers
from ..layout import full_tensor, part_of
from .preflight import check_distributed, check_dtypes, check_mixed_precision, check_storage

#: What FSDP2 splits the packed bytes of `NF4Linear` as. Before torch 2.12 it takes floating parameters alone
#: (pytorch issue 177844); there the bytes are viewed as fp32, which is copied and never computed with. Not as
#: 16-bit floats, see `check_storage`.
STORAGE = torch.uint8 if torch.__version__ >= "2.12" else torch.float32


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Splits an adapted model over the processes with FSDP2, in place; call it on every process.

    One unit per decoder block (each module of the model's outermost `nn.ModuleList`s) and one for the rest.
    The packed 4-bit weights are split too, of moka's layers and of bitsandbytes': each of n processes holds
    an nth. Their quantization constants stay whole: 3% of the packed size with double quantization, else 12%.
    All processes start from the adapter of the first. Build the optimizer afterwards.

    Args:
        model: from `moka.inject`, whole and equal on every process; on its GPU, or on the CPU, from where it
            moves unit by unit, so that no GPU ever holds all of it (bitsandbytes' layers must be on the GPU).
        mesh: a `DeviceMesh`; None takes all processes.
        options: of `torch.distributed.fsdp.fully_shard`, such as `reshard_after_forward` or `mp_policy`.

    Returns:
        The same model.

    Raises:
        ConfigError: see `check_distributed`; or a unit would hold trainable tensors of several dtypes; or
            FSDP2 cannot hold the packed weights, or `mp_policy` would cast them.
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
        check_dtypes(unit, blocks)
    prepare_base(model, options.get("mp_policy"))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, **options)  # pyright: ignore[reportCallIssue]
    return model


def prepare_base(model: nn.Module, mp_policy: Any) -> None:
    """Makes a model ready for `fully_shard`: packed weights become frozen parameters, which it splits (it
    leaves buffers whole), and all processes get the trainable tensors of the first. A side whose factors are
    all identities has no entries to train, and FSDP2 cannot reduce an empty gradient.

    Raises:
        ConfigError: FSDP2 cannot hold the packed weights, or `mp_policy` would cast them.
    """
    check_storage(model, STORAGE)
    check_mixed_precision(model, STORAGE, mp_policy)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.hold_as_parameter(STORAGE)
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
            for table in layer.tables():
                for name, parameter in table.items():
                    before.append((table, name, parameter))
                    table[name] = nn.Parameter(full_tensor(parameter.detach()), requires_grad=False)
        yield
    finally:
        for table, name, parameter in before:
            table[name] = parameter


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, as one process has it; every process must call this."""
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

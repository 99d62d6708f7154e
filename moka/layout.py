"""The tensors of an adapter: names, shapes, dtypes; and whether a file holds those that a model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bases import weight_of
from .config import MokaConfig
from .errors import CheckpointMismatchError, ConfigError, StateError
from .gates import logit_shape
from .layers import MokaLinear
from .manifest import Manifest
from .nf4 import NF4Weight
from .safefile import TensorEntry
from .shapes import KronShape, explicit_shapes
from .targets import Target, find_modules_to_save, walk
from .trained_copy import TrainedCopy

PREFIX = "base_model.model."  # as in peft's files
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
#: What an existing adapter must share with a file; the other fields may change between training runs.
SHAPING = (
    "r",
    "shapes",
    "gate",
    "gate_temperature",
    "scale",
    "tie",
    "magnitude",
    "r_pattern",
    "modules_to_save",
    "adapter_dtype",
)
FACTORS = (".moka_A", ".moka_B")  # how the names of factors end
MAX_NAMES = 10
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def expected_tensors(model: nn.Module, config: MokaConfig, targets: list[Target]) -> Layout:
    """Name -> shape and dtype of each tensor that the file of an adapter must hold.

    Raises:
        ConfigError: a module of `modules_to_save` holds tensors that are not floating point.
    """
    dtype = getattr(torch, config.adapter_dtype)
    layout: Layout = {}
    for target in targets:
        prefix = f"{PREFIX}{target.path}."
        layout[prefix + "moka_A"] = (sum(s.a_numel for s in target.shapes),), dtype
        layout[prefix + "moka_B"] = (sum(s.b_numel for s in target.shapes),), dtype
        logits = logit_shape(config.gate, len(target.shapes), target.in_features)
        if logits is not None:
            layout[prefix + "moka_gate"] = logits, torch.float32
        if config.magnitude:
            layout[prefix + "moka_magnitude"] = (target.out_features,), torch.float32
    for path, module in _modules_to_save(model, config, targets):
        original = module.original_module if isinstance(module, TrainedCopy) else module
        for name, tensor in original.state_dict().items():
            if not tensor.is_floating_point():
                raise ConfigError(
                    f"modules_to_save: {path}.{name} is {tensor.dtype}, expected floating point"
                )
            layout[f"{PREFIX}{path}.{name}"] = tuple(tensor.shape), tensor.dtype
    # a side whose factors are all identities has no entries, and no place in the file
    return {name: entry for name, entry in layout.items() if 0 not in entry[0]}


def layer_paths(names: Iterable[str]) -> list[str]:
    """The paths of the layers whose factors have these names in a file, in order."""
    parts = (name.rpartition(".") for name in names)
    paths = (path.removeprefix(PREFIX) for path, _, last in parts if f".{last}".startswith(FACTORS))
    return list(dict.fromkeys(paths))


def current_tensors(
    model: nn.Module, config: MokaConfig, targets: list[Target], adapter_name: str
) -> dict[str, Tensor]:
    """Name in the file -> tensor of the adapted model, sharing memory."""
    tensors = {}
    for target in targets:
        for table in MokaLinear.adapter_layer_names:
            parameters = getattr(target.module, table)
            if adapter_name in parameters:
                tensors[f"{PREFIX}{target.path}.{table}"] = parameters[adapter_name].detach()
    for path, module in _modules_to_save(model, config, targets):
        assert isinstance(module, TrainedCopy)  # the model is adapted
        for name, tensor in module.modules_to_save[adapter_name].state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = tensor
    return tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def refuse_sharded(tensors: Iterable[Tensor]) -> None:
    """Weights are merged where they are whole.

    Raises:
        StateError: one of the tensors is split over processes.
    """
    if any(map(is_sharded, tensors)):
        raise StateError(
            "the model is split over processes; save its adapter, load it into a whole model and merge there"
        )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; if it is split, every process must call this."""
    split: Any = tensor
    return split.full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as `like` is; `tensor` itself if that is not split."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # every process has the whole tensor: no one needs to send it
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def base_weights(targets: list[Target]) -> Iterator[NF4Weight | Tensor]:
    """The frozen weights of the adapted layers, in the order of their paths; a sharded one is gathered when
    its turn comes.

    Raises:
        StateError: an adapter is merged into them.
    """
    layers = [target.module for target in sorted(targets, key=lambda target: target.path)]
    for layer in layers:
        if isinstance(layer, MokaLinear) and layer.merged_adapters:
            raise StateError(
                f"adapters {layer.merged_adapters} are merged into the base; call moka.unmerge first"
            )
    originals = (y.original_layer() if isinstance(y, MokaLinear) else y for y in layers)
    weights = map(weight_of, originals)
    return (
        dataclasses.replace(weight, packed=full_tensor(weight.packed))
        if isinstance(weight, NF4Weight)
        else full_tensor(weight)
        for weight in weights
    )


def check_fields(where: str, stored: MokaConfig, existing: MokaConfig) -> None:
    """The adapter that is in the model must be of the same kind as the one in the file.

    Raises:
        CheckpointMismatchError: naming the fields with both values.
    """
    listed = [
        f"{name} {getattr(stored, name)!r} (in the model {getattr(existing, name)!r})"
        for name in SHAPING
        if getattr(stored, name) != getattr(existing, name)
    ]
    if listed:
        raise CheckpointMismatchError(
            f"{where}: differs from the adapter in the model: {', '.join(listed)}; load it under another "
            f"name, or go on with its configuration where a run is to be resumed"
        )


def check_tensors(where: str, found: dict[str, TensorEntry], layout: Layout) -> None:
    """The file must hold exactly the tensors of `layout`.

    Raises:
        CheckpointMismatchError: with at most `MAX_NAMES` names of each kind.
    """
    wrong = {
        "missing": [name for name in layout if name not in found],
        "unexpected": [repr(name)[:200] for name in found if name not in layout],
        "of another shape or dtype": [
            f"{name} {found[name].dtype} {list(found[name].shape)} (expected {DTYPES[dtype]} {list(shape)})"
            for name, (shape, dtype) in layout.items()
            if name in found and (found[name].dtype, found[name].shape) != (DTYPES[dtype], shape)
        ],
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
        for kind, names in wrong.items()
        if names
    ]
    if parts:
        raise CheckpointMismatchError(
            f"{where}: does not fit this model; tensors {'; '.join(parts)}. "
            f"Load it into the model it was trained on"
        )


def check_tied(where: str, tensors: dict[str, Tensor], config: MokaConfig, targets: list[Target]) -> None:
    """Factors that layers share (`MokaConfig.tie`) are stored with each of them.

    Raises:
        CheckpointMismatchError: they differ.
    """
    first: dict[tuple, Tensor] = {}
    for target in targets if config.tie else ():
        name = f"{PREFIX}{target.path}.moka_{config.tie}"
        key = tuple(shape.side(config.tie) for shape in target.shapes)  # pyright: ignore[reportArgumentType]
        if name in tensors and not torch.equal(first.setdefault(key, tensors[name]), tensors[name]):
            raise CheckpointMismatchError(
                f"{where}: {name} differs from that of another layer, but the configuration has "
                f"tie={config.tie!r}; was the adapter trained after a copy that untied it?"
            )


def with_stored_shapes(manifest: Manifest, targets: list[Target]) -> MokaConfig:
    """The configuration of a file; with its components by layer, where a rule chose others at the time.

    Args:
        targets: what the configuration itself gives for the model.
    """
    config = manifest.config
    stored = {target.path: manifest.shapes.get(target.path, ()) for target in targets}
    others = [target for target in targets if stored[target.path] != target.shapes]
    by_rule = all(isinstance(config.shapes_for(target.path), str) for target in others)
    fit = all(_size(stored[target.path]) == _size(target.shapes) for target in others)
    if not (others and by_rule and fit):
        return config
    return dataclasses.replace(config, shapes=explicit_shapes(stored))


def _size(shapes: Sequence[KronShape]) -> tuple[int, int] | None:
    return (shapes[0].ma * shapes[0].mb, shapes[0].na * shapes[0].nb) if shapes else None


def check_shapes(where: str, manifest: Manifest, targets: list[Target]) -> None:
    """The components must agree too: tensors of one size fit several shapes.

    Raises:
        CheckpointMismatchError: naming the layer and both shapes.
    """
    for target in targets:
        if (stored := manifest.shapes.get(target.path)) != target.shapes:
            got, expected = ([str(s) for s in shapes or ()][:MAX_NAMES] for shapes in (stored, target.shapes))
            raise CheckpointMismatchError(
                f"{where}: {target.path} has the components {got}, its configuration gives {expected}"
            )


def _modules_to_save(
    model: nn.Module, config: MokaConfig, targets: list[Target]
) -> Iterator[tuple[str, nn.Module]]:
    paths = {
        module: path for path, module in reversed(list(walk(model)))
    }  # the first path of a shared module
    for module in find_modules_to_save(model, config, targets):
        yield paths[module], module

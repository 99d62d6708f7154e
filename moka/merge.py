"""Merging: the update is added to the base weight, so that inference costs nothing extra.

    W' = W + scale * sum_i gate_i (A_i kron B_i)        summed in fp32, rounded once to the dtype of W'

`W` is what the adapter was trained on: for a 4-bit base the dequantized weight, never the original 16-bit
one. Rounding back into 4 bits, to one of 16 values per entry, erases small updates: `merge` measures that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from . import functional
from .bases import MergedBase, NF4Linear, check_into, device_of, moved, with_weight
from .errors import MergeError, NonFiniteError, StateError
from .inject import active_adapters, adapter_layers, require_adapters
from .layers import MokaLinear
from .layout import refuse_sharded
from .magnitude import directed
from .nf4 import NF4Weight
from .wrapped import unwrapped

#: The largest relative error of the applied update, |applied - delta| / |delta|, that is accepted in silence.
MAX_ERROR = 0.25


def merge(
    model: nn.Module,
    into: torch.dtype | None = None,
    adapter_name: str | Sequence[str] | None = None,
    force: bool = False,
) -> nn.Module:
    """Adds the update of adapters to the base weights; `forward` then runs the base layers alone.

    All layers are merged or, on any error, none. `unmerge` puts the original layers back; until then each
    layer holds both weights. `moka.eject` drops the originals, and given `into` as well, it brings the layers
    without an adapter to the same dtype: a plain model with the update in it is left.

    Args:
        model: with adapters from `moka.inject`.
        into: `torch.float32`, `bfloat16` or `float16`: each merged layer becomes an `nn.Linear` of it. None
            keeps the dtype of a dense layer, and a 4-bit layer in 4 bits.
        adapter_name: one or several; None for the active ones.
        force: merge into 4 bits even where more than `MAX_ERROR` of the update is lost; `merge_errors` has
            the figures.

    Returns:
        The same model.

    Raises:
        StateError: a layer is merged already, no layer has such an adapter, or the model is sharded.
        NonFiniteError: an update holds NaN or infinity.
        MergeError: a 4-bit weight would lose more than `MAX_ERROR` of its update.

    Example:
        >>> moka.merge(model, into=torch.bfloat16)                               # doctest: +SKIP
        >>> moka.eject(model, into=torch.bfloat16).save_pretrained("merged")     # doctest: +SKIP
    """
    merge_layers(adapter_layers(model), _adapter_names(model, adapter_name), into, force)
    return model


@torch.no_grad()
def merge_layers(
    layers: Mapping[str, MokaLinear],
    names: Sequence[str],
    into: torch.dtype | None,
    force: bool,
    fix: str = "into=torch.float32",
) -> None:
    """Merges the named adapters into every layer that has one of them, or, on any error, into none.

    Args:
        layers: path -> layer.
        names: sorted, so that the sum does not depend on their order.
        into, force: as for `merge`, which says what it raises.
        fix: what the caller's own user does against a loss by rounding to 16 bits.
    """
    check_into(into)
    refuse_sharded(parameter for layer in layers.values() for parameter in layer.parameters())
    merged: dict[MokaLinear, tuple[nn.Module, MergedBase, list[str]]] = {}
    lost: dict[str, tuple[str, float]] = {}
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise StateError(f"{path}: {layer.merged_adapters} are merged already; call moka.unmerge first")
        if present := [name for name in names if name in layer.moka_A]:
            new, error = _merged_layer(path, layer, present, into)
            if error > MAX_ERROR:
                four_bit = isinstance(new, NF4Linear)
                if four_bit and not force:
                    _refuse_loss(path, error)
                lost[path] = "4 bits" if four_bit else str(new.weight.dtype), error
            merged[layer] = new, MergedBase(layer.base_layer, error), present
    if lost:
        _warn_of_loss(lost, fix)
    try:
        for layer, (new, base, present) in merged.items():
            layer.merged_base, layer.merged_adapters, layer.base_layer = base, present, new
    except BaseException:  # an interrupt leaves nothing half merged
        restore(merged)
        raise


def unmerge(model: nn.Module) -> nn.Module:
    """Takes merged updates out: the original base layers return, bit for bit.

    Raises:
        StateError: nothing is merged.
    """
    merged = [layer for layer in adapter_layers(model).values() if layer.merged_base is not None]
    if not merged:
        raise StateError("no adapter is merged; call moka.merge first")
    restore(merged)
    return model


def merge_errors(model: nn.Module) -> dict[str, float]:
    """Path -> |applied - delta| / |delta| of each merged layer: the part of its update that rounding took."""
    layers = adapter_layers(model).items()
    return {path: layer.merged_base.error for path, layer in layers if layer.merged_base is not None}


def _adapter_names(model: nn.Module, wanted: str | Sequence[str] | None) -> list[str]:
    """The adapters to merge, sorted so that the sum does not depend on their order."""
    names = (
        active_adapters(model) if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    )
    require_adapters(model, names, "merge with model.merge_and_unload")
    if not names:
        known = list(getattr(unwrapped(model), "moka_config", {}))
        raise StateError(
            f"no adapter to merge: none is active, the model has {known}; call moka.inject first"
        )
    return sorted(set(names))


def _merged_layer(
    path: str, layer: MokaLinear, names: Sequence[str], into: torch.dtype | None
) -> tuple[nn.Module, float]:
    """A new base layer with the update in it, and the relative error of the update it holds."""
    mixture = layer.mixture(names)
    for name, tensor in zip(("moka_A", "moka_B", "gate"), mixture[:3], strict=True):
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{path}: {name} of adapter {names} holds NaN or infinity; train it again")
    base, delta = layer.base_weight(), None
    if directed(layer, names):
        delta = layer.delta_weight(names[0])
        before = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base
        after = (before + delta).to(into or before.dtype)
    elif isinstance(base, NF4Weight):
        before = base.dequantize(torch.float32)
        after = base.dequantize(into or torch.float32, mixture)
    else:
        before, dtype = base, into or base.dtype
        after = functional.kron_add(base.to(torch.promote_types(base.dtype, dtype)), *mixture).to(dtype)
    if isinstance(base, NF4Weight) and into is None and torch.equal(after, before):
        new = layer.base_layer  # an update of zero: 4 bits again would not give the same bits
    else:
        new = with_weight(layer.base_layer, after, into)
        if isinstance(new, NF4Linear):
            after = new.nf4_weight().dequantize(torch.float32)
    if delta is None:
        delta = functional.kron_add(torch.zeros_like(before, dtype=torch.float32), *mixture)
    loss = (after.float() - before.float()).sub_(delta).norm() / delta.norm()
    return new, loss.item() if delta.any() else 0.0


def _refuse_loss(path: str, error: float) -> None:
    raise MergeError(
        f"{path}: rounding to 4 bits changes the update by {error:.0%} of its norm, expected at most "
        f"{MAX_ERROR:.0%}; merge with into=torch.bfloat16 or torch.float32, or keep the adapter apart. "
        f"force=True merges all the same"
    )


def _warn_of_loss(lost: Mapping[str, tuple[str, float]], fix: str) -> None:
    """One warning for all layers, of which a model has hundreds; `merge_errors` has each."""
    path = max(lost, key=lambda p: lost[p][1])
    kinds, worst = " and ".join(sorted({kind for kind, _ in lost.values()})), lost[path][1]
    warnings.warn(
        f"rounding to {kinds} changes the update of {len(lost)} layers by more than {MAX_ERROR:.0%} of its "
        f"norm, the most ({worst:.0%}) in {path}; merge with {fix}, or keep the adapter apart",
        stacklevel=4,
    )


def restore(layers: Iterable[MokaLinear]) -> None:
    """Puts the original base back into those of the layers that are merged."""
    for layer in layers:
        if layer.merged_base is not None:
            layer.base_layer = moved(layer.merged_base.original, device_of(layer.base_layer))
            layer.merged_adapters, layer.merged_base = [], None

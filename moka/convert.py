"""Adapters of other kinds as MoKA, and back: LoRA, LoKr, and the difference of two sets of weights.

    R(dW) ~ sum_i vec(A_i) vec(B_i)^T          R: entries of dW by row (i_A, j_A) and column (i_B, j_B)

The truncated SVD of `R(dW)` is the nearest sum of components of one shape, and lacks the energy of the other
singular values (Van Loan and Pitsianis, 1993). Different shapes have no such formula: each is fitted to what
the others leave, in turns. One dense update is held at a time.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import safefile
from .bases import device_of
from .checkpoint import CONFIG, WEIGHTS
from .config import MokaConfig, pattern_matches
from .errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, NonFiniteError
from .export_lora import (
    Export,
    ExportedLayer,
    exportable_layers,
    peft_fields,
    refuse_other_adapter,
    write_adapter,
)
from .gates import UNIFORM
from .inject import adapter_layers, inject
from .kpsvd import Terms, fit
from .layers import MokaLinear
from .layout import PREFIX
from .shapes import explicit_shapes
from .targets import find_targets
from .wrapped import unwrapped

#: What of peft's LoRA changes the update or reaches beyond it.
LORA_EXTRAS = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "fan_in_fan_out",
)


def from_lora(
    source: str | Path | Mapping[str, Tensor],
    model: nn.Module,
    config: MokaConfig,
    adapter_name: str = "default",
) -> Export:
    """Puts the MoKA nearest to a LoRA into a model. Shapes `(N, 1, 1, K)`, one per rank, hold it exactly.

    Args:
        source: folder of a LoRA of peft; or its tensors, then with a scale of 1.
        model: the base of the LoRA; gets the adapter as by `moka.inject`.
        config: of the adapter; it must select all layers that the LoRA adapts.
        adapter_name: of the new adapter.

    Returns:
        Components and discarded energy, per layer and in total (before any rounding to `adapter_dtype`).

    Raises:
        CheckpointFormatError, UnsafeFileError: the folder holds no LoRA, or cannot be trusted.
        CheckpointMismatchError: it has more than a LoRA of linear layers, or layers that `config` leaves out.
        NonFiniteError: an update holds NaN or infinity.

    Example:
        >>> print(moka.convert.from_lora("lora", model, MokaConfig(r=10)))          # doctest: +SKIP
    """
    settings, tensors = ({}, source) if isinstance(source, Mapping) else _read(Path(source), "LORA")
    if extras := [name for name in LORA_EXTRAS if settings.get(name)]:
        raise CheckpointMismatchError(
            f"{source}: {extras} have no counterpart; merge the LoRA with peft instead"
        )
    updates = {}
    for path, parts in _by_layer(tensors, r"lora_(A|B)(?:\.[\w-]+)?\.weight", {"A", "B"}).items():
        A, B = parts["A"].float(), parts["B"].float()
        alpha = _pattern(settings, "alpha_pattern", path, settings.get("lora_alpha"))
        rank = math.sqrt(len(A)) if settings.get("use_rslora") else len(A)
        scale = 1.0 if alpha is None else alpha / rank
        updates[path] = lambda A=A, B=B, scale=scale: scale * (B @ A)
    return _fit_all(updates, model, config, adapter_name)


def from_weights(
    base: nn.Module | Mapping[str, Tensor],
    tuned: nn.Module | Mapping[str, Tensor],
    model: nn.Module,
    config: MokaConfig,
    adapter_name: str = "default",
) -> Export:
    """Puts the MoKA nearest to a full fine-tuning into a model: to `tuned - base` in each adapted layer.

    Args:
        base, tuned: models, or their tensors by name, not quantized.
        model: gets the adapter as by `moka.inject`.
        config: of the adapter. What `tuned` changed in other tensors is left out, with a warning.
        adapter_name: of the new adapter.

    Returns, Raises: as for `from_lora`.

    Example:
        >>> moka.convert.from_weights(base, tuned, model, MokaConfig())          # doctest: +SKIP
    """
    old, new = (s.state_dict() if isinstance(s, nn.Module) else s for s in (base, tuned))
    updates = {}
    for target in find_targets(model, config):
        name = f"{target.path}.weight"
        if name not in old or name not in new:
            raise CheckpointMismatchError(f"{name}: missing in {'tuned' if name in old else 'base'}")
        updates[target.path] = lambda name=name: new[name].float() - old[name].float()
    adapted = {f"{path}.weight" for path in updates}
    if other := [n for n in new if n not in adapted and n in old and not torch.equal(new[n], old[n])]:
        warnings.warn(
            f"{len(other)} tensors differ in layers that are not adapted and are left out: {other[:5]}",
            stacklevel=2,
        )
    return _fit_all(updates, model, config, adapter_name)


def from_lokr(folder: str | Path, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Puts a LoKr of peft into a model, exactly: one component per layer, and no gate.

    Args:
        folder: with peft's files; a tensor `alpha` beside the factors, as LyCORIS writes it, is read too.
        model: the base of the LoKr.
        adapter_name: of the new adapter.

    Raises:
        CheckpointFormatError, UnsafeFileError: the folder holds no LoKr, or cannot be trusted.
        CheckpointMismatchError: factors of convolutions, or that do not fit the model.

    Example:
        >>> model = moka.convert.from_lokr("lokr", model)          # doctest: +SKIP
    """
    settings, tensors = _read(Path(folder), "LOKR")
    shapes, values = {}, {}
    for path, parts in _by_layer(tensors, r"(lokr_w[12](?:_[ab])?|alpha)", set()).items():
        found = []
        for name in ("lokr_w1", "lokr_w2"):
            names = [name] if name in parts else [f"{name}_a", f"{name}_b"]
            side = [parts[part] for part in names if part in parts]
            if len(side) != len(names) or any(part.ndim != 2 for part in side):
                got = {part: list(tensor.shape) for part, tensor in parts.items()}
                raise CheckpointMismatchError(f"{folder}: {path} has {got}, expected a matrix {name}")
            found.append([part.float() for part in side])
        rank = next((len(side[1]) for side in reversed(found) if len(side) == 2), None)
        if "alpha" in parts:
            scale = parts["alpha"].item() / rank if rank else 1.0  # LyCORIS: full factors have a scale of 1
        else:
            scale = _pattern(settings, "alpha_pattern", path, settings.get("alpha", 8))  # peft's defaults
            scale /= _pattern(settings, "rank_pattern", path, settings.get("r", 8))
        found[1][0] = scale * found[1][0]
        sizes = [size for side in found for size in (len(side[0]), side[-1].shape[1])]
        kinds = [f"lowrank({len(side[1])})" if len(side) == 2 else "dense" for side in found]
        shapes[path] = [(*sizes, 0, *kinds)]
        values[path] = [torch.cat([part.flatten() for part in side]) for side in found]
    config = MokaConfig(list(shapes), shapes=explicit_shapes(shapes), gate="none", scale=1.0, strict=False)
    inject(model, config, adapter_name)
    with torch.no_grad():
        for path, layer in adapter_layers(model).items():
            if path in values:
                layer.moka_A[adapter_name].copy_(values[path][0])
                layer.moka_B[adapter_name].copy_(values[path][1])
    return model


@torch.no_grad()
def to_lokr(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes an adapter of one component per layer as a LoKr of peft, exactly.

    Args:
        model: with adapters from `moka.inject`.
        folder: made if need be; a LoKr in it is replaced, another kind of adapter is not.
        adapter_name: which adapter.

    Raises:
        ConfigError: several components, or shapes that no `decompose_factor` of peft gives in all layers.
        StateError: no such adapter, or it is on the meta device.

    Example:
        >>> moka.convert.to_lokr(model, "lokr")          # doctest: +SKIP
    """
    try:
        from peft.tuners.lokr.layer import factorization
    except ImportError as error:
        raise ImportError("to_lokr needs peft, for its rule of factor shapes; install moka[peft]") from error
    model = unwrapped(model)
    layers = exportable_layers(model, adapter_name)
    if any(adapter_name in layer.moka_magnitude for layer in layers.values()):
        raise ConfigError(f"to_lokr: adapter {adapter_name!r} has a magnitude, which a LoKr of peft has not")
    refuse_other_adapter(Path(folder), "LOKR")
    shapes = {path: layer.shapes[adapter_name] for path, layer in layers.items()}
    every = [shape for kinds in shapes.values() for shape in kinds]
    wanted = {pair for s in every for pair in ((s.ma * s.mb, s.ma), (s.na * s.nb, s.na))}
    candidates = (-1, *sorted({first for _, first in wanted}))
    factor = next((f for f in candidates if all(factorization(n, f)[0] == m for n, m in wanted)), None)
    if factor is None or len(every) != len(shapes):
        path = next((path for path, kinds in shapes.items() if len(kinds) != 1), next(iter(shapes)))
        got = f"{[str(shape) for shape in shapes[path]]} in {path}"
        raise ConfigError(
            f"to_lokr: got {got}; expected one component per layer, its left factor of the sizes that one "
            f"decompose_factor of peft gives in all layers (moka convert --to writes a MoKA again)"
        )
    tensors, r = {}, max(max(s.mb, s.nb) for s in every)  # peft's w2 is dense from half of that on
    for path, layer in layers.items():
        ((A, B),), alpha = layer.factors(adapter_name), layer.alpha(adapter_name)
        tensors[f"{PREFIX}{path}.lokr_w1"] = A.float().cpu().clone()
        tensors[f"{PREFIX}{path}.lokr_w2"] = (alpha * B.float()).cpu()
    fields = {"r": r, "alpha": r, "decompose_factor": factor, "decompose_both": False}
    write_adapter(Path(folder), {**peft_fields(model, "LOKR", layers), **fields}, tensors)


@torch.no_grad()
def _fit_all(
    updates: Mapping[str, Callable[[], Tensor]], model: nn.Module, config: MokaConfig, name: str
) -> Export:
    """Injects an adapter that is fitted to `updates`; nothing is changed before all of them are."""
    targets = {target.path: target for target in find_targets(model, config)}
    if config.tie or config.magnitude or config.gate not in UNIFORM or config.init in ("svd", "residual"):
        raise ConfigError(
            f"got tie={config.tie!r}, magnitude={config.magnitude}, gate={config.gate!r}, "
            f"init={config.init!r}; expected factors of each layer's own, no magnitude, "
            f"a gate of {UNIFORM}, and init='default'"
        )
    if left_out := sorted(updates.keys() - targets.keys()):
        raise CheckpointMismatchError(f"target_modules leaves out layers of the source: {left_out[:5]}")
    terms, report = {}, []
    for path, update in updates.items():
        module: Any = targets[path].module
        if any(shape.fields != tuple(shape.expanded[:5]) for shape in targets[path].shapes):
            raise ConfigError(f"shapes: got {config.shapes!r}, expected dense or identity factors to fit to")
        base = module.base_layer if isinstance(module, MokaLinear) else module
        size: Any = (base.out_features, base.in_features)
        W = update().to(device_of(base))
        if W.shape != size:
            raise CheckpointMismatchError(f"{path}: the update is {tuple(W.shape)}, expected {size}")
        if not W.isfinite().all():
            raise NonFiniteError(f"{path}: the update holds NaN or infinity; nothing was changed")
        terms[path] = fit(W, targets[path].shapes)
        rest = W - sum(torch.kron(A, B) for A, B in terms[path])
        energies = (x.double().square().sum().item() for x in (W, rest))
        report.append(ExportedLayer(path, size, len(terms[path]), *energies))
    inject(model, config, name)
    _fill(model, name, terms)
    return Export(tuple(report))


@torch.no_grad()
def _fill(model: nn.Module, name: str, terms: Mapping[str, Terms]) -> None:
    """Sets the factors of a new adapter; its gates stay uniform, and B is divided by them."""
    layers = adapter_layers(model)
    for path, values in terms.items():
        layer = layers[path]
        sides: tuple[list[Tensor], list[Tensor]] = [], []
        for (A, B), alpha, shape in zip(values, layer.alpha(name), layer.shapes[name], strict=True):
            if shape.identity != 1:
                sides[0].append((A / alpha if shape.identity == 2 else A).flatten())
            if shape.identity != 2:
                sides[1].append((B / alpha).flatten())
        for table, parts in zip((layer.moka_A, layer.moka_B), sides, strict=True):
            if parts:
                table[name].copy_(torch.cat(parts))


def kind_of(folder: Path) -> str:
    """The `peft_type` of the adapter in a folder: "LORA", "LOKR", "MOKA", ...

    Raises:
        CheckpointFormatError, UnsafeFileError: the folder holds no adapter, or cannot be trusted.
        FileNotFoundError: there is no such folder, or no configuration in it.
    """
    return str(_settings(folder)["peft_type"])


def _settings(folder: Path) -> dict[str, Any]:
    where = str(folder / CONFIG)
    with safefile.open_untrusted(folder, CONFIG) as descriptor:
        settings = safefile.strict_json(safefile.read_text(descriptor, where), where)
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise CheckpointFormatError(f"{where}: names no peft_type; expected the configuration of an adapter")
    return settings


def _read(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder that peft wrote, read as untrusted files."""
    settings = _settings(folder)
    if settings["peft_type"] != kind:
        raise CheckpointFormatError(f"{folder}: got the type {settings['peft_type']!r}, expected {kind}")
    where = str(folder / WEIGHTS)
    with safefile.open_untrusted(folder, WEIGHTS) as descriptor:
        data = safefile.read_all(descriptor, where, safefile.read_header(descriptor, where))
    return settings, safetensors.torch.load(data)


def _by_layer(tensors: Mapping[str, Tensor], pattern: str, needed: set[str]) -> dict[str, dict[str, Tensor]]:
    """Path -> {what `pattern` captures: tensor}; every name must match."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.+?)\.{pattern}", name.removeprefix(PREFIX))
        if match is None:
            raise CheckpointMismatchError(f"{name}: has no counterpart in MoKA; expected {pattern}")
        layers.setdefault(match[1], {})[match[2]] = tensor
    if incomplete := [path for path, parts in layers.items() if needed - parts.keys()]:
        raise CheckpointMismatchError(
            f"{incomplete[:5]}: factors are missing, expected {sorted(needed)} of each"
        )
    return layers


def _pattern(settings: Mapping[str, Any], field: str, path: str, default: Any) -> Any:
    """The value for a path, by a table of patterns of which only plain names are accepted."""
    for key, value in (settings.get(field) or {}).items():
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise CheckpointMismatchError(
                f"{field}: got the regular expression {key!r}, expected module names"
            )
        if pattern_matches(re.escape(key.removeprefix("^")), path):
            return value
    return default

"""Another number of components: `prune`, `grow`, `reallocate` and `truncate` rebuild an adapter in place.

Components that stay keep their values: what a gate over others cannot hold of their factor alpha goes into B
(to a rounding of `adapter_dtype`). New ones have an update of zero, as after `moka.inject`. The configuration
then lists the shapes of every layer; the adapter can be trained, saved, merged and used by peft like any
other. All functions take a model of `moka.inject` or peft (paths are those within peft's wrapper), and those
that rebuild return path -> components now.

In training, between two steps, since the parameters are new:

    moka.reallocate(model, budget=240)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import algebra
from .branches import form_of
from .config import MokaConfig, pattern_matches
from .errors import ConfigError, NonFiniteError, StateError
from .gates import UNIFORM, at_least_fp32, restrict, scaled_gate
from .init import init_factors_
from .inject import optimizers_of, warn_about_optimizers
from .layers import MokaLinear
from .layout import is_sharded
from .rules import plan_shapes
from .shapes import KronShape, explicit_shapes, split_flat
from .targets import find_targets
from .wrapped import refuse_wrapped

Scores = Mapping[str, Tensor]


class Adapter(NamedTuple):
    """An adapter of a model: its name, the table with its configuration, that as moka's, path -> layer."""

    name: str
    configs: dict[str, Any]
    config: MokaConfig
    layers: dict[str, MokaLinear]


def importance(
    model: nn.Module, adapter_name: str = "default", sensitivity: bool = False
) -> dict[str, Tensor]:
    """Path -> `[r]`: how much each component of a layer matters.

    Args:
        model, adapter_name: which adapter of which model.
        sensitivity: False for the norms `s_i = |alpha_i| |A_i|_F |B_i|_F`; True for `|s_i dL/ds_i|`, what the
            loss would change by without the component, to first order, by the gradients of the last backward.

    Raises:
        StateError: no such adapter, or no gradients.

    Example:
        >>> moka.importance(model)["model.layers.0.self_attn.q_proj"]          # doctest: +SKIP
    """
    layers = find_adapter(model, adapter_name, "moka.importance").layers
    if sensitivity:
        return {path: _sensitivity(path, layer, adapter_name) for path, layer in layers.items()}
    return {p: algebra.importance(algebra.terms(layer, adapter_name)) for p, layer in layers.items()}


def prune(
    model: nn.Module,
    *,
    energy: float | None = None,
    keep: int | None = None,
    elbow: bool = False,
    adapter_name: str = "default",
    scores: Scores | None = None,
) -> dict[str, int]:
    """Removes the components that matter least, over all layers together; each layer keeps at least one.

    Args:
        model, adapter_name: which adapter of which model.
        energy: keep the fewest components with this share of all squared scores (0 to 1); or
        keep: this many, all layers together; or
        elbow: those before the bend of the sorted scores, the point farthest below the line through the ends.
        scores: path -> `[r]`, larger for what should stay; None for the norms of `moka.importance`.

    Raises:
        ConfigError: not exactly one rule, a value out of range, or scores that do not fit the adapter.
        StateError: no such adapter; it is merged, on the meta device or split; or the model is wrapped.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> moka.prune(model, energy=0.99)          # doctest: +SKIP
    """
    adapter = find_adapter(model, adapter_name, "moka.prune")
    if (energy is not None) + (keep is not None) + elbow != 1:
        raise ConfigError(f"prune: got {energy=}, {keep=}, {elbow=}; expected exactly one of them")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy: got {energy!r}, expected a share above 0 and at most 1")
    if keep is not None and (type(keep) is not int or keep < len(adapter.layers)):
        raise ConfigError(f"keep: got {keep!r}, expected an integer of at least {len(adapter.layers)} layers")
    ranked = _ranked(adapter, scores)
    values = torch.tensor([score for _, _, score in ranked], dtype=torch.float64, device="cpu")
    if energy is not None:
        held = values.square().cumsum(0)
        keep = int((held < energy * held[-1]).sum()) + 1
    elif elbow:
        curve = values.sort(descending=True).values
        line = torch.linspace(0.0, 1.0, len(curve), dtype=torch.float64, device="cpu")
        below = torch.lerp(curve[0], curve[-1], line) - curve
        bend = int(below.argmax()) if below.max() > 1e-9 * curve[0] else len(curve)
        keep = len(adapter.layers) + int((values[len(adapter.layers) :] >= curve[bend - 1]).sum())
    kept = _first(adapter, ranked, keep)
    return _rebuild(model, adapter, kept, {}, "moka.prune")


def grow(
    model: nn.Module,
    r: int | Mapping[str, int],
    *,
    adapter_name: str = "default",
    shapes: str | Sequence[Sequence[int]] | None = None,
) -> dict[str, int]:
    """Adds components until a layer has `r`; their update is zero, so the model computes what it did.

    A new gate is the mean of the others. Layers that have as many stay as they are.

    Args:
        model, adapter_name: which adapter of which model.
        r: components of every layer, or module pattern -> components, as in `MokaConfig.r_pattern`.
        shapes: where the new ones come from, as in `MokaConfig.shapes`, those that the layer lacks first; a
            list is repeated. None for what its configuration says.

    Raises:
        ConfigError: a pattern that matches nothing, a number out of range, or shapes that do not fit.
        StateError: as for `moka.prune`.

    Example:
        >>> moka.grow(model, {"v_proj": 16})          # doctest: +SKIP
    """
    adapter = find_adapter(model, adapter_name, "moka.grow")
    wanted = r if isinstance(r, Mapping) else {".*": r}
    for key, count in wanted.items():
        if type(count) is not int or not any(pattern_matches(key, path) for path in adapter.layers):
            raise ConfigError(f"r: got {key!r}: {count!r}, expected the end of a path, and an integer")
    counts = {p: next((n for key, n in wanted.items() if pattern_matches(key, p)), 0) for p in adapter.layers}
    kept = {path: list(range(len(layer.shapes[adapter_name]))) for path, layer in adapter.layers.items()}
    return _rebuild(model, adapter, kept, counts, "moka.grow", spec=shapes)


def reallocate(
    model: nn.Module,
    budget: int,
    *,
    share: float = 0.25,
    adapter_name: str = "default",
    scores: Scores | None = None,
) -> dict[str, int]:
    """Moves components to where they matter: `moka.prune` here and `moka.grow` there, `budget` in all.

    The best `(1 - share) * budget` stay; layers get new ones in proportion to the scores that they kept.

    Args:
        model, adapter_name: which adapter of which model.
        budget: components afterwards, all layers together.
        share: of the budget, for new components (0 to 1).
        scores: as for `moka.prune`.

    Raises:
        ConfigError, StateError, NonFiniteError: as for `moka.prune`.

    Example:
        >>> moka.reallocate(model, budget=240)          # doctest: +SKIP
    """
    adapter = find_adapter(model, adapter_name, "moka.reallocate")
    if type(budget) is not int or not 0 <= share <= 1 or round(budget * (1 - share)) < len(adapter.layers):
        raise ConfigError(f"reallocate: got {budget=}, {share=}; expected to keep one component per layer")
    ranked = _ranked(adapter, scores)
    kept = _first(adapter, ranked, round(budget * (1 - share)))
    total = {path: sum(s for p, i, s in ranked if p == path and i in kept[path]) for path in kept}
    weights = torch.tensor(list(total.values()), dtype=torch.float64, device="cpu")
    weights = weights if weights.any() else torch.ones_like(weights)
    free = budget - sum(map(len, kept.values()))
    # rounding the running total gives each layer its share, and all of them together what is free
    ends = [0, *(free * weights.cumsum(0) / weights.sum()).round().long().tolist()]
    counts = {path: len(kept[path]) + ends[n + 1] - ends[n] for n, path in enumerate(kept)}
    return _rebuild(model, adapter, kept, counts, "moka.reallocate")


def truncate(model: nn.Module, k: int, adapter_name: str = "default") -> dict[str, int]:
    """Keeps the first k components of every layer, with the gates of `MokaConfig.nested`: an adapter that was
    trained so computes what it did at k. Layers that have fewer stay as they are.

    Args:
        model, adapter_name: which adapter of which model.
        k: components.

    Raises:
        ConfigError: k is below 1.
        StateError: as for `moka.prune`.

    Example:
        >>> moka.truncate(model, 4)          # doctest: +SKIP
    """
    adapter = find_adapter(model, adapter_name, "moka.truncate")
    if type(k) is not int or k < 1:
        raise ConfigError(f"k: got {k!r}, expected a positive integer")
    kept = {p: list(range(min(k, len(y.shapes[adapter_name])))) for p, y in adapter.layers.items()}
    return _rebuild(model, adapter, kept, {}, "moka.truncate", restricted=True)


def find_adapter(model: nn.Module, name: str, call: str) -> Adapter:
    """The adapter, once nothing stands against changing it."""
    configs = getattr(model, "moka_config", None) or getattr(model, "peft_config", {})
    if not hasattr(configs.get(name), "shapes"):
        raise StateError(f"MoKA adapter {name!r} does not exist; the model has {list(configs)}")
    refuse_wrapped(model, call)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    config = _core(configs[name])
    found = {target.path: target.module for target in find_targets(inner, config)}
    layers = {p: y for p, y in found.items() if isinstance(y, MokaLinear) and name in y.configs}
    for path, layer in layers.items():
        if name in layer.merged_adapters:
            raise StateError(f"{path}: adapter {name!r} is merged into the base weight; unmerge it first")
        if layer.moka_A[name].is_meta or is_sharded(layer.moka_A[name]):
            raise StateError(f"{path}: adapter {name!r} is on the meta device or split over processes")
    return Adapter(name, configs, config, layers)


def _core(config: Any) -> MokaConfig:
    return config if isinstance(config, MokaConfig) else config.to_moka()


@torch.no_grad()
def _sensitivity(path: str, layer: MokaLinear, name: str) -> Tensor:
    """`s dL/ds = <A_i, dL/dA_i> = <B_i, dL/dB_i>`, as the update is linear in each factor."""
    parameters = layer.moka_A[name], layer.moka_B[name]
    if any(parameter.grad is None for parameter in parameters):
        raise StateError(f"{path}: adapter {name!r} has no gradients; call backward first")
    A, B = (parameter.double() * parameter.grad for parameter in parameters)
    products = split_flat(A, B, layer.shapes[name])
    return torch.stack([(a if len(a) else b).sum().abs() for a, b in products])


def _ranked(adapter: Adapter, scores: Scores | None) -> list[tuple[str, int, float]]:
    """(path, index, score) of all components, the best of each layer first, then by falling score."""
    ranked = []
    for path, layer in adapter.layers.items():
        r = len(layer.shapes[adapter.name])
        if scores is None:
            values = algebra.importance(algebra.terms(layer, adapter.name))
        else:
            values = scores.get(path, torch.empty(0))
        if values.shape != (r,):
            raise ConfigError(f"scores: got {list(values.shape)} for {path}, expected [{r}]")
        if not values.isfinite().all():
            raise NonFiniteError(f"scores: those of {path} hold NaN or infinity; nothing was changed")
        best = int(values.argmax())
        ranked += [(i != best, -score, path, i) for i, score in enumerate(values.tolist())]
    if scores is not None and (unknown := sorted(scores.keys() - adapter.layers.keys())):
        raise ConfigError(f"scores: got {unknown[:5]}, expected the paths {list(adapter.layers)}")
    ranked.sort(key=lambda entry: entry[:2])
    return [(path, i, -score) for _, score, path, i in ranked]


def _first(adapter: Adapter, ranked: list[tuple[str, int, float]], count: Any) -> dict[str, list[int]]:
    """Path -> its components among the first `count`, and the best one in any case; in their old order."""
    kept: dict[str, list[int]] = {path: [] for path in adapter.layers}
    for path, i, _ in ranked[: max(count, len(kept))]:
        kept[path].append(i)
    return {path: sorted(indices) for path, indices in kept.items()}


def _rebuild(
    model: nn.Module,
    adapter: Adapter,
    kept: Mapping[str, list[int]],
    counts: Mapping[str, int],
    call: str,
    spec: Any = None,
    restricted: bool = False,
) -> dict[str, int]:
    """Keeps components of each layer and adds some up to `counts`: in all layers or, after an error, none."""
    name, configs, config, layers = adapter
    dense = all(layer.forms[name].dense for layer in layers.values())
    # a load splits the base by the components of the file, which must be those that it was split by
    if not dense or config.tie or config.gate not in UNIFORM or config.init == "residual":
        raise ConfigError(
            f"{call}: adapter {name!r} has shapes={config.shapes!r}, gate={config.gate!r}, "
            f"tie={config.tie!r}, init={config.init!r}; expected dense factors that are not shared, "
            f"a gate of {UNIFORM}, and another start than 'residual'"
        )
    shapes, states = {}, {}
    for path, layer in layers.items():
        old = [layer.shapes[name][i] for i in kept[path]]
        wanted = config.shapes_for(path) if spec is None else spec
        shapes[path] = [*old, *_lacking(path, layer, old, counts.get(path, 0), wanted, config.strict)]
    before = configs[name]
    after = replace(before, shapes=explicit_shapes(shapes), r_pattern={})
    for path, layer in layers.items():
        states[path] = _changed(layer, name, _core(after), kept[path], shapes[path], restricted)
    optimizers = optimizers_of(model)
    with contextlib.ExitStack() as undo:
        undo.callback(configs.__setitem__, name, before)
        configs[name] = after
        for path, layer in layers.items():
            before_it = {table: getattr(layer, table)[name] for table in states[path]}
            undo.callback(_set_state, layer, name, before_it)
            _set_state(layer, name, states[path])
        undo.pop_all()
    warn_about_optimizers(model, optimizers, call, stacklevel=4)
    return {path: len(shapes[path]) for path in layers}


def _lacking(
    path: str, layer: MokaLinear, old: Sequence[KronShape], r: int, spec: Any, strict: bool
) -> list[KronShape]:
    """Shapes for `r - len(old)` new components: what a plan for r has beyond the old ones."""
    if r <= len(old):
        return []
    if not isinstance(spec, str):
        spec = (list(spec) * math.ceil(r / len(spec)))[:r]
    planned = plan_shapes(layer.out_features, layer.in_features, r, spec, strict, path)
    return list((Counter(planned) - Counter(old)).elements())[: r - len(old)]


@torch.no_grad()
def _changed(
    layer: MokaLinear,
    name: str,
    config: MokaConfig,
    kept: list[int],
    shapes: list[KronShape],
    restricted: bool,
) -> dict[str, Any]:
    """Table -> entry of a layer that keeps some components and has new ones after them, up to `shapes`."""
    r, new = len(shapes), shapes[len(kept) :]
    scale, heat = config.scale_for(r), config.gate_temperature
    alpha = layer.alpha(name)
    if restricted:
        alpha = restrict(config.gate, alpha, len(kept), config.scale_for(len(kept)))
    alpha = alpha[kept]
    logits, state = None, {"shapes": tuple(shapes), "configs": config, "scaling": scale}
    state["forms"] = form_of(shapes)
    if name in layer.moka_gate:
        logits, fill = at_least_fp32(layer.moka_gate[name])[kept], 0.0
        if config.gate == "linear":
            logits, fill = alpha / scale, 1.0 / r
        elif config.gate == "softmax":  # the mean of the gates
            fill = heat * ((logits / heat).logsumexp(0).item() - math.log(len(kept)))
        logits = torch.cat([logits, logits.new_full((len(new),), fill)])
        state["moka_gate"] = nn.Parameter(logits, layer.moka_gate[name].requires_grad)
    now = scaled_gate(config.gate, logits, scale, r, heat, alpha)[: len(kept)]
    change = torch.where(now == alpha, 1.0, alpha / now)
    if not change.isfinite().all():
        raise StateError(f"gate {config.gate!r} of {name!r}: got {now.tolist()}, expected {alpha.tolist()}")
    parts = split_flat(layer.moka_A[name], layer.moka_B[name], layer.shapes[name])
    kept_parts = zip((parts[i] for i in kept), change, strict=True)
    pieces = [(A, B * c) if len(B) else (A * c, B) for (A, B), c in kept_parts]
    sizes = sum(s.a_numel for s in new), sum(s.b_numel for s in new)
    fresh = [layer.moka_A[name].new_empty(size) for size in sizes]
    init_factors_(fresh[0], fresh[1], new, config.init)
    for side, table in enumerate(("moka_A", "moka_B")):
        flat = torch.cat([*(piece[side] for piece in pieces), fresh[side]])
        state[table] = nn.Parameter(flat, getattr(layer, table)[name].requires_grad)
    return state


def _set_state(layer: MokaLinear, name: str, state: dict[str, Any]) -> None:
    for table, entry in state.items():
        getattr(layer, table)[name] = entry

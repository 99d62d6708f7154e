"""Which layers a configuration selects in a model, and with which component shapes; changes nothing."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .bases import NF4Linear, base_kind, is_linear4bit
from .config import MokaConfig, pattern_matches
from .errors import ConfigError, InjectionError
from .gates import TOPK
from .layers import MokaLinear
from .rules import plan_shapes
from .shapes import KronShape


@dataclass(frozen=True)
class Target:
    """A layer that a configuration selects.

    Attributes:
        path: where it is; `aliases` are the other paths that reach the same module.
        module: the layer, or the `MokaLinear` that adapts it already.
        shapes: of its components.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module
    shapes: tuple[KronShape, ...]

    @property
    def out_features(self) -> int:
        """N of the layer."""
        return self.shapes[0].ma * self.shapes[0].mb

    @property
    def in_features(self) -> int:
        """K of the layer."""
        return self.shapes[0].na * self.shapes[0].nb


def find_targets(model: nn.Module, config: MokaConfig) -> list[Target]:
    """The layers to adapt, in the model's order; a shared layer is listed once.

    Raises:
        InjectionError: nothing matched, one of several patterns matched nothing (strict), or an unsupported
            layer.
        ConfigError: shapes that do not fit a layer, or a gate that takes more components than it has.
    """
    modules = dict(walk(model))
    kept = _excluded(list(modules), config)
    paths = _layers_subset(kept, config)
    if config.target_modules == "all-linear":
        output = output_embedding(model)
        linear = [path for path in modules if _is_linear(modules[path]) and modules[path] is not output]
        chosen = set(paths)
        selected = [path for path in linear if path in chosen]
        if not selected:
            reason = _left_out(linear, kept, config) or f"{type(model).__name__} has no linear layer to adapt"
            raise InjectionError(f"target_modules='all-linear': {reason}")
    else:

        def left_out(pattern: str | Sequence[str]) -> str | None:
            return _left_out([path for path in modules if matches(path, pattern)], kept, config)

        selected = _select(paths, "target_modules", config.target_modules, config.strict, left_out)
    targets: dict[nn.Module, Target] = {}
    for path in selected:
        module = modules[path]
        if module in targets:
            continue
        base = module.base_layer if isinstance(module, MokaLinear) else module
        if base_kind(base) is None:
            raise InjectionError(
                f"{path}: cannot adapt a {type(base).__module__}.{type(base).__name__}; expected nn.Linear, "
                f"bitsandbytes Linear4bit or NF4Linear. Change target_modules, or name it in exclude_modules"
            )
        sizes = int(base.out_features), int(base.in_features)  # pyright: ignore[reportArgumentType]
        shapes = plan_shapes(*sizes, config.r_for(path), config.shapes_for(path), config.strict, path)
        if config.gate == "matrix" and len({shape.expanded for shape in shapes}) > 1:
            raise ConfigError(
                f"{path}: gate='matrix' pairs every left factor with every right one, so all components need "
                f"one shape (shapes='even' or 'lora'), got {[str(s) for s in shapes[:10]]}"
            )
        topk = TOPK.fullmatch(config.gate)
        if topk and int(topk[1]) > len(shapes):
            raise ConfigError(
                f"{path}: gate={config.gate!r} takes the {topk[1]} largest logits, and the layer has "
                f"{len(shapes)} components; expected at most {len(shapes)} of them. Lower it, or raise r"
            )
        aliases = tuple(p for p, m in modules.items() if m is module and p != path)
        most = min(shapes[0].a_numel, shapes[0].b_numel)
        if config.init == "svd" and len(shapes) > most:
            raise ConfigError(
                f"{path}: r={len(shapes)} with init='svd', but its weight has {most} components of shape "
                f"{shapes[0]}; the others would be zero and stay so. Choose r at most {most}, or r_pattern"
            )
        targets[module] = Target(path, aliases, module, shapes)
    used = [target.path for target in targets.values()]
    for name, keys in (("r_pattern", config.r_pattern), ("shapes", config.shapes)):
        for key in keys if isinstance(keys, dict) else ():
            if not any(pattern_matches(key, path) for path in used):
                _refuse(no_match(f"{name} key {key!r}", key, used, regex=False), config.strict)
    return list(targets.values())


def find_modules_to_save(model: nn.Module, config: MokaConfig, targets: Sequence[Target]) -> list[nn.Module]:
    """The modules that `config.modules_to_save` trains in full.

    Raises:
        InjectionError: a name matches nothing, or a module that is quantized or (in part) a target too.
    """
    modules = dict(walk(model))
    found: dict[nn.Module, str] = {}
    for path in _select(list(modules), "modules_to_save", config.modules_to_save, config.strict):
        found.setdefault(modules[path], path)
    for module, path in found.items():
        inside = {id(m) for m in module.modules()}
        clash = next((t.path for t in targets if id(t.module) in inside), None)
        if clash is not None:
            raise InjectionError(
                f"modules_to_save: {path} contains {clash}, which target_modules adapts; choose one"
            )
        if any(isinstance(m, (MokaLinear, NF4Linear)) or is_linear4bit(m) for m in module.modules()):
            raise InjectionError(
                f"modules_to_save: {path} holds 4-bit or adapted weights, which cannot be trained in full"
            )
    return list(found)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every path and module below `module`, shared ones under each path; what adapters put there (also
    peft's trained copies, which have the attribute as well) is not entered."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
            if not isinstance(child, MokaLinear) and not hasattr(child, "original_module"):
                yield from walk(child, f"{prefix}{name}.")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that gives a transformers model's logits; None for other models."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (MokaLinear, NF4Linear, nn.Linear))


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Whether a path ends in one of several names, or matches one regular expression as a whole."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == name or path.endswith("." + name) for name in patterns)


def no_match(what: str, pattern: str, paths: Sequence[str], regex: bool) -> str:
    """The message for a name that ends no path, or an expression (`regex`) that matches none as a whole."""
    rule = ": a string is a regular expression for the whole path" if regex else ""
    flags = pattern.startswith("(?")  # which stand at the start of an expression alone
    if regex and not flags and (ends := [path for path in paths if pattern_matches(pattern, path)]):
        literal = any(matches(path, [pattern]) for path in ends)
        fix = f"the list {[pattern]}" if literal else repr(rf".*\.(?:{pattern})")
        return f"{what} matches no module{rule}, and this one is but the end of {ends[0]!r}; use {fix}"
    names = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()})
    pool = [*paths, *names] if "." in pattern else names
    nearest = difflib.get_close_matches(pattern, pool, n=5, cutoff=0.0)
    hint = ", names go into a list" if regex else ""
    return f"{what} matches no module{rule}{hint}; the nearest names are {nearest}"


def _select(
    paths: Sequence[str],
    field: str,
    patterns: str | Sequence[str],
    strict: bool,
    left_out: Callable[[str | Sequence[str]], str | None] = lambda pattern: None,
) -> list[str]:
    """The paths that any pattern matches, in order; each pattern must match something. If one does not since
    another field leaves that out, `left_out` says so."""
    for pattern in [patterns] if isinstance(patterns, str) else [(name,) for name in patterns]:
        if not any(matches(path, pattern) for path in paths):
            regex = isinstance(pattern, str)
            shown = pattern if regex else pattern[0]
            others = not regex and any(matches(path, patterns) for path in paths)
            what = f"{field}: {shown!r}"
            reason = left_out(pattern)
            message = f"{what}: {reason}" if reason else no_match(what, shown, paths, regex)
            _refuse(message, strict or not others)
    return [path for path in paths if matches(path, patterns)]


def _refuse(message: str, strict: bool) -> None:
    if strict:
        raise InjectionError(message)
    warnings.warn(message, stacklevel=4)


def _left_out(found: Sequence[str], kept: Sequence[str], config: MokaConfig) -> str | None:
    """Which field leaves out all of `found`, where `kept` is what `exclude_modules` leaves; None if none is
    found."""
    if not found:
        return None
    if set(kept).isdisjoint(found):
        field, value, fix = "exclude_modules", config.exclude_modules, "exclude less"
    else:
        found = [path for path in found if path in kept]
        field, value, fix = "layers_to_transform", config.layers_to_transform, "choose other layers"
    return (
        f"{field}={value!r} leaves out all that it matches, {len(found)} in number, such as {found[0]!r}; "
        f"{fix}, or target other modules"
    )


def _excluded(paths: list[str], config: MokaConfig) -> list[str]:
    out = (
        set(_select(paths, "exclude_modules", config.exclude_modules, config.strict))
        if config.exclude_modules
        else ()
    )
    return [path for path in paths if path not in out]


def _layers_subset(paths: list[str], config: MokaConfig) -> list[str]:
    """The paths whose first number is in `layers_to_transform`."""
    wanted = config.layers_to_transform
    if wanted is None:
        return paths
    index = {path: int(m[1]) for path in paths if (m := re.search(r"(?:^|\.)(\d+)(?:\.|$)", path))}
    missing = sorted(set(wanted) - set(index.values()))  # pyright: ignore[reportArgumentType]
    if missing and (config.strict or len(missing) == len(set(wanted))):  # pyright: ignore[reportArgumentType]
        raise InjectionError(
            f"layers_to_transform: the model has no layer {missing}; it has {sorted(set(index.values()))}"
        )
    return [path for path in paths if index.get(path) in wanted]  # pyright: ignore[reportOperatorIssue]

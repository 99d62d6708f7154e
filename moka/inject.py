"""`inject` puts adapters into a model in place, `eject` takes them out, `disabled` switches them off."""

from __future__ import annotations

import contextlib
import gc
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import nf4
from .bases import check_into, guard_save_pretrained, is_linear4bit
from .config import MokaConfig
from .errors import ConfigError, StateError
from .layers import MokaLinear
from .layout import refuse_sharded
from .quantize import dequantize, forget_quantization
from .targets import find_modules_to_save, find_targets
from .trained_copy import TrainedCopy
from .wrapped import refuse_wrapped, unwrapped

ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass
class BaseState:
    """What `inject` changed in the base model, for `eject` to put back."""

    trainable: list[str] = field(default_factory=list)  # names of the parameters that had requires_grad
    repacking: list[Any] = field(default_factory=list)  # Linear4bit layers that repack in eval mode
    input_grads: bool = False  # the embeddings were made to require gradients


def inject(
    model: nn.Module, config: MokaConfig, adapter_name: str = "default", initialize: bool = True
) -> nn.Module:
    """Adapts the layers that `config` selects, in place; the base is frozen and the output stays as it was.

    It stays to the bit for `nn.Linear` and `NF4Linear`. An adapted `Linear4bit` runs on moka's kernels, which
    add up in another order than those of bitsandbytes, so there it stays to a rounding error (and to the bit
    in `disabled`). An error leaves the model as it was. A second adapter, under another name, is added beside
    the first and becomes the active one; `set_adapter` activates several.

    Args:
        model: any module with `nn.Linear`, bitsandbytes `Linear4bit` or `moka.layers.NF4Linear` layers.
        config: what to adapt and how.
        adapter_name: letters, digits, `_` and `-`, at most 64.
        initialize: False spares a start that is computed from the base weights, for an adapter that is about
            to be loaded.

    Returns:
        The same model.

    Raises:
        InjectionError: a pattern matches nothing, or matches a layer that cannot be adapted.
        ConfigError: a shape does not fit its layer, a prime dimension (strict), a bad adapter name, or a
            model or configuration of another type.
        StateError: the name is taken, or the model is compiled, sharded or repacked already.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = inject(model, MokaConfig(target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1290
    """
    check_model(model, "moka.inject(model, config)")
    root: Any = model  # nn.Module declares no attributes but tensors and modules
    if not isinstance(config, MokaConfig):
        raise ConfigError(
            f"config: got a {type(config).__module__}.{type(config).__name__}, expected a moka.MokaConfig; "
            f"those of peft go to peft.get_peft_model"
        )
    check_adapter_name(adapter_name)
    configs: dict[str, MokaConfig] = getattr(model, "moka_config", {})
    if adapter_name in configs:
        raise StateError(
            f"adapter {adapter_name!r} exists already; choose another name or call moka.eject first"
        )
    require_adapters(model, [], "add further ones with peft's own functions")
    refuse_wrapped(model)
    targets = find_targets(model, config)
    copies = find_modules_to_save(model, config, targets)
    check_linear4bit(model)
    optimizers = optimizers_of(model)

    layers = [t.module if isinstance(t.module, MokaLinear) else MokaLinear(t.module) for t in targets]
    trained = [m if isinstance(m, TrainedCopy) else TrainedCopy(m) for m in copies]
    with contextlib.ExitStack() as undo:  # unwinds on any error, KeyboardInterrupt included
        if not configs:
            undo.callback(_restore_base, model)
            _prepare_base(model)
        undo.callback(setattr, model, "moka_config", configs)
        root.moka_config = {**configs, adapter_name: config}
        undo.callback(set_adapter, model, active_adapters(model))
        for layer, target in zip(layers, targets, strict=True):
            undo.callback(layer.delete_adapter, adapter_name)
            layer.add_adapter(adapter_name, config, target.shapes, initialize)
        tie(layers, adapter_name)
        for copy in trained:
            undo.callback(copy.delete_adapter, adapter_name)
            copy.add_adapter(adapter_name)
        pairs = [*zip((t.module for t in targets), layers, strict=True), *zip(copies, trained, strict=True)]
        new = {module: wrapper for module, wrapper in pairs if wrapper is not module}
        undo.callback(_replace, model, {wrapper: module for module, wrapper in new.items()})
        _replace(model, new)
        set_adapter(model, adapter_name)
        undo.pop_all()
    warn_about_optimizers(model, optimizers, "moka.inject")
    return model


def check_model(model: object, call: str) -> None:
    """Accepts modules alone; `call` shows the order of the arguments, which are easily exchanged.

    Raises:
        ConfigError: with that order.
    """
    if not isinstance(model, nn.Module):
        kind = type(model)
        raise ConfigError(
            f"model: got a {kind.__module__}.{kind.__qualname__}, expected a torch.nn.Module as the first "
            f"argument: {call}"
        )


def check_adapter_name(name: str) -> None:
    """Accepts names that can be part of a path and of a parameter's name.

    Raises:
        ConfigError: with the rule.
    """
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise ConfigError(f"adapter_name: got {str(name)[:80]!r}, expected {ADAPTER_NAME.pattern}")


def adapter_layers(model: nn.Module) -> dict[str, MokaLinear]:
    """Path -> adapted layer; a shared layer is listed once, under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MokaLinear)}


def holds_adapters_of_peft(model: nn.Module) -> bool:
    """Whether the model was adapted by peft's call, so that its adapters are peft's to train and to save."""
    return not getattr(unwrapped(model), "moka_config", {}) and bool(adapter_layers(model))


def require_adapters(model: nn.Module, names: Iterable[str], with_peft: str) -> None:
    """Every name must be an adapter of `moka.inject`.

    Args:
        with_peft: what to do with a model that peft adapted.

    Raises:
        StateError: naming the adapter and those that the model has.
    """
    known = list(getattr(unwrapped(model), "moka_config", {}))
    if holds_adapters_of_peft(model):
        raise StateError(f"the model holds adapters of peft; {with_peft}")
    for name in names:
        if name not in known:
            raise StateError(f"adapter {name!r} does not exist; the model has {known}")


def saved_modules(model: nn.Module) -> dict[str, TrainedCopy]:
    """Path -> module that an adapter trains in full (`modules_to_save`)."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedCopy)}


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters in use, in the order in which they were activated."""
    return list(dict.fromkeys(name for wrapper in _wrappers(model) for name in wrapper.active_adapters))


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes exactly these adapters active and trainable; several are added up.

    Raises:
        StateError: a name is unknown, or a merged adapter would be switched off.
    """
    names = [names] if isinstance(names, str) else list(names)
    require_adapters(model, names, "choose with model.set_adapter")
    wrappers = _wrappers(model)
    for name in {n for w in wrappers if isinstance(w, MokaLinear) for n in w.merged_adapters} - set(names):
        raise StateError(f"adapter {name!r} is merged into the base weights; unmerge it first")
    for wrapper in wrappers:
        wrapper.set_adapter(names)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base, bit for bit; blocks nest, and any exception restores the state
    before.

    Raises:
        StateError: an adapter is merged, so that the base weights hold its update.

    Example:
        >>> with moka.disabled(model):          # doctest: +SKIP
        ...     reference = model(input_ids).logits
    """
    merged = sorted({name for layer in adapter_layers(model).values() for name in layer.merged_adapters})
    if merged:
        raise StateError(f"adapters {merged} are merged into the base weights; unmerge them first")
    before = {wrapper: wrapper.disable_adapters for wrapper in _wrappers(model)}
    try:
        for wrapper in before:
            wrapper.disable_adapters = True
        yield model
    finally:
        for wrapper, state in before.items():
            wrapper.disable_adapters = state


def eject(model: nn.Module, into: torch.dtype | None = None) -> nn.Module:
    """Takes all adapters out: the original module objects return, and what was trainable before is so again.

    A merged update, `W' = W + delta`, stays in the weights, as do the trained copies of `modules_to_save`.

    Args:
        model: with adapters from `moka.inject`, merged or not.
        into: `torch.float32`, `bfloat16` or `float16`: the whole model gets this dtype, 4-bit layers without
            an adapter included, so that `save_pretrained` writes a plain model. None leaves every layer as it
            is, which runs only if the update was merged into the dtype of the others.

    Returns:
        The same model.

    Raises:
        StateError: the model holds no adapter, or with `into`, it is sharded.
        ConfigError: `into` is another dtype.

    Example:
        >>> moka.merge(model, into=torch.bfloat16)                               # doctest: +SKIP
        >>> moka.eject(model, into=torch.bfloat16).save_pretrained("merged")     # doctest: +SKIP
    """
    require_adapters(model, [], "take them out with model.unload or merge_and_unload")
    if not getattr(model, "moka_config", {}):
        raise StateError("the model holds no adapter; nothing to eject")
    check_into(into)
    if into is not None:
        refuse_sharded(model.parameters())
    merged = _take_out(model)  # holds none of the original layers, whose memory `dequantize` may need
    if into is not None:
        dequantize(model, into)
    elif merged:
        forget_quantization(model)
        _warn_about_dtypes(model, merged)
    return model


def _take_out(model: nn.Module) -> list[nn.Module]:
    """Puts the base in the place of every adapter; returns the layers that hold a merged update."""
    layers = adapter_layers(model).values()
    merged = [layer.get_base_layer() for layer in layers if layer.merged_adapters]
    bases: dict[nn.Module, nn.Module] = {layer: layer.get_base_layer() for layer in layers}
    for copy in saved_modules(model).values():
        bases[copy] = copy.current().requires_grad_(False) if merged else copy.original_module
    _replace(model, bases)
    _restore_base(model)
    return merged


def _warn_about_dtypes(model: nn.Module, merged: Iterable[nn.Module]) -> None:
    """Says if no other layer has the dtype that was merged into: torch does not multiply across dtypes."""
    held = {parameter for layer in merged for parameter in layer.parameters()}
    new = {parameter.dtype for parameter in held if parameter.is_floating_point()}
    rest = {p.dtype for p in model.parameters() if p.is_floating_point() and p not in held}
    if rest and not new <= rest:
        warnings.warn(
            f"the merged layers are in {new}, the rest of the model in {rest}, so that it may not run; give "
            f"moka.eject the into of moka.merge, for one dtype throughout",
            stacklevel=3,
        )


def tie(layers: Iterable[MokaLinear], name: str) -> None:
    """Lets the layers whose components agree share one parameter for the factors that `MokaConfig.tie` names.

    They share it under every operation on modules that keeps parameters, such as `model.to`.
    """
    shared: dict[tuple, nn.Parameter] = {}
    for layer in layers:
        if (key := tied_by(layer, name)) is not None:
            table = getattr(layer, key[0])
            table[name] = shared.setdefault((*key, table[name].device), table[name])


def tied_by(layer: MokaLinear, name: str) -> tuple | None:
    """The table with an adapter's shared factors, and what layers that share them have in common."""
    side = layer.configs[name].tie
    return side and (f"moka_{side}", *(shape.side(side) for shape in layer.shapes[name]))  # pyright: ignore


def _wrappers(model: nn.Module) -> list[MokaLinear | TrainedCopy]:
    return [module for module in model.modules() if isinstance(module, (MokaLinear, TrainedCopy))]


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Puts `new[module]` wherever `module` hangs in the model, but not inside the replacement itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new and new[child] is not parent:
                parent._modules[name] = new[child]


def _prepare_base(model: Any) -> None:
    """Freezes the base and notes for `_restore_base` what was changed."""
    state = model._moka_base = BaseState()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.trainable.append(name)
            parameter.requires_grad_(False)
    state.repacking = stop_repacking(model)
    guard_save_pretrained(model)
    if hasattr(model, "_hf_peft_config_loaded"):
        # transformers trains a quantized model only if it is told of an adapter. It then also makes the
        # embeddings' output require gradients when gradient checkpointing is switched on, without which
        # layers that are checkpointed with use_reentrant=True would get none; if that was earlier, it is up
        # to us.
        model._hf_peft_config_loaded = True
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if checkpointing and not hasattr(model, "_require_grads_hook"):
            state.input_grads = True
            model.enable_input_require_grads()


def stop_repacking(model: nn.Module) -> list[Any]:
    """Keeps bitsandbytes layers as they are stored; returns those that were changed.

    On a CPU with AVX512-BF16, such a layer called in eval mode without gradients rearranges its weight for
    good, and no gradient passes through it from then on, not even in training mode: any layer of the model,
    adapted or not.
    """
    changed: list[Any] = [
        module
        for module in model.modules()
        if is_linear4bit(module) and getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    for module in changed:
        module.support_avx512bf16_for_cpu = False
    return changed


def _restore_base(model: Any) -> None:
    del model.moka_config
    state: BaseState = model._moka_base
    for name in state.trainable:
        model.get_parameter(name).requires_grad_(True)
    for module in state.repacking:
        module.support_avx512bf16_for_cpu = True
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
    if state.input_grads:
        model.disable_input_require_grads()
    del model._moka_base
    guard_save_pretrained(model)


def check_linear4bit(model: Any) -> None:
    """Every 4-bit layer of bitsandbytes passes gradients on, adapted or not, so each must be readable."""
    for path, module in model.named_modules():
        if is_linear4bit(module) and module.weight.device.type != "meta":
            try:
                nf4.from_bitsandbytes(module)
            except StateError as error:
                raise StateError(f"{path}: {error}") from error


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The live optimizers that hold a parameter of the model; only the garbage collector knows them."""
    own = {id(parameter) for parameter in model.parameters()}
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return [o for o in optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]


def warn_about_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], call: str, stacklevel: int = 3
) -> None:
    """Says which optimizers have lost their parameters to a call; `stacklevel` leads to its caller."""
    missing = sum(1 for parameter in model.parameters() if parameter.requires_grad)
    for optimizer in optimizers:
        warnings.warn(
            f"{type(optimizer).__name__} was built before {call} and does not know the {missing} "
            f"adapter parameters; build it again, or nothing will be trained",
            stacklevel=stacklevel,
        )

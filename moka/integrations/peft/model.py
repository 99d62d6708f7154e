"""`MokaModel`: what peft calls to put MoKA adapters into a model, save, merge and mix them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from ...errors import CheckpointMismatchError, ConfigError, StateError
from ...inject import adapter_layers, check_adapter_name, check_linear4bit, stop_repacking, tie, tied_by
from ...merge import merge_layers, unmerge
from ...mixed import mixed_batch
from ...quantize import dequantize
from ...rows import Rows
from ...rules import plan_shapes
from ...targets import find_modules_to_save, find_targets, matches, walk
from ...weighted import combination_config, combine_
from .config import MokaConfig
from .layer import MokaPeftLinear

HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")


class MokaModel(BaseTuner):
    """The model with MoKA layers in it; made by `peft.get_peft_model` for a `MokaConfig`.

    Everything is checked before the model is changed, under the rules of `moka.inject`.
    """

    prefix = "moka_"
    tuner_layer_cls = MokaPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to the model.

        Raises:
            ConfigError: a bad adapter name, or shapes that do not fit.
            InjectionError: a pattern matches nothing, or matches a layer that cannot be adapted.
            StateError: the model holds adapters of `moka.inject`, or repacked layers.
        """
        check_adapter_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapted = [layer for layer in adapter_layers(model).values() if adapter_name in layer.configs]
        tie(adapted, adapter_name)

    def _prepare_adapter_config(self, peft_config: MokaConfig, model_config: dict) -> MokaConfig:  # pyright: ignore
        peft_config = super()._prepare_adapter_config(peft_config, model_config)  # pyright: ignore
        if peft_config.target_modules == "all-linear":
            # peft's own reading of it does not know NF4 layers
            heads = SEQ_CLS_HEAD_NAMES if peft_config.task_type == TaskType.SEQ_CLS else ()
            targets = find_targets(self.model, peft_config.to_moka())
            peft_config.target_modules = [t.path for t in targets if not matches(t.path, heads)]
        if peft_config.modules_to_save:
            # peft compares ends of strings, so that "norm" would select every input_layernorm as well
            paths = [path for path, _ in walk(self.model)]
            found = {n: [p for p in paths if matches(p, [n])] for n in peft_config.modules_to_save}
            # peft adds the names of heads, of which the model has one at most
            lists = (found[n] or [n] for n in found if found[n] or n not in HEADS)
            peft_config.modules_to_save = list(dict.fromkeys(path for each in lists for path in each))
        return peft_config

    def _prepare_model(self, peft_config: MokaConfig, model: Any) -> None:  # pyright: ignore
        if getattr(model, "moka_config", {}):
            raise StateError("the model holds adapters of moka.inject; call moka.eject first")
        check_linear4bit(model)
        config = peft_config.to_moka()
        targets = find_targets(model, config)
        find_modules_to_save(model, config, ())
        self._selected = {target.path: target.aliases for target in targets}
        stop_repacking(model)

    def _check_target_module_exists(self, peft_config: MokaConfig, key: str) -> Any:  # pyright: ignore
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else key in self._selected

    def _create_and_replace(
        self,
        peft_config: MokaConfig,  # pyright: ignore[reportIncompatibleMethodOverride]
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config, adapted = peft_config.to_moka(), isinstance(target, MokaPeftLinear)
        layer = target if adapted else MokaPeftLinear(target, self._selected.get(current_key, ()))
        shapes = plan_shapes(
            layer.out_features,
            layer.in_features,
            config.r_for(current_key),
            config.shapes_for(current_key),
            config.strict,
            current_key,
        )
        layer.add_adapter(adapter_name, config, shapes)
        if not adapted:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        setattr(parent, child_name, new_module)
        for path in getattr(child, "aliases", getattr(new_module, "aliases", ())):
            owner, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(owner), name, new_module)

    # -- saving and loading -------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(*args, **kwargs)
        # a side whose factors are all identities has no entries, and no place in the file
        return {name: tensor for name, tensor in state.items() if tensor.numel()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected: dict[str, Tensor] = {}
        for path, layer in adapter_layers(model).items():
            for table in layer.adapter_layer_names:
                if adapter_name in (parameters := getattr(layer, table)):
                    expected[f"{path}.{table}.{adapter_name}"] = parameters[adapter_name]
        state |= {name: torch.empty(0) for name, tensor in expected.items() if not tensor.numel()}
        # peft would load what there is and say little or nothing
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if f".{cls.prefix}" in name and name not in expected]
        if missing or unexpected:
            raise CheckpointMismatchError(
                f"the adapter file does not fit this model: {len(missing)} tensors are missing "
                f"({missing[:5]}), {len(unexpected)} unexpected ({unexpected[:5]}); load it into the model "
                f"that it was trained on"
            )
        # layers that share a parameter must share the one that low_cpu_mem_usage puts in its place
        shared: dict[tuple, str] = {}
        for path, layer in adapter_layers(model).items():
            key = tied_by(layer, adapter_name) if adapter_name in layer.configs else None
            if key is not None:
                name = f"{path}.{key[0]}.{adapter_name}"
                source = shared.setdefault(key, name)
                if not torch.equal(state[name], state[source]):
                    raise CheckpointMismatchError(f"{name} differs from {source}, but tie={config.tie!r}")
                if source == name:
                    state[name] = nn.Parameter(state[name], requires_grad=expected[name].requires_grad)
                state[name] = state[source]
        return state

    # -- merging ------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        into: torch.dtype | None = None,
        force: bool = False,
    ) -> None:
        """`moka.merge`: into every layer or, on any error, into none.

        Args:
            adapter_names: None for the active ones.
            safe_merge: accepted for peft; non-finite updates are always refused.
            into, force: as for `moka.merge`.

        Raises:
            MergeError: a 4-bit weight would lose more than a quarter of its update.
            StateError, NonFiniteError: as for `moka.merge`.
        """
        self._check_merge_allowed()
        names = self.active_adapters if adapter_names is None else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise StateError(f"adapters {unknown} do not exist; the model has {list(self.peft_config)}")
        merge_layers(adapter_layers(self.model), sorted(names), into, force)

    def unmerge_adapter(self) -> None:
        """`moka.unmerge`: the original base layers return, bit for bit."""
        unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: torch.dtype | None = None,
        force: bool = False,
    ) -> Any:
        """The plain model with the update in its weights.

        Args:
            progressbar, safe_merge: as for peft.
            adapter_names: None for the active ones.
            into: `torch.float32`, `bfloat16` or `float16`: the whole model gets this dtype, 4-bit layers
                included. None keeps the kind of each layer, under the rule of `moka.merge` for 4 bits.
            force: as for `moka.merge`.

        Raises:
            MergeError: a 4-bit weight would lose more than a quarter of its update; pass `into`.
        """
        self.merge_adapter(adapter_names, into=into, force=force)
        model: Any = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if into is not None:
            dequantize(model, into)
        return model

    # -- several adapters ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies `adapter_names=[...]`; peft calls this around the model's forward and generate."""
        names = kwargs.get("adapter_names")
        if kwargs.get("alora_offsets") is not None:
            raise ConfigError("alora_offsets: MoKA has no invocation tokens; leave it out")
        if names is None:
            yield
            return
        config = kwargs.get("generation_config")
        repeats = max(
            kwargs.get(key) or getattr(config, key, None) or 1
            for key in ("num_beams", "num_return_sequences")
        )
        wrappers = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        with contextlib.ExitStack() as stack:
            for wrapper in wrappers:
                if any(name in wrapper._adapters for name in names):
                    hook = partial(_name_rows, names=names, repeats=repeats)
                    handle = wrapper.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.enter_context(mixed_batch(self.model, names, repeats))
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Adds the adapter `sum_k weights[k] * adapters[k]`, exactly.

        A sum of mixtures is a mixture: it has the components of all, and a "linear" gate that starts at the
        weight times the old gate of each. It can be trained, saved and merged like any other.

        Args:
            adapters: names of adapters of this model.
            weights: one finite factor for each.
            adapter_name: of the new one, which is not active yet.
            combination_type: "linear" or "cat", which mean the same here.

        Raises:
            ConfigError: unknown names or combination, or an adapter with `modules_to_save`, which has no sum.
        """
        if combination_type not in ("linear", "cat"):
            raise ConfigError(
                f"combination_type: got {combination_type!r}, expected 'linear' or 'cat': the sum is exact"
            )
        copied = [
            name
            for name in adapters
            for module in self.model.modules()
            if isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters
        ]
        if copied:
            raise ConfigError(
                f"adapters {sorted(set(copied))} train modules in full, which cannot be added up"
            )
        if adapter_name in self.peft_config:
            raise StateError(f"adapter {adapter_name!r} exists already; choose another name")
        layers = adapter_layers(self.model)
        config = combination_config(layers, adapters, weights)
        first: Any = self.peft_config[adapters[0]]
        values = {name: value for name, value in vars(config).items()}
        new = replace(
            first, **{**values, "target_modules": list(config.target_modules), "exclude_modules": None}
        )
        self.peft_config[adapter_name] = new
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        combine_(layers, adapters, weights, adapter_name)


def _name_rows(module: Any, args: Any, kwargs: Any, names: Sequence[str], repeats: int) -> Any:
    """Gives a trained copy of peft the names of its rows."""
    batch = (args[0] if args else next(iter(kwargs.values()))).shape[0]
    each = batch // len(names) if batch in (len(names), len(names) * repeats) else 1
    rows = [name if name in module._adapters else Rows.BASE for name in names for _ in range(each)]
    return args, {**kwargs, "adapter_names": rows}

"""`MokaLinear` as peft's tuner layer: the same layer under the names that peft calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import StateError
from ...layers import MokaLinear
from ...merge import merge_layers, restore


class MokaPeftLinear(MokaLinear, BaseTunerLayer):  # peft looks for "Linear" in the name
    """A `MokaLinear` that peft can switch, merge and save.

    Args:
        base_layer: the layer to adapt.
        aliases: further paths in the model that reach it.
    """

    def __init__(self, base_layer: nn.Module, aliases: Sequence[str] = ()) -> None:
        super().__init__(base_layer)
        self.aliases = tuple(aliases)

    # peft keeps the state under these two names, and may list adapters that the layer lacks
    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use, as a list."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @active_adapters.setter
    def active_adapters(self, names: list[str]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._active_adapter = names

    @property
    def disable_adapters(self) -> bool:
        """Whether `forward` calls the base layer alone; set by `enable_adapters`."""
        return self._disable_adapters

    @disable_adapters.setter
    def disable_adapters(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._disable_adapters = value

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:  # pyright: ignore
        """Makes adapters active, and what they train trainable."""
        BaseTunerLayer.set_adapter(self, adapter_names, inference_mode)
        self.freeze([] if inference_mode else self.active_adapters)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """peft calls this wherever it has made all parameters of its layers trainable."""
        self.freeze(
            [name for name in self.configs if any(t[name].requires_grad for t in self.tables() if name in t)]
        )

    def delete_adapter(self, adapter_name: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Removes an adapter; another one becomes active if it was.

        Raises:
            StateError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise StateError(f"adapter {adapter_name!r} is merged into the base weight; unmerge it first")
        if adapter_name in self.configs and self.configs[adapter_name].init == "residual":
            self.restore_base()
        BaseTunerLayer.delete_adapter(self, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges into the base weight under the rules of `moka.merge`, unless it is merged already.

        Args:
            safe_merge: accepted for peft; non-finite updates are always refused.
            adapter_names: None for the active ones.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not set(self.merged_adapters) >= {name for name in names if name in self.configs}:
            merge_layers({"this layer": self}, sorted(names), None, force=False)

    def unmerge(self) -> None:
        """Puts the original base layer back."""
        restore([self])

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The dense update `[N, K]`, fp32."""
        return self.delta_weight(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is added to the weight, so a low-rank one can approximate it."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Moves an adapter but keeps its dtype: the operators take fp32 factors beside any base."""
        for table in self.tables():
            if adapter_name in table and not table[adapter_name].is_meta:
                parameter = table[adapter_name]
                parameter.data = parameter.data.to(device or self.weight_device())

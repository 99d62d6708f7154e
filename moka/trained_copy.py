"""`TrainedCopy`: a module that an adapter trains in full, beside its frozen original."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from .errors import ConfigError, StateError


class TrainedCopy(nn.Module):
    """A module trained in full beside its frozen original (`modules_to_save`); named as in peft's wrapper.

    Attributes:
        original_module: the frozen module, used when adapters are disabled.
        modules_to_save: adapter name -> trained copy.
        active_adapters: the first of them that has a copy here is the one in use.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.train(original.training)

    def add_adapter(self, name: str) -> None:
        """Copies the original; the copy is trainable once active."""
        if name in self.modules_to_save:
            raise StateError(f"adapter {name!r} exists already; choose another name or eject it first")
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter's copy."""
        del self.modules_to_save[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]

    def set_adapter(self, names: Sequence[str]) -> None:
        """Uses the copy of the one named adapter that has one here.

        Raises:
            ConfigError: several of the adapters have a copy; they cannot be added up.
        """
        active = [name for name in names if name in self.modules_to_save]
        if len(active) > 1:
            raise ConfigError(
                f"modules_to_save: adapters {active} each train this module; activate one of them"
            )
        self.active_adapters = active
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in active)

    def current(self) -> nn.Module:
        """The module in use."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    @property
    def weight(self) -> Tensor:
        """The weight in use, for model code that reads it."""
        return self.current().weight  # pyright: ignore[reportReturnType]

    def forward(self, *args, **kwargs):
        """Calls the module in use."""
        return self.current()(*args, **kwargs)

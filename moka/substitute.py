"""Changing what a module does while it stays the object that it is: its class is replaced by a subclass.

The subclass derives from a `Substitute` with another `forward` and from the module's original class, so that
`isinstance`, parameters, state dict and every other method are those of the original.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


class Substitute:
    """Base of the classes that give a module another `forward`.

    Attributes:
        mixin: the class derived from this one that has the `forward`.
        original_class: what `restore` gives back.
    """

    mixin: type[Substitute]
    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies are made by way of the original class, which can be found by its name
        _, _, *state = super().__reduce_ex__(protocol)  # pyright: ignore[reportAssignmentType]
        return _new, (self.mixin, self.original_class), *state


@functools.cache
def subclass(mixin: type[Substitute], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` whose instances have the `forward` of `mixin`."""
    members = {"mixin": mixin, "original_class": original, "__module__": mixin.__module__}
    return type(f"{mixin.__name__}{original.__name__}", (mixin, original), members)


def substitute(module: nn.Module, mixin: type[Substitute]) -> None:
    """Gives a module the `forward` of `mixin`."""
    _set_class(module, subclass(mixin, type(module)))


def restore(module: Any) -> None:
    """Gives a module with a `Substitute` its original class back."""
    _set_class(module, module.original_class)


def was_replaced(module: Any) -> bool:
    """Whether the class of a module was changed again after `substitute`."""
    return type(module) is not subclass(module.mixin, module.original_class)


def has_own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module, by its class or in the instance, has another `forward` than `kind`."""
    # accelerate's hooks keep the bound forward in the instance
    bound = vars(module).get("_old_forward", vars(module).get("forward"))
    own = bound is not None and getattr(bound, "__func__", None) is not kind.forward
    return own or type(module).forward is not kind.forward


def _new(mixin: type[Substitute], original: type[nn.Module]) -> nn.Module:
    return object.__new__(subclass(mixin, original))


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of a module, and of its `forward` where accelerate's hooks keep it bound."""
    old = type(module).forward
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is old:
            setattr(module, name, types.MethodType(kind.forward, module))
    module.__class__ = kind

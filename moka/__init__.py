"""moka: fine-tune a 4-bit language model with a gated mixture of Kronecker products."""

from . import functional, nf4
from .config import MokaConfig
from .info import info
from .inject import active_adapters, adapter_layers, disabled, eject, inject, set_adapter

__all__ = [
    "MokaConfig",
    "active_adapters",
    "adapter_layers",
    "disabled",
    "eject",
    "functional",
    "info",
    "inject",
    "nf4",
    "set_adapter",
]
__version__ = "0.1.0"

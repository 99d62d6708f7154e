"""moka: fine-tune a 4-bit language model with a gated mixture of Kronecker products."""

from . import functional, nf4
from .checkpoint import load_adapter, save_adapter
from .config import MokaConfig
from .info import info
from .inject import active_adapters, adapter_layers, disabled, eject, inject, set_adapter
from .layers import delta_weight
from .merge import merge, merge_errors, unmerge
from .mixed import mixed_batch
from .plan import plan
from .quantize import quantize
from .summary import summary

__all__ = [
    "MokaConfig",
    "active_adapters",
    "adapter_layers",
    "delta_weight",
    "disabled",
    "eject",
    "functional",
    "info",
    "inject",
    "load_adapter",
    "merge",
    "merge_errors",
    "mixed_batch",
    "nf4",
    "plan",
    "quantize",
    "save_adapter",
    "set_adapter",
    "summary",
    "unmerge",
]
__version__ = "0.1.0"

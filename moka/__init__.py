"""moka: fine-tune a 4-bit language model with a gated mixture of Kronecker products."""

from . import convert, functional, nf4
from .accelerate import accelerate, accelerated_layers, decelerate
from .analyze import analyze
from .checkpoint import load_adapter, save_adapter
from .config import MokaConfig
from .export_lora import export_lora
from .info import info
from .inject import active_adapters, adapter_layers, disabled, eject, inject, set_adapter
from .integrations.distributed import shard
from .layers import delta_weight
from .merge import merge, merge_errors, unmerge
from .mixed import mixed_batch
from .plan import plan
from .presets import preset, presets
from .quantize import quantize
from .rank import grow, importance, prune, reallocate, truncate
from .rates import param_groups, routing_loss
from .start import start
from .summary import summary

__all__ = [
    "MokaConfig",
    "accelerate",
    "accelerated_layers",
    "active_adapters",
    "adapter_layers",
    "analyze",
    "convert",
    "decelerate",
    "delta_weight",
    "disabled",
    "eject",
    "export_lora",
    "functional",
    "grow",
    "importance",
    "info",
    "inject",
    "load_adapter",
    "merge",
    "merge_errors",
    "mixed_batch",
    "nf4",
    "param_groups",
    "plan",
    "preset",
    "presets",
    "prune",
    "quantize",
    "reallocate",
    "routing_loss",
    "save_adapter",
    "set_adapter",
    "shard",
    "start",
    "summary",
    "truncate",
    "unmerge",
]
__version__ = "0.1.0"

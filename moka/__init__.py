"""moka: fine-tune a 4-bit language model with a gated mixture of Kronecker products."""

from . import functional, nf4
from .info import info

__all__ = ["functional", "info", "nf4"]
__version__ = "0.1.0"

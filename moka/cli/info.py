"""`moka info`."""

from __future__ import annotations

from ..info import info as get_info
from .console import out


def info() -> None:
    """Print versions, what the extension was built with and what the machine has."""
    out.print(str(get_info()), highlight=False, soft_wrap=True)

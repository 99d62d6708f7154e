"""The command line, one file per command: `moka train | eval | chat | merge | export-lora | convert |
analyze | plan | bench | info | run`."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point; says which extra to install when the command line's own libraries are missing."""
    try:
        from .app import app
    except ImportError as error:
        print(f"moka: {error}; the command line needs moka[cli,hf]", file=sys.stderr)
        raise SystemExit(2) from error
    app()

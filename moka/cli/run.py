"""`moka run`."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND [ARGUMENTS]...", show_default=False)],
) -> None:
    """Run a Python program in a process where peft and transformers know MoKA adapters.

    The command is the name of an installed program, a script (.py), or -m and a module. What it starts as
    further processes must import moka.integrations.peft itself.

    Example: moka run -- lm_eval --model hf --model_args pretrained=base,peft=adapter --tasks arc_easy
    """
    from ..integrations import peft  # noqa: F401  (registers)

    program = find_program(command)
    try:
        status = program()
    except Exception as error:  # the program's own: shown in full, as Python would
        traceback.print_exc()
        raise typer.Exit(1) from error
    sys.exit(status if isinstance(status, (int, str)) else 0)  # a console script returns its status


def find_program(command: list[str]) -> Callable[[], Any]:
    """What runs a command in this process; sets `sys.argv` for it.

    Raises:
        ConfigError: there is no such program.
    """
    program, *arguments = command
    if program == "-m":
        if not arguments:
            raise ConfigError("moka run -m: got no module, expected its name")
        sys.argv = arguments
        return partial(runpy.run_module, arguments[0], run_name="__main__", alter_sys=True)
    sys.argv = command
    if program.endswith(".py"):
        if not Path(program).is_file():
            raise ConfigError(f"moka run: {program} is no file")
        sys.path.insert(0, str(Path(program).resolve().parent))  # as python does for a script
        return partial(runpy.run_path, program, run_name="__main__")
    found = importlib.metadata.entry_points(group="console_scripts", name=program)
    if not found:
        raise ConfigError(
            f"moka run: {program!r} is not an installed Python program; expected the name of one, a .py "
            f"file, or -m and a module"
        )
    return next(iter(found)).load()

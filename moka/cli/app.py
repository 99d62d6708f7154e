"""The typer application: joins the commands and turns errors of moka into one message and exit code 2."""

from __future__ import annotations

import warnings
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from ..errors import MokaError
from . import analyze, bench, chat, convert, export_lora, info, merge, plan, run, train
from . import eval as evaluate
from .console import err

EXIT_ERROR = 2


class _Group(TyperGroup):
    """Shows an expected error as one message; `--debug` lets the traceback through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # which ends quietly
            raise
        # OSError: no permission, a full disk, a file in the way
        except (MokaError, ImportError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, help="Fine-tune 4-bit language models with MoKA."
)


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show tracebacks.")) -> None:
    if not debug:
        _short_warnings()


def _short_warnings() -> None:
    """Shows warnings as one line."""
    warnings.showwarning = lambda message, *args, **kwargs: err.print(
        f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True
    )


app.command("train", epilog=train.EPILOG)(train.train)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("export-lora")(export_lora.export_lora)
app.command("convert")(convert.convert)
app.command("analyze")(analyze.analyze)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("info")(info.info)
# what follows the name of the program belongs to the program
app.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(
    run.run
)

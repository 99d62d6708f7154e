"""`moka plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import MokaConfig
from ..errors import ConfigError
from .config import read_values
from .console import out, print_json

EXPECTED_MODEL = "'embedded', a config.json, a model directory, a .gguf file or a hub id"


def plan(
    model: Annotated[str, typer.Argument(help="embedded, a config.json, a model directory or a hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER.yaml] [KEY=VALUE]...", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 1024,
    quantized: Annotated[bool, typer.Option(help="Count the linear layers in NF4.")] = True,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Parameters, operations and memory of a fine-tuning run, before anything is loaded.

    KEY=VALUE are fields of the adapter's configuration, such as r=4 or target_modules=all-linear.
    """
    from ..plan import plan as make_plan

    config = MokaConfig.from_dict(read_values(overrides or []))
    result = make_plan(
        model_config(model),
        config,
        batch=batch,
        sequence=sequence,
        quantized=quantized,
        gradient_checkpointing=gradient_checkpointing,
    )
    if json:
        print_json(result.to_dict())
    else:
        out.print(str(result), highlight=False, soft_wrap=True)


def model_config(name: str) -> Any:
    """The `transformers` configuration of a model, without its weights."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("moka plan needs transformers; install moka[hf]") from error
    from ..embedded import model_file
    from ..loading import EMBEDDED

    path = model_file() if name == EMBEDDED else Path(name)
    if path.suffix in (".json", ".gguf") and not path.is_file():  # else transformers asks the hub for it
        raise ConfigError(f"model: {name!r} is no file; expected {EXPECTED_MODEL}")
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {name!r} has no readable configuration ({str(error).strip().splitlines()[0]}); "
            f"expected {EXPECTED_MODEL}"
        ) from error

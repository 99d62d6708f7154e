"""`moka convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import MokaConfig
from ..errors import ConfigError
from ..manifest import SCHEMES
from .common import DtypeOption, ModelOption, QuantizeOption, base_of, load
from .config import read_values
from .console import out


def convert(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a LoRA, LoKr or MoKA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the new adapter into.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER.yaml] [KEY=VALUE]...", show_default=False)
    ] = None,
    model: ModelOption = None,
    quantize: QuantizeOption = "nf4",
    dtype: DtypeOption = "auto",
    to: Annotated[
        str | None,
        typer.Option("--to", help="float, int8 or int4: write a MoKA, its factors stored in this way."),
    ] = None,
) -> None:
    """Write a LoRA or a LoKr of peft as a MoKA, or a MoKA of one component per layer as a LoKr.

    With --to, write any of them as a MoKA stored in 8 or 4 bits, or in floating point again; what is lost of
    each layer's update, and the sizes of the files, are printed.

    KEY=VALUE are fields of the new adapter's configuration, for a LoRA: r=4. What of its update is lost is
    printed; a LoKr converts exactly.
    """
    from .. import convert as kinds
    from ..checkpoint import WEIGHTS, load_adapter, save_adapter

    if to not in (None, "float", *SCHEMES):
        raise ConfigError(f"to: got {to!r}, expected one of {('float', *SCHEMES)}")
    kind = kinds.kind_of(adapter)
    if overrides and kind != "LORA":
        raise ConfigError(f"got {overrides}, expected no settings: a {kind} converts as it is")
    config = MokaConfig.from_dict(read_values(overrides or []))
    loaded, _ = load(model or base_of(adapter), None, quantize, dtype, text=False)
    if kind == "MOKA" and to is None:
        kinds.to_lokr(load_adapter(loaded, adapter), output)
    else:
        if kind == "LORA":
            out.print(str(kinds.from_lora(adapter, loaded, config)), highlight=False, soft_wrap=True)
        elif kind == "MOKA":
            load_adapter(loaded, adapter)
        else:
            kinds.from_lokr(adapter, loaded)
        before = (adapter / WEIGHTS).stat().st_size
        errors = save_adapter(loaded, output, quantize=None if to == "float" else to)
        for path, error in errors.items():
            out.print(f"{path}  relative error of the update {error:.2e}", highlight=False, soft_wrap=True)
        if to:
            after = (output / WEIGHTS).stat().st_size
            out.print(f"{WEIGHTS}: {before:,} bytes -> {after:,} bytes", highlight=False)
    out.print(f"converted {adapter} into {output}", highlight=False)

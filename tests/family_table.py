"""Rewrites the table of docs/family.md from the presets themselves."""

from __future__ import annotations

from pathlib import Path

import moka
from moka.branches import form_of
from moka.presets import PRESETS
from moka.rules import plan_shapes

START, END = "<!-- table: presets -->\n", "<!-- end -->"
PAGE = Path(__file__).parent.parent / "docs" / "family.md"
SIZE = 4096  # of the square layer in the table


def parameters(name: str, N: int, K: int, **options) -> int:
    """Trained entries of one layer; a bank that all layers share counts in full."""
    model = moka.inject(layer_on_meta(N, K), moka.preset(name, target_modules=["0"], **options))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_on_meta(N: int, K: int):
    import torch

    with torch.device("meta"):
        return torch.nn.Sequential(torch.nn.Linear(K, N, bias=False))


def flops(name: str, N: int, K: int) -> int:
    """Operations per token when activations run through the factors, 2 per multiply-add."""
    config = moka.preset(name)
    shapes = plan_shapes(N, K, config.r, config.shapes_for(""))
    return 2 * form_of(shapes).macs


def table() -> str:
    rows = [
        f"| preset | source | update | trained entries | {SIZE}x{SIZE} | MFLOP per token | rank at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, p in PRESETS.items():
        count, work = parameters(name, SIZE, SIZE), flops(name, SIZE, SIZE) / 1e6
        rows.append(
            f"| `{name}` | {p.source} | `{p.formula}` | `{p.parameters}` "
            f"| {count:,} | {work:.2f} | `{p.rank}` |"
        )
    return "\n".join(rows)


def main() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{START}{table()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

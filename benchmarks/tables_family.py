"""The tables of docs/family.md that were measured: family_*.csv."""

from __future__ import annotations

from collections.abc import Callable

from table_format import markdown, number, read
from tables_cuda import machine


def starts() -> str:
    """A method per line, its loss after each number of steps, the mean over seeds."""
    rows = read("family_starts.csv")
    methods = dict.fromkeys(row["method"] for row in rows)
    seeds = len({row["seed"] for row in rows})
    counts = len(rows[0]["losses"].split())
    steps = [int(rows[0]["steps"]) * i // (counts - 1) for i in range(counts)]
    lines = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        curves = [[float(loss) for loss in row["losses"].split()] for row in own]
        means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        shares = ", ".join(row["share"] or "not reached" for row in own)
        lines.append([method, *(f"{mean:.3f}" for mean in means[1:]), shares])
    header = [f"loss after steps, mean of {seeds} seeds", *map(str, steps[1:]), "zero's end reached after"]
    return markdown(header, lines) + machine(rows)


def rates() -> str:
    """A scale and number of components per line, a learning rate per column; the best is bold. Means over the
    seeds, of the rates that each of them has.
    """
    rows = read("family_rates.csv")
    means: dict[tuple[str, str], dict[float, float]] = {}
    seeds = {scale: len({row["seed"] for row in rows if row["scale"] == scale}) for scale in ("sqrt", "r")}
    for scale, k, lr in dict.fromkeys((row["scale"], row["k"], row["lr"]) for row in rows):
        losses = [
            float(row["last_loss"]) for row in rows if (row["scale"], row["k"], row["lr"]) == (scale, k, lr)
        ]
        if len(losses) == seeds[scale]:
            means.setdefault((scale, k), {})[float(lr)] = sum(losses) / len(losses)
    columns = sorted({lr for own in means.values() for lr in own})
    lines = []
    for (scale, k), own in means.items():
        shown = {lr: f"**{v:.3f}**" if v == min(own.values()) else f"{v:.3f}" for lr, v in own.items()}
        lines.append([f"{scale}, k = {k}, seeds: {seeds[scale]}", *(shown.get(lr, "") for lr in columns)])
    header = [f"loss after {rows[0]['steps']} steps; scale", *(f"{lr:g}" for lr in columns)]
    return markdown(header, lines) + machine(rows)


def layers(name: str) -> str:
    """A variant per line: parameters, milliseconds of a step and ratio to peft's LoRA for each layer."""
    rows = read(name)
    cases = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    header = [f"step, {rows[0]['M']} tokens"]
    for N, K in cases:
        header += [f"{N} x {K}: trained", "ms", "to LoRA"]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [variant]
        for case in cases:
            (row,) = (r for r in rows if (r["N"], r["K"]) == case and r["variant"] == variant)
            cells += [f"{int(row['trained']):,}", number(row["median_ms"]), row["ratio_to_peft_lora"]]
        lines.append(cells)
    return markdown(header, lines) + machine(rows)


def prune() -> str:
    """The loss without components that hold one per cent of the energy, by two rules."""
    rows = read("family_prune.csv")
    header = ["least first", "seed", "components", "kept", "loss", "pruned", "change"]
    fields = ("rule", "seed", "components", "kept", "loss", "loss_pruned")
    lines = [[*(row[field] for field in fields), f"{100 * float(row['change']):+.2f} %"] for row in rows]
    return markdown(header, lines) + machine(rows)


def quantized() -> str:
    """A way of storing the factors per line: the file, the error of the updates, the loss of each seed."""
    rows = read("family_quantized.csv")
    lines = []
    for factors in dict.fromkeys(row["factors"] for row in rows):
        own = [row for row in rows if row["factors"] == factors]
        mean = sum(float(row["mean_error"]) for row in own) / len(own)
        lines.append(
            [
                factors,
                f"{int(own[0]['bytes']):,}",
                number(own[0]["share_of_fp32"]),
                *(f"{100 * error:.2g} %" for error in (mean, max(float(row["max_error"]) for row in own))),
                ", ".join(f"{float(row['loss']):.4f}" for row in own),
                ", ".join(f"{100 * float(row['change']):+.2f} %" for row in own),
            ]
        )
    header = ["factors", "bytes", "of fp32's", "error of the updates", "largest", "loss, each seed", "change"]
    return markdown(header, lines) + machine(rows)


TABLES: dict[str, Callable[[], str]] = {
    "family-starts": starts,
    "family-rates": rates,
    "family-prune": prune,
    "family-layers": lambda: layers("family_layers.csv"),
    "family-layers-gpu": lambda: layers("family_layers_gpu.csv"),
    "family-quantized": quantized,
}

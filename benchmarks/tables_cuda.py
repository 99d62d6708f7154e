"""README's tables of what was measured on a GPU, from cuda_*.csv, model*.csv, profile.csv and parity.csv."""

from __future__ import annotations

from collections.abc import Callable

from table_format import Rows, markdown, number, read

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # per weight, double quantization included
DECODE = {
    "cuBLAS bf16": "cuBLAS, bf16",
    "bitsandbytes": "bitsandbytes",
    "torch int4": "torch int4",
    "moka base": "moka, no adapter",
    "moka op": "moka",
    "moka": "moka's layer",
}
FORWARD = {name: title for name, title in DECODE.items() if name not in ("torch int4", "moka op")}
FORWARD["moka"] = "moka"
DEQUANTIZE = {"bitsandbytes": "bitsandbytes", "moka base": "moka", "moka op": "moka, mixture merged in"}
TRAINING = {
    "frozen bf16": "frozen, bf16",
    "frozen bitsandbytes": "frozen, bitsandbytes",
    "moka": "**moka**",
    "moka, bf16 base": "moka, bf16 base",
    "peft LoRA r=16": "peft LoRA, r = 16",
    "peft LoRA r=64": "peft LoRA, r = 64",
    "peft DoRA r=16": "peft DoRA, r = 16",
    "peft LoKr, bf16 base": "peft LoKr, bf16 base",
    "LyCORIS LoKr, bf16 base": "LyCORIS LoKr (one product), bf16 base",
    "plain PyTorch": "MoKA in plain PyTorch",
    "plain PyTorch, compiled": "the same, torch.compile",
    "frozen bf16, graph": "frozen, bf16, as a CUDA graph",
    "frozen bitsandbytes, graph": "frozen, bitsandbytes, as a CUDA graph",
    "moka, graph": "moka, as a CUDA graph",
}

MIXED = ("one adapter", "16 adapters")


def floor_us(row: dict[str, str]) -> float:
    """The larger of two times: NF4 weight and activations at the copy rate, operations at the matrix rate."""
    N, K, M = (int(row[name]) for name in ("N", "K", "tokens"))
    moved = N * K * NF4_BYTES + 2 * M * (N + K)
    return max(moved / float(row["copy_tb_s"]) / 1e6, 2 * M * N * K / float(row["matmul_tflop_s"]) / 1e6)


def cases(rows: Rows) -> dict[tuple[str, str, str], dict[str, dict[str, str]]]:
    """(N, K, tokens) -> what -> row."""
    grouped: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        grouped.setdefault((row["N"], row["K"], row["tokens"]), {})[row["what"]] = row
    return grouped


def microseconds(row: dict[str, str] | None) -> str:
    """A time; empty where nothing was measured."""
    return "" if row is None else short(float(row["us"]))


def short(value: float) -> str:
    """One digit behind the point below 100, none above."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def tokens_table(name: str, titles: dict[str, str], left_out: tuple[str, ...] = ()) -> str:
    """A line per layer and token count: the floor, then microseconds of each variant."""
    rows = [row for row in read(name) if row["tokens"] not in left_out]
    lines = []
    for (N, K, tokens), case in cases(rows).items():
        floor = floor_us(next(iter(case.values())))
        times = (microseconds(case.get(what)) for what in titles)
        lines.append([f"{N} x {K}", tokens, short(floor), *times])
    return markdown(["layer (N x K), us", "tokens", "floor", *titles.values()], lines) + machine(rows)


def dequantize_table() -> str:
    """NF4 to bf16, a line per layer."""
    rows = read("cuda_dequantize.csv")
    lines = []
    for (N, K, _), case in cases(rows).items():
        moved = int(N) * int(K) * (NF4_BYTES + 2)
        floor = moved / float(next(iter(case.values()))["copy_tb_s"]) / 1e6
        lines.append([f"{N} x {K}", f"{floor:.1f}", *(microseconds(case.get(what)) for what in DEQUANTIZE)])
    return markdown(["to bf16 (N x K), us", "floor", *DEQUANTIZE.values()], lines) + machine(rows)


def training_table() -> str:
    """A line per variant, a column per layer: microseconds and the ratio to frozen bf16."""
    rows = read("cuda_training.csv")
    layers = cases(rows + read("cuda_compiled.csv", optional=True))
    lines = []
    for what, title in TRAINING.items():
        if not any(what in case for case in layers.values()):
            continue  # a peer that did not run there
        cells = []
        for case in layers.values():
            row, frozen = case.get(what), float(case["frozen bf16"]["us"])
            cells.append("" if row is None else f"{microseconds(row)} ({float(row['us']) / frozen:.2f})")
        lines.append([title, *cells])
    header = [f"{next(iter(layers))[2]} tokens, us", *(f"{N} x {K}" for N, K, _ in layers)]
    return markdown(header, lines) + machine(rows)


def mixed_table() -> str:
    """A line per layer and number of tokens: one adapter for all rows, several, and their ratio."""
    rows = read("cuda_mixed.csv")
    lines = []
    for (N, K, tokens), case in cases(rows).items():
        one, several = (float(case[what]["us"]) for what in MIXED)
        lines.append([f"{N} x {K}", tokens, short(one), short(several), f"{several / one:.2f}"])
    return markdown(["layer (N x K), us", "tokens", *MIXED, "ratio"], lines) + machine(rows)


def model_table(*names: str) -> str:
    """A line per run: without Liger's kernels, then with them."""
    rows = [row for name in names for row in read(name)]
    figures = ("ms", "tokens_s", "peak_gib")
    runs: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        runs.setdefault(row["run"], {})[row["liger"]] = row
    lines = []
    for name, run in runs.items():
        line = [name]
        for liger in "01":
            line += [run[liger][name] for name in figures] if liger in run else [""] * len(figures)
        lines.append(line)
    header = ["training step", *("ms", "tokens/s", "GiB"), *("with Liger, ms", "tokens/s", "GiB")]
    return markdown(header, lines) + machine(rows)


def profile_table() -> str:
    """A line per kernel that takes part in an operation."""
    rows = read("profile.csv")
    lines = [
        [
            row["operation"], f"`{row['kernel']}`", microseconds(row),
            *(f"{100 * float(row[share]):.0f}" for share in ("memory_share", "tensor_share", "issue_share")),
            row["registers"],
        ]
        for row in rows
        if row["operation"] not in ("copy", "matmul")
    ]  # fmt: skip
    header = ["4096 x 4096", "kernel", "us", "memory, %", "tensor cores, %", "issue, %", "registers"]
    return markdown(header, lines) + machine(rows)


def parity_table() -> str:
    """A line per path: losses at the end, and the difference to plain PyTorch."""
    rows = read("parity.csv")
    plain = {row["path"]: row for row in rows}["plain PyTorch"]
    lines = []
    for row in rows:
        line = [row["path"], row["first_loss"][:6]]
        for name in ("last_loss", "held_out_loss"):
            off = float(row[name]) / float(plain[name]) - 1
            line += [f"{float(row[name]):.4f}", f"{100 * off:+.2f}"]
        lines.append([*line, number(row["seconds"])])
    header = [f"{rows[0]['steps']} steps", "first loss", "last 50 steps", "to plain, %"]
    header += ["held out", "to plain, %", "seconds"]
    return markdown(header, lines) + machine(rows)


def machine(rows: Rows) -> str:
    """Where the rows were measured, as a line below the table."""
    row = rows[0]
    rates = ""
    if "copy_tb_s" in row:
        rates = f" (copy {row['copy_tb_s']} TB/s, bf16 product {row['matmul_tflop_s']} TFLOP/s)"
    names = ("torch", "bitsandbytes", "peft", "transformers", "liger-kernel", "lycoris-lora")
    versions = ", ".join(f"{name} {row[name]}" for name in names if row.get(name))
    where = "CPU" if row["gpu"] == "none" else row["gpu"]
    commits = "; ".join(dict.fromkeys(f"commit {row['commit']}, {row['date']}" for row in rows))
    return f"\n{where}{rates}; {versions}; {commits}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "cuda-decode": lambda: tokens_table("cuda_decode.csv", DECODE, left_out=("8", "32")),
    "cuda-forward": lambda: tokens_table("cuda_forward.csv", FORWARD),
    "cuda-dequantize": dequantize_table,
    "cuda-training": training_table,
    "cuda-mixed": mixed_table,
    "cuda-model": lambda: model_table("model.csv", "model_unsloth.csv"),
    "cuda-profile": profile_table,
    "parity": parity_table,
}

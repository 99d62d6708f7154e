"""Fine-tunes a real language model, held in 4 bits, with MoKA, and scores it before and after: `make demo`.

Without --data: SmolLM2-135M-Instruct learns to answer science questions (ARC-Easy). With --data, the same on
your own JSON Lines file, of which a part is held out and scored.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from moka import __version__
from moka.checkpoint import WEIGHTS
from moka.cli.common import quiet_libraries
from moka.cli.console import err, out, progress
from moka.data import Row, TextDataset, is_choice, to_choice
from moka.errors import MokaError
from moka.evaluate import evaluate_rows
from moka.loading import load_model
from moka.train import RunConfig, load_rows, peak_memory_bytes, train, write_metrics

TASK = "embedded:arc_easy"
# What keeps the whole demo well under ten minutes on two cores.
TRAIN_TOKENS = 60_000
EVAL_TOKENS = 26_000
MAX_LENGTH = 256


def main() -> None:
    """Runs every step, each announced."""
    options = parse_arguments()
    started = time.perf_counter()
    config = RunConfig(
        data=str(options.data or TASK),
        output=str(options.output),
        seed=options.seed,
        max_length=MAX_LENGTH,
        batch_size=16,
        learning_rate=3e-3,
        schedule="cosine",
    )

    step("1  Model and data")
    quiet_libraries()
    model, tokenizer = load_model(config.model, config.quantize)
    train_rows, held_out = split_rows(options, tokenizer)
    config = config.model_copy(update={"max_steps": steps_within_budget(train_rows, tokenizer, config)})
    report = model.moka_quantization
    say(
        f"SmolLM2-135M-Instruct: {len(report.quantized)} layers in NF4, {report.bytes_before / 1e6:.0f} -> "
        f"{report.bytes_after / 1e6:.0f} MB; {len(train_rows)} rows to learn, {len(held_out)} to score"
    )

    step("2  The untouched 4-bit model")
    before = score(model, tokenizer, held_out)

    step(f"3  Fine-tuning with MoKA, {config.max_steps} steps")
    (options.output / WEIGHTS).unlink(missing_ok=True)  # of an earlier demo, which train would not overwrite
    with progress("training") as on_step:
        metrics = train(config, model, tokenizer, train_rows, on_step=on_step)
    trained = metrics["trainable_parameters"]
    share = trained / metrics["total_parameters"]
    say(f"{trained} trained parameters ({share:.2%}), {metrics['train_seconds']:.0f} s")

    step("4  The fine-tuned model")
    after = score(model, tokenizer, held_out)

    step("5  The saved adapter in a new process")
    same = reloaded_is_identical(options.output, held_out, after)
    show_samples(held_out, before, after)
    results = {
        "moka": __version__,
        "seed": options.seed,
        "before": figures(before),
        "after": figures(after),
        "identical_after_reload": same,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": max(peak_memory_bytes(), child_memory_bytes()),
    }
    write_metrics(options.output / "demo.json", results)
    show_results(options.output, results)
    if not same:
        raise SystemExit("the reloaded adapter gives other answers")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="your own .jsonl or .jsonl.gz file; default: ARC-Easy")
    parser.add_argument("--output", type=Path, help="default: runs/demo-SEED")
    options = parser.parse_args()
    options.output = options.output or Path("runs", f"demo-{options.seed}")
    return options


def split_rows(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to score: the official splits, or a tenth of the user's file held out."""
    if options.data is None:
        return load_rows(TASK, "train"), load_rows(TASK, "validation")
    rows = load_rows(str(options.data), "train")
    random.Random(options.seed).shuffle(rows)
    held_out, tokens = [], 0
    while len(rows) > 1 and len(held_out) < len(rows) / 9 and tokens < EVAL_TOKENS:
        held_out.append(rows.pop())
        tokens += len(tokenizer(text_to_score(held_out[-1]))["input_ids"])
    if not held_out:
        raise MokaError(
            f"{options.data}: got one row, expected at least two: one to learn from, one to score"
        )
    return rows, held_out


def text_to_score(row: Row) -> str:
    """About what the model reads when a row is scored."""
    if is_choice(row):
        choice = to_choice(row)
        return " ".join((choice.prompt, *choice.options))
    return json.dumps(row.data)


def steps_within_budget(rows: list[Row], tokenizer: Any, config: RunConfig) -> int:
    """One pass over the rows, or as many steps as `TRAIN_TOKENS` allow."""
    sample = rows[:500]
    tokens = sum(TextDataset(sample, tokenizer, config.max_length).lengths()) / len(sample)
    one_pass = -(-len(rows) // config.batch_size)
    return max(1, min(one_pass, round(TRAIN_TOKENS / (tokens * config.batch_size))))


def score(model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, Any]:
    """Accuracy or perplexity of the held-out rows, with the scores of each."""
    with progress("scoring") as update:
        result = evaluate_rows(model, tokenizer, rows, MAX_LENGTH, update, details=True)
    say(describe(result))
    return result


def reloaded_is_identical(output: Path, rows: list[Row], expected: dict[str, Any]) -> bool:
    """Scores the rows again with `moka eval` in another process, which knows the adapter's folder alone."""
    data, scores = output / "held_out.jsonl", output / "reloaded.json"
    data.write_text("".join(json.dumps(row.data) + "\n" for row in rows), encoding="utf-8")
    arguments = [str(data), "--adapter", str(output), "--max-length", str(MAX_LENGTH), "--details"]
    say(f"moka eval {' '.join(arguments)}")
    subprocess.run(
        [sys.executable, "-m", "moka.cli", "eval", *arguments, "--output", str(scores)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    reloaded = json.loads(scores.read_text(encoding="utf-8"))["results"][str(data)]
    keys = ("scores", "predictions") if "scores" in expected else ("loss", "tokens")
    same = all(reloaded[key] == expected[key] for key in keys)
    say(f"{describe(reloaded)}; {'every score is identical, bit for bit' if same else 'scores DIFFER'}")
    return same


def show_samples(rows: list[Row], before: dict[str, Any], after: dict[str, Any], count: int = 3) -> None:
    """Questions that the untouched model got wrong and the fine-tuned one gets right, with the ranked
    options.
    """
    if "scores" not in after:
        return
    learned = [
        i
        for i, row in enumerate(rows)
        if before["predictions"][i] != row.data["gold"] == after["predictions"][i]
    ]
    for i in learned[:count]:
        choice = to_choice(rows[i])
        table = Table("option", "before", "after", title=choice.question, title_justify="left")
        for option in sorted(range(len(choice.options)), key=lambda o: -after["scores"][i][o]):
            mark = " (right)" if option == choice.gold else ""
            values = [f"{scores['scores'][i][option]:.1f}" for scores in (before, after)]
            table.add_row(choice.options[option] + mark, *values)
        out.print(table)


def show_results(output: Path, results: dict[str, Any]) -> None:
    """What was reached, at what cost, and where it lies."""
    step("Results")
    say(f"before: {describe(results['before'])}")
    say(f"after:  {describe(results['after'])}")
    say(
        f"{results['seconds']:.0f} s in all, at most {results['peak_memory_bytes'] / 2**30:.2f} GiB of memory"
    )
    say(f"adapter, metrics.json, demo.json, loss.png, gates.png: {output.resolve()}")
    say(f"talk to it: moka chat --adapter {output}")


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its lists."""
    return {key: value for key, value in result.items() if not isinstance(value, list)}


def describe(result: dict[str, Any]) -> str:
    """One line for a result of either kind."""
    if "accuracy" in result:
        return (
            f"accuracy {result['accuracy']:.1%} (per character {result['accuracy_per_char']:.1%}) "
            f"on {result['rows']} questions, standard error {result['stderr']:.1%}, {result['seconds']:.0f} s"
        )
    return f"perplexity {result['perplexity']:.2f} of {result['tokens']} held-out tokens"


def child_memory_bytes() -> int:
    """The most memory the other process has held."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step(title: str) -> None:
    """A heading."""
    out.print(f"\n[bold]{title}[/]")


def say(text: str) -> None:
    """A line of result."""
    out.print(f"   {text}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    try:
        main()
    except MokaError as error:
        err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(2) from error

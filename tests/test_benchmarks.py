"""The benchmark scripts: `--quick` runs give complete, correct rows; README's tables follow from the CSVs."""

import csv
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import results  # noqa: E402
import table_format  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")
TEXT = ("commit", "date", "machine", "isa", "torch", "bitsandbytes", "op", "dtype", "variant", "baseline")
#: relF of the fp32 variants; a peer that computes in bf16 says so by a larger error.
FP32_RELF, BF16_RELF = 1e-5, 1e-2
EXPECTED = {
    "bench_ops.py": {
        "nf4_quantize": {"bitsandbytes", "moka"},
        "nf4_dequantize": {"bitsandbytes", "torch", "moka"},
        "nf4_linear": {"torch", "torch-dequantize", "bitsandbytes", "moka"},
        "nf4_linear_dx": {"torch", "bitsandbytes", "moka"},
        "kron_mix": {"plain", "moka"},
        "kron_mix_grad": {"plain", "moka"},
    },
    "bench_layer.py": {
        "layer_forward": {"torch", "bitsandbytes", "bitsandbytes-unpacked", "plain-moka", "moka-frozen",
                          "moka-merged", "moka-factored", "moka-auto"},
        "layer_step": {"torch", "bitsandbytes-unpacked", "plain-moka", "moka-frozen", "moka-merged",
                       "moka-factored", "moka-auto"},
    },
    "bench_train.py": {"train_step": {"frozen", "plain-moka", "moka"}},
}  # fmt: skip


@pytest.mark.parametrize("script", EXPECTED)
def test_quick_run_writes_complete_rows(script, tmp_path):
    """Every operation and variant is measured, every number is finite, every result correct."""
    out = tmp_path / "out.csv"
    command = [sys.executable, BENCHMARKS / script, "--quick", "--threads", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in results.fields(results.Row)]
    measured: dict[str, set[str]] = {}
    for row in rows:
        measured.setdefault(row["op"], set()).add(row["variant"])
        assert all(row[name] for name in TEXT)
        numbers = {name: float(value) for name, value in row.items() if name not in TEXT}
        assert all(math.isfinite(value) for value in numbers.values()), row
        assert 0 < numbers["p20_ms"] <= numbers["median_ms"] <= numbers["p80_ms"]
        assert numbers["threads"] == 1
        assert numbers["ratio"] == 1 or row["variant"] != row["baseline"]
        assert numbers["relF"] <= (
            BF16_RELF if row["variant"] in ("bitsandbytes", "lora-r16") else FP32_RELF
        ), row
    assert {op: variants - {"lora-r16"} for op, variants in measured.items()} == EXPECTED[script]


def test_measure_interleaves_and_rotates():
    """All variants run once per round, and another one begins each round."""
    order = []
    variants = {name: lambda i, name=name: (order.append(name), time.sleep(0.003)) for name in "abc"}
    timings = timing.measure(variants, CPU, warmup_s=0.0, repeat_s=0.0, turn_s=0.0, min_rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # warm-up, then three rounds
    assert all(t.rounds == 3 and 3 <= t.p20_ms <= t.median_ms <= t.p80_ms for t in timings.values())


def test_measure_times_short_calls_in_groups():
    """A short call is repeated within its turn and the time is per call."""
    calls = []
    timings = timing.measure({"short": calls.append}, CPU, warmup_s=0.001, repeat_s=0.01, turn_s=0.001)
    assert len(calls) > 10 * timings["short"].rounds
    assert timings["short"].median_ms < 0.1


def test_copies_exceed_the_cache():
    """Large weights get as many copies as fill the last-level cache, small ones the maximum."""
    assert timing.copies(1 << 34, CPU) == 2
    assert timing.copies(1, CPU, most=5) == 5


@pytest.fixture
def layer_csv(tmp_path, monkeypatch):
    """A layer.csv of one case, in place of the measured one."""
    facts = {"commit": "abc", "date": "2026-01-01", "machine": "CPU", "cores": 2, "threads": 2, "isa": "AVX2",
             "torch": "2", "bitsandbytes": "0", "op": "layer_step", "N": 8, "K": 4, "M": 256,
             "dtype": "float32", "p20_ms": 1, "p80_ms": 2, "gb_s": 1, "gflop_s": 1, "baseline": "torch",
             "relF": 0}  # fmt: skip
    rows = [
        results.Row(**facts, variant="torch", median_ms=1.5, ratio=1),
        results.Row(**facts, variant="moka-auto", median_ms=1.8, ratio=1.2),
    ]
    results.write(rows, tmp_path / "layer.csv")
    monkeypatch.setattr(table_format, "RESULTS", tmp_path)


def test_tables_come_from_the_csv(layer_csv):
    """A table is regenerated between its markers, text around it stays, and a second pass changes nothing."""
    text, changed = tables.generate("before\n<!-- table: layer-step -->\nold\n<!-- end -->\nafter\n")
    assert changed == ["layer-step"]
    assert text.startswith(
        "before\n<!-- table: layer-step -->\n| layer (N x K) | tokens | torch, ms | moka |\n"
    )
    assert "| 8 x 4 | 256 | 1.5 | 1.20 |\n" in text and "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert tables.generate(text) == (text, [])
    assert tables.generate(text.replace("| 1.20 |", "| 1.10 |"))[1] == ["layer-step"]


def test_unknown_table_is_an_error():
    """A marker with a misspelt name does not pass in silence."""
    with pytest.raises(KeyError, match="no-such"):
        tables.generate("<!-- table: no-such -->\n<!-- end -->\n")


@pytest.mark.parametrize(
    ("text", "shown"), [("1234.5", "1234"), ("123.456", "123"), ("12.345", "12.3"), ("0.0312", "0.0312")]
)
def test_numbers_have_three_digits(text, shown):
    """Tables show three significant digits without exponents."""
    assert tables.number(text) == shown

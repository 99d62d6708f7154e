"""The GPU benchmarks' tables and parsing; the measurements themselves need a GPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import profile_cuda  # noqa: E402
import table_format  # noqa: E402
import tables_cuda  # noqa: E402

ABOUT = {
    "gpu": "GPU",
    "copy_tb_s": 3.02,
    "matmul_tflop_s": 771,
    "torch": "2",
    "commit": "abc",
    "date": "-",
}


def write(folder, name, rows):
    """A CSV in place of a measured one."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *ABOUT])
        writer.writeheader()
        writer.writerows(row | ABOUT for row in rows)


def layer_row(section, what, us, tokens=4096, N=4096, K=4096):
    """One row of bench_cuda.py."""
    return {"section": section, "N": N, "K": K, "tokens": tokens, "what": what, "us": us}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder in place of the measured results."""
    monkeypatch.setattr(table_format, "RESULTS", tmp_path)
    return tmp_path


def test_floor_is_bytes_for_few_tokens_and_operations_for_many(results):
    """The floors of an H100's copy and matrix rates: 2.9 us of bytes, 178 us of operations."""
    write(results, "few.csv", [layer_row("decode", "moka", 7.5, tokens=1), layer_row("decode", "moka", 200)])
    lines = tables_cuda.tokens_table("few.csv", {"moka": "moka"}).splitlines()
    assert lines[2] == "| 4096 x 4096 | 1 | 2.9 | 7.5 |"
    assert lines[3] == "| 4096 x 4096 | 4096 | 178 | 200 |"
    assert "copy 3.02 TB/s, bf16 product 771 TFLOP/s" in lines[-1]


def test_training_ratios_are_to_frozen_bf16(results):
    """Each layer's column has its own baseline; a variant measured in one layer leaves the other empty."""
    rows = [layer_row("training", "frozen bf16", 400), layer_row("training", "moka", 500)]
    rows += [layer_row("training", "frozen bf16", 100, N=1024), layer_row("training", "moka", 200, N=1024)]
    write(results, "cuda_training.csv", rows)
    write(results, "cuda_compiled.csv", [layer_row("compiled", "plain PyTorch, compiled", 4000)])
    lines = tables_cuda.training_table().splitlines()
    assert lines[0] == "| 4096 tokens, us | 4096 x 4096 | 1024 x 4096 |"
    assert "| **moka** | 500 (1.25) | 200 (2.00) |" in lines
    assert "| the same, torch.compile | 4000 (10.00) |  |" in lines


def test_mixed_batches_are_held_against_one_adapter(results):
    """The ratio is that of several adapters to one."""
    rows = [
        layer_row("mixed", what, us, tokens=64) for what, us in (("one adapter", 40), ("16 adapters", 50))
    ]
    write(results, "cuda_mixed.csv", rows)
    assert tables_cuda.mixed_table().splitlines()[2] == "| 4096 x 4096 | 64 | 40.0 | 50.0 | 1.25 |"


def test_parity_is_relative_to_plain_pytorch(results):
    """The sign says which path ends higher."""
    row = {"steps": 300, "first_loss": 3.25, "held_out_loss": 2.0, "seconds": 9.9}
    paths = {"merged": 1.01, "plain PyTorch": 1.0}
    write(results, "parity.csv", [row | {"path": path, "last_loss": loss} for path, loss in paths.items()])
    lines = tables_cuda.parity_table().splitlines()
    assert lines[2] == "| merged | 3.25 | 1.0100 | +1.00 | 2.0000 | +0.00 | 9.9 |"


def test_profile_reads_ncu(results):
    """Launches are told from units and messages, and carry the range that they ran in."""
    span = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
    columns = ["ID", "Kernel Name", span, *profile_cuda.METRICS.values()]
    kernel = "void moka::cuda::<unnamed>::build_kernel<(int)4, float>(moka::Args)"
    launch = ["0", kernel, "<default domain>:@dequantize@:none:none:none:none:none:none"]
    lines = [columns, ["", "", "", *["ns"] * 6], [*launch, "2,000", "3,000", "1,000", "50", "25", "64"]]
    text = "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines)
    (found,) = profile_cuda.kernels(f"==PROF== Connected\n{text}==PROF== Disconnected\n")
    assert found[:2] == ("dequantize", "build_kernel")
    assert found[2] == {"ns": 2000, "read": 3000, "written": 1000, "tensor": 50, "issue": 25, "registers": 64}


@pytest.mark.cuda
def test_quick_run_times_every_variant(tmp_path):
    """A short run on the GPU gives a row per variant, each with a time above zero."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, BENCHMARKS / "bench_cuda.py", tmp_path, "--quick", "--only", "dequantize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "cuda_dequantize.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == set(tables_cuda.DEQUANTIZE)
    assert all(0 < float(row["p20_us"]) <= float(row["us"]) <= float(row["p80_us"]) for row in rows)

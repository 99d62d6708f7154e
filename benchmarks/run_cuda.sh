#!/bin/sh
# Every GPU benchmark, about four minutes on an H200; the CSVs go to the folder $1. With a second argument, a model
# that `moka train` takes, and a third, a .jsonl file, training parity as well. UNSLOTH_PATH: where to find Unsloth, if
# it is not installed beside the rest.
set -u
out=$(realpath "${1:?usage: run_cuda.sh RESULTS_FOLDER [MODEL DATA]}")
here=$(dirname "$0")
failed=
run() { echo "== $*"; python3 "$here/$@" || failed="$failed $1"; }
run bench_cuda.py "$out" --only decode forward dequantize training mixed
run bench_model.py "$out"
run profile_cuda.py "$out"
[ $# -lt 3 ] || run parity.py "$2" "$3" "$out"
export PYTHONPATH="${PYTHONPATH:-}:${UNSLOTH_PATH:-}"
run bench_unsloth.py "$out"
run bench_cuda.py "$out" --only compiled  # compiling takes a minute or more
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }

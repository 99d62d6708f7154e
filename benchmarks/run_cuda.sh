#!/bin/sh
# On a machine with a GPU: build, test, look for memory errors and races, time. Results go to the folder $1.
set -eu
out=${1:?usage: run_cuda.sh RESULTS_FOLDER}
mkdir -p "$out"
python3 setup.py build_ext --inplace
python3 -m pytest -q -m cuda tests
small="small_mixtures and both_orders or identities and not opcheck and not compile"
for tool in memcheck racecheck initcheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    python3 -m pytest -q -m cuda tests/test_cuda.py -k "$small"
done
python3 benchmarks/bench_cuda.py "$out/cuda.csv"

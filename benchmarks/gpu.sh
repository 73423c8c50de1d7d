#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, correctness of every kernel, compute-sanitizer, figures.
# Usage: benchmarks/gpu.sh [folder for the results]      (about ten minutes; needs no network)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')}
mkdir -p "$out"
failed=0
part() { # part NAME COMMAND...: run it, keep its output, go on if it fails
    local name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.txt" 2>&1 || { failed=1; echo "FAILED: $name"; }
    tail -n 3 "$out/$name.txt"
}

part build pip install --no-build-isolation --no-deps -e .
part info python -m allnc.info
part correctness python -m pytest -q -m gpu tests
small="ragged or class_mean"
part memcheck compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -q -m gpu tests/gpu tests/ops -k "$small"
part racecheck compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest -q -m gpu tests/gpu tests/ops -k "$small"
part bfloat16 python benchmarks/run.py --n 2048 8192 16384 --d 64 128 512 --dtype bfloat16 --seconds 3 --out "$out/bfloat16.csv"
part float32 python benchmarks/run.py --n 2048 8192 --d 128 --dtype float32 --seconds 3 --out "$out/float32.csv"
part large python benchmarks/run.py --ops class_mean_ema --n 65536 --features 2048 --dtype bfloat16 --seconds 3 --out "$out/class_mean.csv"
exit $failed

#!/usr/bin/env bash
# Everything that is measured on one GPU, within --budget seconds; needs no network. Results: $OUT (default: runs/gpu).
set -e
cd "$(dirname "$0")/.."
out="${OUT:-runs/gpu}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m benchmarks.gpu --json "$out/gpu.json" "$@" 2> >(tee "$out/gpu.log" >&2) | tee "$out/gpu.txt"

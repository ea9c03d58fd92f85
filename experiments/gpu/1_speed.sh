#!/usr/bin/env bash
# 1. How fast are inference and training in bf16, eager, compiled and with CUDA graphs?
. "$(dirname "$0")/common.sh"
speed() {
    limited 180 "$python" experiments/benchmarks/speed.py --device "$device" \
        --output "$output/speed.csv" "$@"
}
if [ "$smoke" ]; then
    speed --dtypes float32 --variants b0 --tasks inference --size 64 64 --rounds 1
    exit
fi
speed --dtypes bfloat16 --variants b0 b1 b2 b3 b4 b5 --tasks inference training --batch_size 16 --libraries none
speed --dtypes bfloat16 --variants b0 b2 b5 --tasks inference labels --batch_size 1
speed --dtypes bfloat16 --variants b0 b2 --tasks inference training --batch_size 16 --modes compile --libraries none
speed --dtypes bfloat16 --variants b0 b2 --tasks inference --batch_size 1 --modes graphs --libraries none

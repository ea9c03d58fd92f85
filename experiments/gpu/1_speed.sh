#!/usr/bin/env bash
# 1. How fast are inference and training in bf16, eager, compiled and with CUDA graphs?
. "$(dirname "$0")/common.sh"
speed() {
    limited "$python" experiments/benchmarks/speed.py --device "$device" \
        --output "$output/speed.csv" "$@"
}
if [ "$smoke" ]; then
    speed --variants b0 --tasks inference --dtypes float32 --size 64 64 --rounds 1
    exit
fi
bf16=(--dtypes bfloat16 --without_smp)
speed "${bf16[@]}" --variants b0 b1 b2 b3 b4 b5 --tasks inference training --batch_size 16
speed "${bf16[@]}" --variants b0 b2 b5 --tasks inference labels
speed "${bf16[@]}" --variants b0 b2 --tasks inference training --batch_size 16 --modes compile
speed "${bf16[@]}" --variants b0 b2 --tasks inference --modes graphs
speed --variants b0 b2 --tasks inference training --dtypes float32 bfloat16 --batch_size 16

#!/usr/bin/env bash
# 6. How fast are the receptive fields of five layers on a GPU, and what do they look like?
. "$(dirname "$0")/common.sh"
if [ "$smoke" ]; then
    "$python" experiments/benchmarks/erf.py --size 64 64 --images 2 --rounds 1 >"$output/erf.txt"
    exit
fi
for model in segformer_b0 segformer_b2; do
    for batch_size in 1 8; do
        limited 100 "$python" experiments/benchmarks/erf.py --model "$model" --device "$device" \
            --images 32 --batch_size "$batch_size" >>"$output/erf.txt"
    done
    limited 60 "$python" -m segformer_pl erf --model "$model" --data.dataset shapes \
        --device "$device" --num_images 32 --output "$output/$model"
done

#!/usr/bin/env bash
# 6. How fast are the receptive fields of five layers on a GPU, and what do they look like?
. "$(dirname "$0")/common.sh"
if [ "$smoke" ]; then
    models=segformer_b0 batches=1 size="64 64" images=2 rounds=1
else
    models="segformer_b0 segformer_b2" batches="1 8" size="512 512" images=32 rounds=3
fi
for model in $models; do
    for batch_size in $batches; do
        file=$output/$model.batch$batch_size.txt
        [ ! -e "$file" ] || continue
        limited "$python" experiments/benchmarks/erf.py --model "$model" --device "$device" \
            --size $size --images "$images" --batch_size "$batch_size" --rounds "$rounds" \
            >"$output/partial.txt"
        mv "$output/partial.txt" "$file"
    done
    limited "$python" -m segformer_pl erf --model "$model" --data.dataset shapes \
        --device "$device" --num_images "$images" --output "$output/$model"
done

#!/usr/bin/env bash
# 2. Where does B0 from scratch converge on CamVid? Three seeds, 8000 steps; two calls. And what does
#    merging its queries cost and save without training?
. "$(dirname "$0")/common.sh"
needs_camvid
train_camvid segformer_b0 0 1 2
settings=experiments/ablations/query_merging.yaml
if [ "$smoke" ]; then # the first of the settings
    sed '/merged-0.5:/,$d' "$settings" >"$output/query_merging.yaml"
    settings=$output/query_merging.yaml
fi
limited "$python" -m segformer_pl test_time --settings "$settings" --device "$device" \
    --ckpt "$output/segformer_b0/seed0/checkpoints/best.ckpt" ${smoke:+--num_images 2} \
    --output "$output/query_merging"

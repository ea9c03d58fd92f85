#!/usr/bin/env bash
# 5. What do five systems reach on CamVid? 27 runs, about three calls. First write the weights:
#    python experiments/ablations/efficientnet_lite0_weights.py runs/efficientnet_lite0.safetensors
. "$(dirname "$0")/common.sh"
needs_camvid
study arena experiments/arena/camvid.yaml gpu \
    --data.path "$camvid" --max_parallel 12 --num_images 10 --block_size 10

#!/usr/bin/env bash
# 4. Do the reduction ratio and the overlap of patches matter on CamVid? 18 runs, about two calls.
. "$(dirname "$0")/common.sh"
needs_camvid
study ablate experiments/ablations/reduction_and_overlap.yaml gpu \
    --data.path "$camvid" --max_parallel 8 --block_size 10

#!/usr/bin/env bash
# 7. The studies and the arena on `shapes` with 1600 steps, as `make demo`: do differences that 800
#    steps leave open get resolved? 84 and 18 runs; about three calls.
. "$(dirname "$0")/common.sh"
end=$((SECONDS + 500))
for name in reduction_ratio patch_overlap position decoder_width decoder_stages drop_path; do
    limit=$((end - SECONDS))
    [ "$limit" -gt 0 ] || exit 0
    study ablate "experiments/ablations/$name.yaml" long --max_parallel 14
    [ -z "$smoke" ] || exit 0
done
limit=$((end > SECONDS ? end - SECONDS : 1))
study arena experiments/arena/shapes.yaml long --max_parallel 14

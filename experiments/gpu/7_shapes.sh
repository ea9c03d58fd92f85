#!/usr/bin/env bash
# 7. The studies and the arena on `shapes` with 1600 steps, as `make demo`: do differences that 800
#    steps leave open get resolved? 84 and 18 runs; about three calls.
. "$(dirname "$0")/common.sh"
names="reduction_ratio patch_overlap position decoder_width decoder_stages drop_path"
[ -z "$smoke" ] || names=drop_path
for name in $names; do
    study ablate "experiments/ablations/$name.yaml" long --max_parallel 14
done
[ -z "$smoke" ] || exit 0
study arena experiments/arena/shapes.yaml long --max_parallel 14

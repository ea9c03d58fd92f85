#!/usr/bin/env bash
# 2. Where does B0 from scratch converge on CamVid? Three seeds, 8000 steps; two calls.
. "$(dirname "$0")/common.sh"
needs_camvid
train_camvid segformer_b0 0 1 2

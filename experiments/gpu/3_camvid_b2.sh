#!/usr/bin/env bash
# 3. Where does B2 from scratch converge on CamVid? Three seeds, 8000 steps; about five calls.
. "$(dirname "$0")/common.sh"
needs_camvid
train_camvid segformer_b2 0 1 2

#!/usr/bin/env bash
# Trains on one or more nodes without a scheduler. Start it on each of them with the same arguments:
#   NODES=2 GPUS=8 HEAD=node01:29500 experiments/cluster/torchrun.sh RUN --config FILE [options of fit]
# HEAD is the address of one of the nodes. If a process or node fails, the rest starts anew from the
# last checkpoint, MAX_RESTARTS times; NODES=1:2 goes on with one node and takes a second one back.
# RUN names the run folder, on a disk that all nodes share; the same line resumes it. docs/clusters.md
set -eu

run=${1:-}
if [[ -z $run || $run == -* ]]; then
    echo "error: give the name of the run first: torchrun.sh RUN --config FILE [options of fit]" >&2
    exit 2
fi
shift
head=${HEAD:-localhost:0} # one node, with any free port

# By default the processes of a restart meet in the store of those before, with their addresses, and
# wait for them (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# SIGTERM and SIGUSR1 end the training with a checkpoint, for which it gets two minutes.
exec ${PYTHON:-python} -m torch.distributed.run \
    --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="$run" \
    --max-restarts="${MAX_RESTARTS:-10}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=120 \
    -m segformer_pl fit "$@" --run_name="$run"

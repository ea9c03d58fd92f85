# Sourced by the numbered scripts, which are called as
#   experiments/gpu/N_NAME.sh OUTPUT [--smoke]
# Each stops after nine minutes of one H100 or H200 and 16 cores and writes to the folder OUTPUT.
# Called again with the same OUTPUT, it goes on where it was. CAMVID is the folder of CamVid's Parquet
# files. --smoke runs each kind of command once on a CPU: trainings with two steps on the data set
# `shapes`, benchmarks with small images, studies without training.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p "${1:?give the folder of the results}"
output=$(cd "$1" && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${2:-}" = --smoke ]; then
    smoke=yes device=cpu camvid=
else
    smoke= device=cuda camvid=${CAMVID-}
fi
end=$((SECONDS + 480)) # leaves a minute to a training that ends with a checkpoint

# limited COMMAND...: stop it at the end of the time of the whole script.
limited() {
    local status=124 left=$((end - SECONDS))
    if [ "$left" -gt 0 ]; then
        timeout --signal=TERM --kill-after=60 "$left" "$@" && return
        status=$?
    fi
    [ "$status" = 124 ] || exit "$status" # 124: it was stopped
    echo "stopped at the end of the time; the same call goes on"
    exit
}

# Eight small trainings share a GPU at 145 steps a second with this service, and 99 without.
share_gpu() {
    [ "$smoke" ] || nvidia-cuda-mps-control -d 2>/dev/null || true
}

# needs_camvid: exit with a sentence where CamVid is needed and not given.
needs_camvid() {
    if [ -z "$smoke" ] && [ ! -d "$camvid" ]; then
        echo "error: give the folder of CamVid's Parquet files as CAMVID=FOLDER" >&2
        exit 2
    fi
}

# train_camvid NETWORK SEED...: B0's experiment to convergence, all seeds side by side.
train_camvid() {
    local network=$1 seed jobs=
    shift
    share_gpu
    local settings=(--trainer.accelerator gpu --trainer.precision bf16-mixed
        --trainer.val_check_interval 1000 --data.path "$camvid")
    if [ "$smoke" ]; then
        settings=(--trainer.accelerator cpu --trainer.max_steps 2 --trainer.val_check_interval 2
            --trainer.limit_val_batches 1 --trainer.callbacks null --model.warmup_steps 1
            --data.dataset shapes --data.crop_size '[64,64]' --data.num_workers 0)
        set -- "$1"
    fi
    for seed; do
        limited "$python" -m segformer_pl fit --config experiments/camvid_b0.yaml \
            --model.network.class_path "segformer_pl.models.$network" --seed_everything "$seed" \
            --trainer.logger.init_args.save_dir "$output" --trainer.logger.init_args.name "$network" \
            --run_name "seed$seed" --trainer.enable_progress_bar false "${settings[@]}" \
            >>"$output/$network.seed$seed.log" 2>&1 &
        jobs+=" $!"
    done
    local status=0 job
    for job in $jobs; do
        wait "$job" || status=$?
    done
    tail -n 1 "$output/$network".seed*.log
    return "$status"
}

# study COMMAND FILE BUDGET ARGUMENTS...: an ablation or an arena.
study() {
    local command=$1 file=$2 budget=$3
    shift 3
    if [ "$smoke" ]; then # checks the study and every variant, and trains nothing
        set -- --wandb_sweep "$output/$(basename "$file")"
    fi
    share_gpu
    limited "$python" -m segformer_pl "$command" "$file" --budget "$budget" \
        --output "$output" "$@"
}

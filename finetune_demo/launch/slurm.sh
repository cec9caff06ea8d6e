#!/usr/bin/env bash
# The same in a Slurm allocation, on a disk that all nodes share: sbatch --nodes 8 finetune_demo/launch/slurm.sh BASE DATA
# A requeued job, or the same line submitted again, goes on from the newest checkpoint of RUN.
#SBATCH --job-name=sat_lora
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
usage="Usage: sbatch --nodes N slurm.sh BASE TRAIN_DATA [option ...]
BASE: the SAT folder of the base; TRAIN_DATA: a folder of images LABEL.png, or a .jsonl file.
Environment: NUM_GPUS (those of a node, or 8), RUN (runs/finetune), TOKENIZER (BASE), MASTER_PORT (from the job's number)."
if [[ -z ${SLURM_JOB_ID-} ]]; then
    printf 'slurm.sh: there is no Slurm job here\n%s\n' "$usage" >&2
    exit 2
fi
# slurmd runs a copy of this file from its own folder; the job remembers where it was submitted from.
# It tells the path and then the arguments, and there may be spaces in all of them.
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
while [[ ! -f $script && $script == *" "* ]]; do
    script=${script% *}
done
[[ -f $script ]] || script=$0
# shellcheck source=SCRIPTDIR/command.sh
source "$(dirname "$script")/command.sh"

set_command "$@"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# `--`: torchrun would take the script's --r for one of its own --rdzv_..., and stop.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-8}}" \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${hosts[0]}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" \
    -- "${command[@]}"

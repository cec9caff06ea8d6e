# shellcheck shell=bash disable=SC2034,SC2054,SC2154  # `usage` comes from, `command` and `launcher` go to the script that sources this
# To be sourced by the launch scripts: what every rank runs, whoever starts it.
#
# set_command BASE TRAIN_DATA [option ...]   fills the array `command`; with fewer arguments it prints `$usage`, status 2
#   RUN        the run folder (runs/finetune); one that holds a checkpoint is gone on with, other results are refused
#   TOKENIZER  its folder (BASE)
# The base says --version and --max_length, or its family does; options that are added say others.
# launcher: `deepspeed`, as it can be started where it lies

launcher=(deepspeed)
if [[ $(type -P deepspeed) == *" "* ]]; then
    # The program names its interpreter in its first line, which ends at the first space of a path.
    launcher=("$(dirname "$(type -P deepspeed)")/python" -m deepspeed.launcher.runner)
fi

set_command() {
    if (($# < 2)); then
        printf '%s\n' "$usage" >&2
        exit 2
    fi
    local base=$1 data=$2 run=${RUN:-runs/finetune} demo
    shift 2
    demo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    command=(
        "$demo/finetune_cogvlm.py"
        --from_pretrained "$base"
        --local_tokenizer "${TOKENIZER:-$base}"
        --train-data "$data"
        --split 0.95,0.05
        --r 16 --lora_alpha 32
        --lr 1e-4 --warmup 0.02 --lr-decay-style cosine
        --batch-size 4 --epochs 1
        --checkpoint-activations --vit_checkpoint_activations
        --deepspeed_config "$demo/zero2_bf16.json"
        --save "$(dirname "$run")" --experiment-name "$(basename "$run")"
    )
    if [[ -f $run/checkpoints/latest ]]; then
        command+=(--resume "$run")
    elif ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ ! -e $run/adapter/latest ]]; then
        command+=(--overwrite)  # this job's own: it was requeued before its first save
    fi
    command+=("$@")
}

#!/usr/bin/env bash
# LoRA on a real CogVLM checkpoint with the GPUs of this machine.
set -euo pipefail
usage="Usage: one_machine.sh BASE TRAIN_DATA [option ...]
BASE: the SAT folder of the base; TRAIN_DATA: a folder of images LABEL.png, or a .jsonl file.
Environment: NUM_GPUS (8), RUN (runs/finetune), TOKENIZER (BASE)."
# shellcheck source=SCRIPTDIR/command.sh
source "$(dirname "$0")/command.sh"

set_command "$@"
exec "${launcher[@]}" --num_gpus "${NUM_GPUS:-8}" "${command[@]}"

#!/usr/bin/env bash
# LoRA on a real CogVLM checkpoint with 8 GPUs of one machine. Usage: finetune_cogvlm_8gpu.sh BASE TRAIN_DATA [option ...]
set -euo pipefail
base=${1:?the SAT folder of the base} data=${2:?a folder of images LABEL.png, or a .jsonl file}
shift 2
here=$(cd "$(dirname "$0")" && pwd)

deepspeed --num_gpus "${NUM_GPUS:-8}" "$here/finetune_cogvlm.py" \
    --from_pretrained "$base" \
    --local_tokenizer "${TOKENIZER:-$base}" \
    --train-data "$data" \
    --split 0.95,0.05 \
    --version base \
    --max_length 1288 \
    --r 16 --lora_alpha 32 \
    --lr 1e-4 --warmup 0.02 --lr-decay-style cosine \
    --batch-size 4 --epochs 1 \
    --checkpoint-activations --vit_checkpoint_activations \
    --deepspeed_config "$here/zero2_bf16.json" \
    "$@"

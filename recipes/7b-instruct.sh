#!/usr/bin/env bash
# RM-R1-Qwen2.5-Instruct-7B, both stages. Hardware: 1 node of 8 x 80 GB (the paper's), 200 GB of host memory.
# More nodes: NODES=2 HEAD=first-node bash recipes/7b-instruct.sh on each, from one shared folder.
# Numbers are the presets'; `python grpo.py --preset paper-7b-instruct --model Qwen/Qwen2.5-7B-Instruct --dry-run 8`.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
launch=(torchrun --nnodes="${NODES:-1}" --nproc_per_node=8
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:29500")
"${launch[@]}" --rdzv_id=sft sft.py --preset paper-7b --out runs/7b-instruct/sft
"${launch[@]}" --rdzv_id=grpo grpo.py --preset paper-7b-instruct --model runs/7b-instruct/sft \
    --out runs/7b-instruct/grpo

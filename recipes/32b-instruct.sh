#!/usr/bin/env bash
# RM-R1-Qwen2.5-Instruct-32B, both stages. Hardware: 4 nodes of 8 x 80 GB (the paper's), 200 GB of host memory each.
# On all four, from one shared folder: HEAD=first-node bash recipes/32b-instruct.sh. By the estimate one node of
# 8 x 141 GB is enough (NODES=1, 800 GB of host memory), one of 8 x 80 GB is not;
# `python grpo.py --preset paper-32b-instruct --model Qwen/Qwen2.5-32B-Instruct --tp 4 --dry-run 32` prints it.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
launch=(torchrun --nnodes="${NODES:-4}" --nproc_per_node=8
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:29500")
"${launch[@]}" --rdzv_id=sft sft.py --preset paper-32b --out runs/32b-instruct/sft
"${launch[@]}" --rdzv_id=grpo grpo.py --preset paper-32b-instruct --model runs/32b-instruct/sft \
    --out runs/32b-instruct/grpo --tp 4

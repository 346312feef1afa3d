#!/usr/bin/env bash
# RM-R1-Qwen2.5-Instruct-14B, both stages. Hardware: 2 nodes of 8 x 80 GB (the paper's), 200 GB of host memory each.
# On both, from one shared folder: HEAD=first-node bash recipes/14b-instruct.sh. By the estimate one node is enough
# (NODES=1, 360 GB of host memory); `python grpo.py --preset paper-14b-instruct --model Qwen/Qwen2.5-14B-Instruct
# --tp 2 --dry-run 8` prints it.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
launch=(torchrun --nnodes="${NODES:-2}" --nproc_per_node=8
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:29500")
"${launch[@]}" --rdzv_id=sft sft.py --preset paper-14b --out runs/14b-instruct/sft
"${launch[@]}" --rdzv_id=grpo grpo.py --preset paper-14b-instruct --model runs/14b-instruct/sft \
    --out runs/14b-instruct/grpo --tp 2

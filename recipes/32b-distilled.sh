#!/usr/bin/env bash
# RM-R1-DeepSeek-Distilled-Qwen-32B, stage 2 alone. Hardware: 4 nodes of 8 x 80 GB (the paper's), 200 GB of host memory
# each. On all four, from one shared folder: HEAD=first-node bash recipes/32b-distilled.sh. By the estimate one node of
# 8 x 141 GB is enough (NODES=1, 800 GB of host memory), one of 8 x 80 GB is not;
# `python grpo.py --preset paper-32b-reasoning --tp 4 --dry-run 32` prints it.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
torchrun --nnodes="${NODES:-4}" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=grpo \
    --rdzv_endpoint="${HEAD:-localhost}:29500" \
    grpo.py --preset paper-32b-reasoning --out runs/32b-distilled/grpo --tp 4

#!/usr/bin/env bash
# RM-R1-DeepSeek-Distilled-Qwen-14B, stage 2 alone. Hardware: 2 nodes of 8 x 80 GB (the paper's), 200 GB of host memory
# each. On both, from one shared folder: HEAD=first-node bash recipes/14b-distilled.sh. By the estimate one node is
# enough (NODES=1, 360 GB of host memory); `python grpo.py --preset paper-14b-reasoning --tp 2 --dry-run 8` prints it.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
torchrun --nnodes="${NODES:-2}" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=grpo \
    --rdzv_endpoint="${HEAD:-localhost}:29500" \
    grpo.py --preset paper-14b-reasoning --out runs/14b-distilled/grpo --tp 2

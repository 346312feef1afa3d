#!/usr/bin/env bash
# RM-R1-DeepSeek-Distilled-Qwen-7B, stage 2 alone. Hardware: 1 node of 8 x 80 GB (the paper's), 200 GB of host memory.
# More nodes: NODES=2 HEAD=first-node bash recipes/7b-distilled.sh on each, from one shared folder.
# Numbers are the preset's; `python grpo.py --preset paper-7b-reasoning --dry-run 8` prints what they need.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # seconds that SIGTERM leaves a round to finish and save
torchrun --nnodes="${NODES:-1}" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=grpo \
    --rdzv_endpoint="${HEAD:-localhost}:29500" \
    grpo.py --preset paper-7b-reasoning --out runs/7b-distilled/grpo

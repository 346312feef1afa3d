#!/usr/bin/env bash
# Both stages on one card, Qwen2.5-0.5B-Instruct. Hardware: 1 x 24 GB, 16 GB of host memory. No run of the paper's.
# bash recipes/one-gpu.sh Qwen/Qwen2.5-1.5B-Instruct takes a card of 48 GB: weights, gradients and Adam alone are
# 16 bytes a parameter, 24.7 GB. The sizes come from `python grpo.py --preset one-gpu --model Qwen/Qwen2.5-0.5B-Instruct
# --dry-run 1 --gpu-gb 24`; the learning rate is a guess.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/one-gpu/$(basename "${1:-Qwen/Qwen2.5-0.5B-Instruct}")
python sft.py --preset one-gpu --model "${1:-Qwen/Qwen2.5-0.5B-Instruct}" --out "$run/sft"
python grpo.py --preset one-gpu --model "$run/sft" --out "$run/grpo"

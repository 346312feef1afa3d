"""Dr. GRPO: advantages without the division by std, the loss without the division by length. arXiv 2503.20783

    A_i = r_i - mean(r)          L = 1 / (G * max_response_tokens) * sum_i sum_t loss_it

    python -m variants.dr_grpo --preset tiny
    python grpo.py --preset tiny --agg const --no-scale-by-std                   the same

Both divisions are biases. 1 / std gives large weights to prompts on which nearly all samples agree. 1 / |o_i| gives
each token of a long wrong response a small penalty, so that wrong responses grow. Both are settings of grpo.py, so
this file has no new code. The size of the constant hardly matters, because AdamW ignores a factor on all gradients.
"""

from __future__ import annotations

from dataclasses import replace

import grpo
from runtime import cli

PRESETS = {
    name: replace(base, agg="const", scale_by_std=False, out=f"{base.out}-dr-grpo")
    for name, base in grpo.PRESETS.items()
}

if __name__ == "__main__":
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS)))

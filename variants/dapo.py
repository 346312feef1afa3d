"""DAPO: clip-higher, the mean per token, and groups without spread replaced from the stream. arXiv 2503.14476

    keep a group if its rewards are not all equal     ratio in [1 - 0.2, 1 + 0.28]     mean over all tokens, no KL

    python -m variants.dapo --preset tiny
    python grpo.py --preset tiny --clip-high 0.28 --agg token --kl-coef 0        the same without dynamic sampling

A group of equal rewards has no advantage, and as a judge gets better more groups are of that kind: a round of P
prompts trains on ever fewer. Dynamic sampling draws on until P groups differ. `reward/mean` is then the mean of the
groups that were kept and stays near the middle by construction; read eval/accuracy. Left out: the soft penalty on
overlong responses.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import grpo
from runtime import cli

PRESETS = {
    name: replace(base, clip_low=0.2, clip_high=0.28, agg="token", kl_coef=0.0, out=f"{base.out}-dapo")
    for name, base in grpo.PRESETS.items()
}


def differ(rewards: Tensor) -> Tensor:
    """`Method.keep`: (P, G) rewards -> (P,) bool. Where nothing differs any more, grpo.py gives up."""
    return (rewards != rewards[:, :1]).any(dim=1)


if __name__ == "__main__":
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), grpo.Method(keep=differ)))

"""StableReinforce (R1-Reward): log-ratios are clipped before the exponential, outliers left out. arXiv 2505.02835

    ratio = exp( clip( log pi - log pi_old, ln 1e-3, ln 1e3 ) ), then the usual clipped surrogate     (pre-clip)
    A = (r - mean) / std over the whole round;  A = 0 where |A| > 3                                   (advantage filter)

    python -m variants.stable_reinforce --preset tiny

PPO's clip does not bound the loss of a token that became likelier although A < 0: it grows with the ratio. Where the
exponential overflows, even a clipped token gets the gradient 0 * inf. The filter is for rounds in which nearly all
rewards are equal: with rewards of +1 and -1, once more than 90 % of a round are right, a wrong verdict lies more than
3 deviations away and is left out.

Mean and std are taken over the round, not over the group, as in REINFORCE++, from which the method starts. The loss
follows the authors' code. The filter does too, except that its bounds are 3 around 0 here and 3 around the mean
there. Left out: the consistency reward (a second model checks whether reasoning and verdict agree) and the images.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

import grpo
from batch import Batch, aggregate
from runtime import cli, ranks

PRE_CLIP = math.log(1e3)  # nats
DEVIATIONS = 3.0

PRESETS = {name: replace(base, out=f"{base.out}-stable") for name, base in grpo.PRESETS.items()}


def filtered_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """(P, G) rewards of each rank -> (P, G); mean and (biased) std over all ranks.

    >>> filtered_advantages(torch.tensor([[1.0] * 11 + [-1.0]]))[0, [0, -1]]
    tensor([0.3015, 0.0000])
    >>> filtered_advantages(torch.tensor([[1.0] * 8 + [-1.0]]))[0, [0, -1]]
    tensor([ 0.3536, -2.8284])
    """
    every = torch.cat(ranks.gather(rewards.double().cpu()))
    centred = rewards.double() - every.mean()
    standard = centred / every.std(correction=0).clamp(min=1e-4)
    advantages = standard if scale_by_std else centred
    return advantages.masked_fill(standard.abs() > DEVIATIONS, 0.0).to(rewards.dtype)


def stable_loss(logprobs: Tensor, batch: Batch, cfg: grpo.Config,
                divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`Method.loss`: grpo's surrogate of the pre-clipped log-ratio; KL sees the log-probs as they are."""
    assert batch.ref_logprobs is not None
    old = grpo.old_logprobs(logprobs, batch)
    log_ratio = logprobs - old
    near = old + log_ratio.clamp(-PRE_CLIP, PRE_CLIP)
    surrogate, stats = grpo.grpo_loss(near, batch, replace(cfg, kl_coef=0.0), divisor)
    kl = grpo.kl_k3(logprobs, batch.ref_logprobs)
    stats |= {"policy/ref_kl": kl.detach(), "policy/pre_clip_fraction": (log_ratio.abs() > PRE_CLIP).float()}
    return surrogate + aggregate(cfg.kl_coef * kl, batch, cfg.agg, divisor), stats


if __name__ == "__main__":
    method = grpo.Method(advantage=filtered_advantages, loss=stable_loss)
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), method))

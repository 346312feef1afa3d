# %% [markdown]
# # One round, step by step
#
# From two responses to changed weights, once, with the tiny model of `toy/`; ten seconds on one core. The calls are
# those that `sft.py` and `grpo.py` make; only their loops are left out. Equation numbers are the paper's
# ([equations.md](equations.md)).
#
# Letters for shapes: P prompts, G responses to each, R packed rows, T input tokens in a row, N response tokens.
#
# `walkthrough.py` is the source of this notebook; `python -m course.notebook` runs it and writes `walkthrough.ipynb`.

# %% [markdown]
# ## The world
#
# A folder with a tokenizer, an untrained model and pairs. Everything runs in float64 here, so that another processor's
# rounding cannot turn one sampled token into another; real runs store float32 and compute in bfloat16.

# %%
import sys
from pathlib import Path

sys.path.insert(0, next(str(folder) for folder in (Path.cwd(), Path.cwd().parent) if (folder / "grpo.py").exists()))

import contextlib
import copy
import io
import math
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import batch as packing
import data
import grpo
import model
import sft
from cor_prompt import encode_prompt, parse_trace, render
from loading.tokenizer import load_tokenizer
from ops import attention
from reward import parse_verdict
from rollout import TorchSampler
from toy import files
from toy.files import Build

torch.set_printoptions(precision=3, linewidth=110, sci_mode=False)
place = tempfile.TemporaryDirectory()
world = f"{place.name}/toy"
with contextlib.redirect_stdout(io.StringIO()):  # it names the folder, which is another one each time
    files.build(Build(world, sft_pairs=96, rl_pairs=4, held_out_pairs=1, sft_held_out_pairs=1))
tokenizer = load_tokenizer(f"{world}/start")
policy = model.load_policy(f"{world}/start", torch.float64)
print("weights:", sum(weight.numel() for weight in policy.parameters()))
print("vocabulary:", len(tokenizer))

# %% [markdown]
# Two layers, 64 wide. The vocabulary is whole words, digits and the tags of a chain.
#
# ## The pair (Eq. 1)
#
# A conversation, two responses, and which is better.

# %%
pairs = data.load_pairs(f"{world}/rl.jsonl")
for one in pairs:
    print(one.pair_id, one.category, "|", one.context[-1]["content"], "| A:", one.response_a, "| B:", one.response_b)
print("winners:", [one.winner for one in pairs])

# %% [markdown]
# A line is a pair: its name, its kind, the question, both responses. These four are our round, P = 4. A question about
# a sum is a Reasoning task, a request for a sentence with three rules is Chat. The winner is all that reinforcement
# learns from; nobody says why A or B is better.
#
# ## The prompt
#
# The judge sees the question and both responses under section markers. In the tiny world the system message is the one
# word `judge`; the real one explains the task, the tags and the order.

# %%
messages = render(pairs[0], "instruct", "judge")
print(messages[1]["content"])
print("characters of the real system message:", len(render(pairs[0], "instruct")[0]["content"]))
prompts = [encode_prompt(render(one, "instruct", "judge"), tokenizer) for one in pairs]
print("tokens of each prompt:", [len(prompt) for prompt in prompts])
print("first ids:", prompts[0][:6], "=", tokenizer.convert_ids_to_tokens(prompts[0][:6]))
print("last ids: ", prompts[0][-4:], "=", tokenizer.convert_ids_to_tokens(prompts[0][-4:]))

# %% [markdown]
# First the user's message of the first pair, as text. The tiny system message stands for one of 2,519 characters. The
# ids are the whole prompt with the chat template around it: `<|im_start|>` and `<|im_end|>` are its control tokens. No
# response can bring such a token along, whatever characters it holds, so none can open a turn. The prompt ends where
# the judge begins to write. In this vocabulary a section marker is one token.
#
# ## Stage 1: the form (Eq. 4 to 6)
#
# An untrained model writes noise, all rewards would be -1, and a group of equal rewards teaches nothing. So a teacher's
# chains come first: forty steps on 96 of them. That is enough for the form and far too little for good judgement, which
# is what we want to look at: some verdicts right, some wrong.

# %%
taught = data.load_pairs(f"{world}/sft.jsonl")
print(taught[0].trace)
print(parse_trace(taught[0].trace or ""))
settings = sft.PRESETS["tiny"]
examples = sft.encode_pairs(taught, tokenizer, settings, "judge")
print("first example:", len(examples[0].prompt_ids), "prompt tokens,", len(examples[0].responses[0]), "trace tokens")
optimizer = torch.optim.AdamW(policy.parameters(), settings.lr, settings.betas, weight_decay=0.0)
for step in range(40):
    drawn = data.stream(examples, 16 * step, 16, seed=0)
    nll, tokens = sft.nll_loss(policy, drawn, settings, backward=True)
    norm = model.optimizer_step(policy, optimizer, settings.lr * min(1, (step + 1) / 5), max_norm=1.0)
    if step in (0, 10, 20, 39):
        print(f"step {step:2}: {nll / tokens:.2f} nats per token over {tokens} tokens, gradient norm {norm:.1f}")
print(f"a guess among 96 tokens: {math.log(96):.2f} nats")

# %% [markdown]
# First the teacher's chain as text, then taken apart by `parse_trace` (only reports and the format reward need that).
# The 45 trace tokens count the end of turn. A step is 16 examples, and the mean is over their trace tokens alone. It
# starts near what a guess costs, because nothing is known yet. Then the fixed parts of a chain are learnt, whose tokens
# cost almost nothing from there on; what remains is what a chain decides. The gradient norm is taken before it is
# clipped to 1.
#
# The weights of this moment are kept: they are the **reference** of stage 2.
#
# ## The rollouts
#
# G = 4 samples for each prompt at temperature 1. A group stands together: rollouts 0 to 3 belong to the first prompt.

# %%
reference = copy.deepcopy(policy).requires_grad_(False)
sampler = TorchSampler(policy.lm, tokenizer, shared=True)
rollouts = sampler.generate(prompts, n=4, temperature=1.0, max_tokens=60, seeds=[1, 2, 3, 4])
first = rollouts[0]
print(first.text)
print("response_ids:", first.response_ids[:6], "... of", len(first.response_ids), "| ended by:", first.finish_reason)
print("sampler_logprobs:", torch.tensor(first.sampler_logprobs)[:6], "...")
lengths = torch.tensor([len(one.response_ids) for one in rollouts]).view(4, 4)  # (P, G)
print("lengths", tuple(lengths.shape))
print(lengths)

# %% [markdown]
# Our judge has the form and hardly any sense: its rubric is not the request's. The text is for reading and for the
# verdict alone. Training goes on with `response_ids` as they were sampled and never encodes the text again. A
# log-probability near 0 is a token that the model was sure of: those of the form. `stop` means that the end of turn was
# sampled, which is one of the ids; at 60 tokens a response would have been cut off. A row of lengths is a group.
#
# ## The reward (Eq. 8)
#
# +1 where the last 80 characters hold the winner's tag, else -1. No verdict counts as wrong.

# %%
verdicts = [parse_verdict(one.text) for one in rollouts]
for p, one in enumerate(pairs):
    print("winner", one.winner, "| verdicts", verdicts[4 * p : 4 * p + 4])
rewards = grpo.verdict_score(rollouts, pairs, policy, tokenizer, grpo.PRESETS["tiny"])  # (P, G)
print("rewards", tuple(rewards.shape))
print(rewards)

# %% [markdown]
# A row is a group, its four columns are the four samples. All four of the first group are wrong.
#
# ## The advantages (Eq. 10)
#
# What a reward is worth against the others of its group: minus the mean, divided by the standard deviation (unbiased:
# three in the denominator for four samples).

# %%
advantages = grpo.group_advantages(rewards)  # (P, G)
print("means", rewards.mean(1), "deviations", rewards.std(1))
print("advantages", tuple(advantages.shape))
print(advantages)

# %% [markdown]
# Now as a picture: a bar is a response, a colour a group.

# %%
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for p in range(4):
    axis.bar(range(4 * p, 4 * p + 4), advantages[p], label=f"group {p}")
axis.set(xlabel="response", ylabel="advantage", xticks=range(16), xlim=(-0.6, 18.5))
axis.axhline(0, color="black", linewidth=0.8)
_ = axis.legend(fontsize=8)

# %% [markdown]
# Means and deviations are one for each group. Every row of advantages sums to zero. One wrong among three right gets
# -1.5 and each right one 0.5; two and two get 0.866 and -0.866. The first group's rewards are equal, so it has nothing
# to say, and yet it will count in the mean. Each token of a response gets the advantage of its response.
#
# ## The packed row
#
# First a group small enough to draw: a prompt of four tokens, responses of three, four and two; 2 is the end of turn.

# %%
small = packing.collate([packing.Group([10, 11, 12, 13], [[20, 21, 2], [30, 31, 32, 2], [40, 2]])], [0], "cpu")
for name in ("inputs", "position_ids", "response", "targets", "source", "sequence"):
    tensor = getattr(small, name)
    print(f"{name:12} {tuple(tensor.shape)!s:8}", tensor.flatten().tolist())
sees = attention.visible(small.group, small.response)[0, 0]  # (T, T)
print("visible", tuple(sees.shape))
for line in sees:
    print(" ".join("x" if seen else "." for seen in line.tolist()))

# %% [markdown]
# `inputs` is one row (R = 1): the prompt once, then the responses one after the other, each without its last token,
# because nothing follows it. `position_ids` start again after the prompt. `response` says whose a token is, 0 being
# the prompt. The N = 9 `targets` are all sampled tokens. `source` is the index of the token that predicts each: index
# 3, the end of the prompt, predicts all three first tokens. `sequence` numbers the responses for the mean over each.
#
# In the drawing a line is a token and an x what it sees: the prompt, and the earlier tokens of its own response. So a
# prompt is computed once for its whole group, and no response sees another. The same as a picture, each response in a
# colour of its own:

# %%
figure, axis = plt.subplots(figsize=(4, 3.6), layout="constrained")
axis.imshow((small.response[0][:, None] + 1) * sees, cmap="magma_r")
axis.set(xlabel="is seen", ylabel="sees", xticks=range(10), yticks=range(10))
names = ["p0", "p1", "p2", "p3", "a0", "a1", "b0", "b1", "b2", "c0"]
axis.set_xticks(range(10), names)
_ = axis.set_yticks(range(10), names)

# %% [markdown]
# Now our round: four groups, a row each.

# %%
groups = grpo.make_groups(rollouts, advantages)
batch = packing.collate(groups, range(4), "cpu")
for name in ("inputs", "position_ids", "targets", "source", "sequence", "advantages", "sampler_logprobs"):
    print(f"{name:16}", tuple(getattr(batch, name).shape))
alone = sum(len(one.prompt_ids) + len(one.response_ids) - 1 for one in rollouts)
packed = sum(map(packing.group_tokens, groups))
print("tokens that are computed:", packed, "packed,", alone, "with the prompt once per response")
print("padding at the ends of the rows:", batch.inputs.numel() - packed)

# %% [markdown]
# R and T are the two numbers of `inputs`; what has one number is (N,), one value for each sampled token of the round:
# 758 is the sum of the lengths above. Real prompts are long beside their responses, so sharing them saves more there.
# The rows are as long as the longest; what the others lack is padding, which carries no value.
#
# ## Log-probabilities (Eq. 2)
#
# The policy returns the log-probability of each target. Three ways to get them must agree: the packed rows, the sampler
# with its cache, and a plain forward of one sequence.

# %%
logprobs = policy(batch, temperature=1.0).logprobs  # (N,)
print("logprobs", tuple(logprobs.shape), logprobs[:6].detach())
gap = (logprobs.detach() - batch.sampler_logprobs).abs().max().item()
whole = torch.tensor([first.prompt_ids + first.response_ids[:-1]])
logits = policy.lm(input_ids=whole, position_ids=torch.arange(whole.shape[1])[None],
                   attention_mask=torch.ones(1, 1, whole.shape[1], whole.shape[1]).tril().bool()).logits
plain = logits[0, len(first.prompt_ids) - 1 :].log_softmax(-1)
plain = plain.gather(1, torch.tensor(first.response_ids)[:, None])[:, 0]  # (tokens of the first response,)
print("packed and sampled agree to 1e-5:", gap < 1e-5)
print("packed and plain agree to 1e-9:", bool((plain - logprobs[: len(plain)]).abs().max() < 1e-9))

# %% [markdown]
# The first line repeats the sampler's numbers of above. The sampler's are handed over in float32, hence its wider
# bound. In a real run this difference is logged every round, because a stale or otherwise tempered sampler shows here
# first.
#
# ## The loss (Eq. 9)
#
# First its two parts, as functions of one number. Left: what a token's loss is at each ratio, for a good response
# (advantage 1) and a bad one (-1); dashed where nothing is clipped. Right: two estimates of the KL from one token, over
# d = log p_ref - log p.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
ratios, d = torch.linspace(0.3, 1.7, 141), torch.linspace(-2, 2, 101)
for colour, gain in (("C0", 1.0), ("C3", -1.0)):
    value, _ = grpo.clipped_surrogate(ratios.log(), torch.zeros(141), torch.full((141,), gain), 0.2, 0.2)
    left.plot(ratios, -gain * ratios, "--", color=colour, linewidth=0.8)
    left.plot(ratios, value, color=colour, label=f"advantage {gain:+.0f}")
left.axvspan(0.8, 1.2, color="grey", alpha=0.15)
left.set(xlabel="ratio", ylabel="loss of the token")
left.legend(fontsize=8)
right.plot(d, grpo.kl_k3(torch.zeros(101), d), label="k3: exp(d) - d - 1")
right.plot(d, -d, label="k1: -d")
right.axhline(0, color="black", linewidth=0.8)
right.set(xlabel="d", ylabel="estimate of the KL")
_ = right.legend(fontsize=8)

# %% [markdown]
# Four quadrants, left: a good response is clipped above the grey band and a bad one below it. There the line is flat
# and the token has no gradient any more. In the other two quadrants the ratio is outside the band too, but on the wrong
# side, and the loss goes on pulling it back. Right: both estimates have the KL as their mean over samples of the
# policy, but k3 is never negative, and near 0 it is d * d / 2, so its gradient pulls the policy to the reference; the
# gradient of k1 is the same for every token.
#
# Before the first step the policy is the one that sampled, and the reference too: every ratio is 1, every KL is 0.

# %%
cfg = replace(grpo.PRESETS["tiny"], steps=1, prompts_per_step=4, group_size=4, mini_batch=2,
              lr_schedule="constant", warmup_updates=0)
batch.old_logprobs, batch.ref_logprobs = logprobs.detach(), reference(batch, temperature=cfg.temperature).logprobs
total = packing.loss_divisor(groups, "seq", cfg.max_response_tokens)
loss, stats = grpo.grpo_loss(logprobs, batch, cfg, total)
print("responses that the sum is divided by:", total)
print("loss is zero:", abs(loss.item()) < 1e-6, "| largest KL is zero:", bool(stats["policy/ref_kl"].max() < 1e-9))
slope = torch.autograd.grad(loss, logprobs, retain_graph=True)[0]  # (N,)
for response in range(4, 8):  # the second group
    inside = batch.sequence == response
    a, n = advantages.flatten()[response].item(), int(inside.sum())
    print(f"response {response}: advantage {a:6.3f}, {n} tokens, slope of each {slope[inside][0].item():8.5f}"
          f", by hand {-a / n / total:8.5f}")
loss.backward()
grads = [weight.grad.norm() ** 2 for weight in policy.parameters() if weight.grad is not None]
print(f"gradient norm: {math.sqrt(sum(grads)):.3f}")

# %% [markdown]
# The loss is zero because the advantages of a group sum to zero; that says nothing about its gradient, whose norm over
# all weights is the last line. The slope is what reaches each token's log-probability: minus the advantage, divided by
# the length of its response and by the 16 responses. Going down the slope makes tokens of right responses likelier and
# those of wrong ones less likely, and pushes each token of a long response less than one of a short response.
#
# ## The update
#
# `update` does all of this for two mini-batches of two groups each: score old and reference, then a step for each.

# %%
policy.zero_grad()
optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
metrics = grpo.update(policy, reference, optimizer, rollouts, advantages, cfg)
for name in ("policy/approx_kl", "policy/ref_kl", "policy/clip_fraction", "policy/entropy", "optim/grad_norm",
             "optim/lr"):
    print(f"{name:22} {metrics[name]:.4f}")

# %% [markdown]
# In the first mini-batch ratio and KL are still 1 and 0. The second is scored with weights that the first has moved, so
# its ratios differ from 1, and `approx_kl` (against the policy that sampled) and `ref_kl` (against the reference) are
# no longer 0. Both are means over the tokens of both mini-batches, in nats, and equal in a first round, where sampler
# and reference are one. `clip_fraction` is the share of tokens whose ratio had left [0.8, 1.2] on the side that the
# advantage asks for: this step gives them nothing more. `entropy` is how undecided the policy is about a next token, in
# nats, `grad_norm` the mean norm of the two steps before clipping, `lr` the learning rate.
#
# ## What has changed

# %%
with torch.no_grad():
    after = policy(batch, temperature=1.0).logprobs  # (N,)
moved = torch.zeros(16, dtype=torch.float64).index_add(0, batch.sequence, after - batch.old_logprobs).view(4, 4)
print("change of each response's log-probability", tuple(moved.shape))
print(moved)
print("mean where the reward was +1:", f"{moved[rewards > 0].mean():.2f}", "| where it was -1:",
      f"{moved[rewards < 0].mean():.2f}")
ratio = (after - batch.old_logprobs).exp()
print(f"ratios of tokens: {ratio.min():.2f} to {ratio.max():.2f}")

# %% [markdown]
# A number of the matrix is the sum over the tokens of one response, new minus old, in nats. Compare the signs with the
# rewards: right responses became likelier and wrong ones less likely. Even the first group moved, whose advantages are
# zero: all responses share the weights. The ratios are those of single tokens, so the next step of a longer round would
# meet the clip. `grpo.py` does this 120 times with 16 pairs and groups of 8, samples from the new weights each time and
# now and then judges held-out pairs.

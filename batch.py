"""Token ids -> packed rows with shared prompts, who sees whom, and per-token values -> one number.

    responses   a = a0 a1 E      b = b0 b1 b2 E      c = c0 E          one prompt p0..p3, group of 3
                                                                       E = end-of-turn token

    index        0  1  2  3 |  4  5 |  6  7  8 |  9
    inputs      p0 p1 p2 p3 | a0 a1 | b0 b1 b2 | c0                    a response's last token is never an input
    position     0  1  2  3 |  4  5 |  4  5  6 |  4                    each response goes on from the prompt
    response     0  0  0  0 |  1  1 |  2  2  2 |  3                    0 is the prompt

    N = 9 targets (these columns do not line up with those above; `source` points to `index`)
    targets     a0 a1  E   b0 b1 b2  E   c0  E
    source       3  4  5    3  6  7  8    3  9                         the hidden state that predicts each target
    sequence     0  0  0    1  1  1  1    2  2

Token i sees the tokens j <= i of its group that belong to the prompt or to its own response.
A prompt goes through the model once for its whole group, and the result is exact. After this file only response
tokens carry values: per-token tensors are flat, shape (N,), without padding, label shift or mask. SFT uses the
same with one response per prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ops.attention import BLOCK, FLEX
from runtime.ranks import gather
from settings import Agg


@dataclass
class Group:
    """One prompt and its responses, as ids, with their advantages and the sampler's log-probs."""

    prompt_ids: list[int]
    responses: list[list[int]]
    advantages: list[float] | None = None  # one per response
    sampler_logprobs: list[list[float]] | None = None  # nats, one per response token


@dataclass
class Batch:
    """A micro-batch: R rows of T input tokens and N targets. Per-token values are (N,) float32."""

    inputs: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64
    group: Tensor  # (R, T) int64, which group; padding is the group -1
    response: Tensor  # (R, T) int64, which response of its group; 0 is the prompt
    source: Tensor  # (N,) int64, index into the flattened (R * T) hidden states
    targets: Tensor  # (N,) int64
    sequence: Tensor  # (N,) int64, which response a target belongs to
    weight: float = 1.0  # 0 for a filler batch
    advantages: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


# ---- which groups go together --------------------------------------------------------------------------


def group_tokens(group: Group) -> int:
    """Input tokens of a group: the prompt once, each response without its last token."""
    return len(group.prompt_ids) + sum(max(len(r) - 1, 0) for r in group.responses)


def split(groups: Sequence[Group], max_tokens: int) -> list[Group]:
    """Cut groups that exceed the budget into several with the same prompt; a response that
    alone exceeds it becomes a piece of its own.

    A piece whose responses are all empty has no targets and is left out; `loss_divisor` still counts them.
    """
    pieces: list[Group] = []
    for group in groups:
        start, size = 0, len(group.prompt_ids)
        for i, response in enumerate(group.responses):
            extra = max(len(response) - 1, 0)
            if i > start and size + extra > max_tokens:
                pieces.append(_part(group, start, i))
                start, size = i, len(group.prompt_ids)
            size += extra
        pieces.append(_part(group, start, len(group.responses)))
    return [piece for piece in pieces if any(piece.responses)]


def _part(group: Group, start: int, stop: int) -> Group:
    def cut(values):
        return None if values is None else values[start:stop]

    return replace(group, responses=group.responses[start:stop], advantages=cut(group.advantages),
                   sampler_logprobs=cut(group.sampler_logprobs))


def plan(groups: Sequence[Group], max_tokens: int, count: int | None = None, one_row: bool = False) -> list[list[int]]:
    """This rank's micro-batches as indices into `groups` (what `split` returned), longest groups first.

    A micro-batch costs rows x longest row (SDPA pads), or the sum of its tokens with `one_row`
    (FlexAttention skips what is not visible). `count` asks for at least that many micro-batches, because
    every rank must make the same number of passes; the ones that are missing are []. The list is never empty.
    """
    sizes = [group_tokens(group) for group in groups]

    def cost(members: list[int]) -> int:
        return sum(sizes[i] for i in members) if one_row else len(members) * sizes[members[0]]

    batches: list[list[int]] = []
    for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        if not batches or cost([*batches[-1], i]) > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches + [[] for _ in range((count or 1) - len(batches))]


# ---- groups -> tensors ---------------------------------------------------------------------------------


@dataclass
class Row:
    """One row while groups are added to it: lists with one entry per input token."""

    inputs: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    response: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], positions: Iterable[int], group: int, response: int) -> None:
        self.inputs += ids
        self.position_ids += positions
        self.group += [group] * len(ids)
        self.response += [response] * len(ids)

    def pad(self, width: int) -> None:
        """Fill up with a group that no real token sees."""
        missing = [0] * (width - len(self.inputs))
        self.add(missing, missing, -1, 0)


@dataclass
class Targets:
    """A micro-batch's targets while groups are added: lists with one entry per target (response token)."""

    source: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)


def collate(groups: Sequence[Group], indices: Sequence[int], device: torch.device | str,
            one_row: bool = False) -> Batch:
    """Pack the groups `indices` into rows: one group a row, or with `one_row` all in one row of whole tiles.

    [] gives a filler batch, one token with weight 0: every rank makes the same passes, and this one counts for
    nothing.
    Raises ValueError for a group without a prompt, because nothing would predict its first token.
    """
    if not indices:
        return replace(collate([Group([0], [[0]], [0.0], [[0.0]])], [0], device, one_row), weight=0.0)
    members: list[list[int]] = [list(indices)] if one_row else [[i] for i in indices]
    width = max(sum(group_tokens(groups[i]) for i in row) for row in members)
    width = max(2, -(-width // BLOCK)) * BLOCK if one_row else width  # one tile would get a graph of its own
    rows, flat = [Row() for _ in members], Targets()
    for r, row in enumerate(rows):
        for i in members[r]:
            _append(row, flat, groups[i], i, r * width)
        row.pad(width)

    def ints(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def floats(values: list[float], known: bool) -> Tensor | None:
        return torch.tensor(values, dtype=torch.float32, device=device) if known else None

    first = groups[indices[0]]
    return Batch(
        inputs=ints([row.inputs for row in rows]), position_ids=ints([row.position_ids for row in rows]),
        group=ints([row.group for row in rows]), response=ints([row.response for row in rows]),
        source=ints(flat.source), targets=ints(flat.targets), sequence=ints(flat.sequence),
        advantages=floats(flat.advantages, first.advantages is not None),
        sampler_logprobs=floats(flat.sampler_logprobs, first.sampler_logprobs is not None),
    )


def _append(row: Row, flat: Targets, group: Group, number: int, offset: int) -> None:
    """Add one group to a row and its targets to the flat lists.

    `number` is the group's index and goes into `row.group`. `offset` is where the row begins among the flattened
    hidden states. `flat.sequence` numbers the responses of the micro-batch: the group's first response gets the last
    number plus 1. An empty response adds no target. Raises ValueError for a group without a prompt.
    """
    if not group.prompt_ids:
        raise ValueError("a group without a prompt: nothing predicts the first token of its responses")
    prompt = len(group.prompt_ids)
    first = flat.sequence[-1] + 1 if flat.sequence else 0
    row.add(group.prompt_ids, range(prompt), number, 0)
    last = offset + len(row.inputs) - 1  # the prompt's last token predicts every first token
    for k, ids in enumerate(group.responses):
        start = offset + len(row.inputs)
        row.add(ids[:-1], range(prompt, prompt + len(ids[:-1])), number, k + 1)
        flat.source += [last, *range(start, start + len(ids) - 1)] if ids else []
        flat.targets += ids
        flat.sequence += [first + k] * len(ids)
        if group.advantages is not None:
            flat.advantages += [group.advantages[k]] * len(ids)
        if group.sampler_logprobs is not None:
            flat.sampler_logprobs += group.sampler_logprobs[k]


# ---- per-token values -> one number --------------------------------------------------------------------


def loss_divisor(groups: Sequence[Group], agg: Agg, max_tokens: int) -> int:
    """This rank's share of what a mini-batch's loss is divided by; the caller adds up the ranks.

    An empty response counts in "seq" and "const": it was sampled, and said nothing.
    """
    responses = [r for g in groups for r in g.responses]
    return {
        "seq": len(responses),
        "token": sum(map(len, responses)),
        "const": len(responses) * max_tokens,
    }[agg]


def aggregate(per_token: Tensor, batch: Batch, agg: Agg, divisor: float) -> Tensor:
    """(N,) values -> scalar; summed over micro-batches and ranks it is the mean over the mini-batch.

    seq: mean over each response, then over responses (the paper's 1/|o_i|, Eq. 9); token: mean over all
    response tokens (DAPO); const: sum / (responses x max_tokens) (Dr. GRPO).

    >>> b = collate([Group([1], [[5, 6], [7]])], [0], "cpu")
    >>> [aggregate(torch.tensor([1.0, 2.0, 6.0]), b, a, d).item() for a, d in [("seq", 2), ("token", 3)]]
    [3.75, 3.0]
    """
    if agg == "seq":
        per_token = per_token / torch.bincount(batch.sequence)[batch.sequence]
    return per_token.sum() * (batch.weight / divisor)


def micro_batches(groups: Sequence[Group], max_tokens: int, device: torch.device | str,
                  one_row: bool | None = None) -> Iterator[Batch]:
    """This rank's groups -> its micro-batches. All ranks make the same number of them. On a GPU each is one row."""
    one_row = torch.device(device).type in FLEX if one_row is None else one_row
    pieces = split(groups, max_tokens)
    count = max(gather(len(plan(pieces, max_tokens, one_row=one_row))))
    for indices in plan(pieces, max_tokens, count, one_row):
        yield collate(pieces, indices, device, one_row)

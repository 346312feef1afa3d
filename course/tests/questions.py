"""Each probe calls one function of the course and returns what JSON can hold. Nothing is compared here.

Where a function calls another function of the course, a stand-in replaces that one, so that each function is graded
for itself. Stand-ins compute something odd on purpose: they show what was passed, and give no answer away.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from types import SimpleNamespace
from typing import Any

__tracebackhide__ = True  # pytest shows the student's own line, not ours


class Wrong(Exception):
    """What came back is no answer at all; the message is for the student."""


def answer(probe: str, arguments: list[Any]) -> Any:
    try:
        return json.loads(json.dumps(PROBES[probe](*arguments)))
    except Wrong as error:
        return {"wrong": str(error)}


def a_tensor(what: str, value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        raise Wrong(f"{what} must return a tensor, got {type(value).__name__}: {value!r}"[:300])
    return value


def backward(what: str, value: Any) -> None:
    """Leave slopes in .grad, or say why that cannot be."""
    if not a_tensor(what, value).requires_grad:
        raise Wrong(f"{what}: no gradient (slope) reaches its input; something cut the graph (.item(), .numpy(), "
                    ".detach(), torch.no_grad(), torch.tensor(...), or a constant)")
    value.backward()


@contextlib.contextmanager
def stand_ins(module: Any, **replacements: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in replacements}
    for name, value in replacements.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# ---- 1: prompt and verdict -----------------------------------------------------------------------------


def verdicts(texts: list[str], rule: str) -> list[str | None]:
    from reward import parse_verdict

    return [parse_verdict(text, rule) for text in texts]  # type: ignore[arg-type]


def default_verdict(text: str) -> str | None:
    from reward import parse_verdict

    return parse_verdict(text)


def data_block(context: list[Any], response_a: str, response_b: str) -> str:
    from cor_prompt import _data_block
    from data import Pair

    return _data_block(Pair("id", "test", tuple(context), response_a, response_b, "A"))


# ---- 2: packed rows and the NLL ------------------------------------------------------------------------


def seen(group: list[int], response: list[int]) -> list[list[bool]]:
    """(T, T): whether token q (rows) sees token k (columns)."""
    import torch

    from ops.attention import sees

    g, r, index = torch.tensor(group), torch.tensor(response), torch.arange(len(group))
    return sees(g[:, None], g[None, :], r[:, None], r[None, :], index[:, None], index[None, :]).tolist()


def append(rows: list[list[Any]], width: int, values: bool) -> dict[str, Any]:
    """Rows of (prompt, responses) groups appended one by one; with `values` advantages and log-probs too."""
    from batch import Group, Row, Targets, _append

    flat, lines, number = Targets(), [Row() for _ in rows], 0
    for r, row in enumerate(rows):
        for prompt, responses in row:
            more: tuple[Any, ...] = ()
            if values:
                logprobs = [[-0.5 * k - 0.25 * t for t in range(len(ids))] for k, ids in enumerate(responses)]
                more = [10.0 * number + k for k in range(len(responses))], logprobs
            _append(lines[r], flat, Group(prompt, responses, *more), number, r * width)
            number += 1
    return {"lines": [vars(line) for line in lines], "flat": vars(flat)}


def nll(values: list[list[float]], weight: float, others: int, ranks: int, backward: bool) -> dict[str, Any]:
    """nll_loss of a policy whose log-probs are weight * values of two micro-batches."""
    import torch

    import sft

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def forward(self, batch: Any, **_: Any) -> Any:
            return SimpleNamespace(logprobs=self.weight * batch.values, entropies=None)

    policy, told = Linear(), []

    def micro_batches(groups: Any, max_tokens: int, device: Any, *_: Any) -> Iterator[Any]:
        told.append(["max_tokens", max_tokens])
        yield from (SimpleNamespace(values=torch.tensor(part), weight=1.0) for part in values)

    def aggregate(per_token: Any, batch: Any, agg: str, divisor: float) -> Any:
        told.append(["aggregate", agg, divisor])
        return 5.0 * per_token.sum() / divisor  # the 5 shows whose sum is returned

    def loss_divisor(groups: Any, agg: str, max_tokens: int) -> int:
        told.append(["loss_divisor", agg])
        return sum(map(len, values))

    ranked = SimpleNamespace(gather=lambda value: [value, others], world_size=lambda: ranks, rank=lambda: 0)
    cfg = SimpleNamespace(micro_batch_tokens=77, max_length=999)
    with stand_ins(sft, micro_batches=micro_batches, aggregate=aggregate, loss_divisor=loss_divisor, ranks=ranked):
        total, tokens = sft.nll_loss(policy, [], cfg, backward)  # type: ignore[arg-type]
    grad = None if policy.weight.grad is None else policy.weight.grad.item()
    return {"total": float(total), "tokens": float(tokens), "grad": grad, "told": told}


# ---- 3: the equations of GRPO --------------------------------------------------------------------------


def advantages(rewards: list[list[float]], settings: dict[str, Any]) -> dict[str, Any]:
    """In float64, so that eps shows."""
    import torch

    from grpo import group_advantages

    given = torch.tensor(rewards, dtype=torch.float64)
    before = given.clone()
    found = a_tensor("group_advantages", group_advantages(given, **settings))
    return {"value": found.tolist(), "input_kept": bool((given == before).all())}


def surrogate(logprobs: list[float], old: list[float], advantage: list[float], low: float, high: float) -> Any:
    import torch

    from grpo import clipped_surrogate

    new, before, gain = torch.tensor(logprobs, requires_grad=True), torch.tensor(old), torch.tensor(advantage)
    found = clipped_surrogate(new, before, gain, low, high)
    if not isinstance(found, tuple) or len(found) != 2:
        raise Wrong(f"clipped_surrogate must return (loss, clipped), got {type(found).__name__}")
    value, won = (a_tensor("clipped_surrogate, for each of the two,", part) for part in found)
    backward("clipped_surrogate's loss", value.sum())
    kept = [before.tolist() == torch.tensor(old).tolist(), gain.tolist() == torch.tensor(advantage).tolist()]
    return {"value": value.tolist(), "clipped": won.tolist(), "slope": new.grad.tolist(), "input_kept": all(kept)}


def kl(logprobs: list[float], reference: list[float]) -> Any:
    import torch

    from grpo import kl_k3

    new = torch.tensor(logprobs, requires_grad=True)
    value = a_tensor("kl_k3", kl_k3(new, torch.tensor(reference)))
    backward("kl_k3", value.sum())
    return {"value": value.tolist(), "slope": new.grad.tolist()}


def one_number(values: list[float], sequence: list[int], weight: float, agg: str, divisor: float) -> Any:
    import torch

    from batch import Batch, aggregate

    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(none, none, none, none, none, none, torch.tensor(sequence), weight)
    given = torch.tensor(values, requires_grad=True)
    found = aggregate(given, batch, agg, divisor)  # type: ignore[arg-type]
    if a_tensor("aggregate", found).shape:
        raise Wrong(f"aggregate must return a scalar, got shape {tuple(found.shape)}")
    backward("aggregate", found)
    return {"value": found.item(), "slope": given.grad.tolist()}


def whole_loss(tokens: dict[str, list[float]], settings: dict[str, Any], divisor: float) -> Any:
    """grpo_loss on stand-ins: surrogate = 2 * logprob + advantage, "clipped" where old > -1, kl = 5 * (ref - logprob),
    aggregate = sum / divisor + 1. `told`: what each of them was called with, tensors by their names."""
    import torch

    import grpo

    told: dict[str, list[Any]] = {"clipped_surrogate": [], "kl_k3": [], "aggregate": []}
    new = torch.tensor(tokens["logprobs"], requires_grad=True)

    def named(*values: Any) -> list[str]:
        lists = [value.tolist() for value in values]
        known = {name: torch.tensor(numbers).tolist() for name, numbers in tokens.items()}
        return [next((name for name in known if known[name] == one), "something else") for one in lists]

    batch = SimpleNamespace(weight=1.0, sampler_logprobs=None, old_logprobs=None,
                            sequence=torch.zeros(len(new), dtype=torch.int64))
    for name in ("old_logprobs", "ref_logprobs", "advantages", "sampler_logprobs"):
        if name in tokens:
            setattr(batch, name, torch.tensor(tokens[name]))

    def clipped_surrogate(logprobs: Any, old_logprobs: Any, advantages: Any, clip_low: float, clip_high: float) -> Any:
        told["clipped_surrogate"].append([*named(logprobs, old_logprobs, advantages), clip_low, clip_high])
        return 2.0 * logprobs + advantages, old_logprobs > -1.0

    def kl_k3(logprobs: Any, ref_logprobs: Any) -> Any:
        told["kl_k3"].append(named(logprobs, ref_logprobs))
        return 5.0 * (ref_logprobs - logprobs)

    def aggregate(per_token: Any, batch: Any, agg: str, divisor: float) -> Any:
        told["aggregate"].append([agg, divisor])
        return per_token.sum() / divisor + 1.0

    with stand_ins(grpo, clipped_surrogate=clipped_surrogate, kl_k3=kl_k3, aggregate=aggregate):
        found = grpo.grpo_loss(new, batch, SimpleNamespace(**settings), divisor)  # type: ignore[arg-type]
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise Wrong(f"grpo_loss must return (loss, statistics), a scalar tensor and a dict, got {type(found).__name__}")
    loss, stats = found
    for name, value in stats.items():
        a_tensor(f"grpo_loss, under {name!r} of its statistics,", value)
    if a_tensor("grpo_loss, as its loss,", loss).shape:
        raise Wrong(
            f"grpo_loss must return a scalar loss, got shape {tuple(loss.shape)}: call aggregate once, at the end"
        )
    backward("grpo_loss", loss)
    return {"loss": loss.item(), "slope": new.grad.tolist(), "told": told,
            "stats": {name: value.tolist() for name, value in stats.items()},
            "attached": sorted(name for name, value in stats.items() if value.requires_grad)}


# ---- 4: the sampler ------------------------------------------------------------------------------------


def drawn(probabilities: list[list[float]], temperature: float, uniforms: list[float], shift: float = 0.0) -> Any:
    """draw() from logits log p + shift -> ids and log-probs."""
    import torch

    from ops.decode import draw

    ids, logprobs = draw(torch.tensor(probabilities).log() + shift, temperature, torch.tensor(uniforms))
    return {"ids": ids.tolist(), "logprobs": logprobs.tolist()}


def prefill(prompts: list[list[int]]) -> Any:
    """What _prefill hands to _forward, and what it returns of a stand-in's logits."""
    import torch

    from ops import decode

    told: dict[str, Any] = {}

    def forward(lm: Any, ids: Any, positions: Any, mask: Any, cache: Any) -> Any:
        told.update(ids=ids.tolist(), positions=positions.tolist(), mask=mask.tolist(), bool=mask.dtype == torch.bool)
        return torch.full((len(ids), 3), 7.0)

    with stand_ins(decode, _forward=forward):
        logits = decode._prefill(torch.nn.Linear(1, 1), prompts, decode.KVCache())
    return told | {"logits": logits.tolist()}


# ---- 5: ranks ------------------------------------------------------------------------------------------


def share(groups: list[list[Any]], agg: str, max_tokens: int) -> float:
    from batch import Group, loss_divisor

    return loss_divisor([Group(prompt, responses) for prompt, responses in groups], agg, max_tokens)  # type: ignore[arg-type]


def metrics(added: list[list[Any]]) -> list[dict[str, float]]:
    """Metrics.reduce on as many ranks as there are lists of (name, total, count) or (name, maximum)."""

    def work(rank: int) -> dict[str, float]:
        from runtime.metrics import Metrics

        found = Metrics()
        for name, *numbers in added[rank]:
            if len(numbers) == 2:
                found.add(name, *numbers)
            else:
                found.add_max(name, *numbers)
        return found.reduce()

    return [work(0)] if len(added) == 1 else on_ranks(len(added), work)


def sharded(weights: list[list[list[float]]], inputs: list[list[list[float]]], compute: str) -> list[Any]:
    """A policy of two linear layers and a head, sharded over the ranks; one forward and backward on each.

    -> of each rank: which modules are shards' roots, this rank's rows of each weight, its gradients made whole,
    and the dtypes of weights, of the computation and of gradients.
    """

    def work(rank: int) -> dict[str, Any]:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule

        from model import shard_model

        class Layer(torch.nn.Linear):
            def forward(self, x: Any) -> Any:
                seen.append(str(self.weight.dtype))
                return super().forward(x.to(self.weight.dtype))

        class Small(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                linear = [Layer(len(w[0]), len(w), bias=False) for w in weights]
                for module, values in zip(linear, weights, strict=True):
                    module.weight = torch.nn.Parameter(torch.tensor(values))
                self.lm = torch.nn.Module()
                self.lm.model = torch.nn.Module()
                self.lm.model.layers = torch.nn.ModuleList(linear[:-1])
                self.lm.lm_head = linear[-1]

            def forward(self, x: Any) -> Any:
                for layer in self.lm.model.layers:
                    x = layer(x)
                return self.lm.lm_head(x)

        seen: list[str] = []
        policy = Small()
        shard_model(policy, init_device_mesh("cpu", (len(inputs),)), getattr(torch, compute))  # type: ignore[arg-type]
        roots = sorted(name for name, module in policy.named_modules() if isinstance(module, FSDPModule))
        rows = [list(p.to_local().shape) if hasattr(p, "to_local") else "whole" for p in policy.parameters()]
        policy(torch.tensor(inputs[rank])).sum().backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in policy.parameters()]
        return {"roots": roots, "rows": rows, "grads": [g.tolist() for g in grads], "computed_in": seen,
                "stored_in": [str(p.dtype) for p in policy.parameters()],
                "grads_in": [str(g.dtype) for g in grads]}

    return on_ranks(len(inputs), work)


def on_ranks(count: int, work: Callable[[int], Any], seconds: float = 25.0) -> list[Any]:
    """work(rank) in as many Gloo processes, forked from this one, which has used no thread -> their answers."""
    fork, children, said = multiprocessing.get_context("fork"), {}, [{"error": NO_ANSWER}] * count
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            reader, writer = fork.Pipe(duplex=False)
            children[reader] = fork.Process(target=_rank, args=(rank, count, folder, work, writer))
            children[reader].start()
            writer.close()
        waiting, deadline = list(children), time.monotonic() + seconds
        while waiting and (ready := connection.wait(waiting, deadline - time.monotonic())):
            for reader in ready:
                waiting.remove(reader)
                with contextlib.suppress(EOFError):
                    said[list(children).index(reader)] = reader.recv()
            if any("ok" not in said[rank] for rank, reader in enumerate(children) if reader not in waiting):
                deadline = min(deadline, time.monotonic() + 1.0)  # the others may wait for the one that failed
        for process in children.values():
            process.kill()
            process.join()
    for rank, found in enumerate(said):
        if "waiting" in found:
            from todo import Todo

            raise Todo(found["waiting"])
        if "error" in found:
            raise RuntimeError(f"rank {rank} of {count}: {found['error']}")
    return [found["ok"] for found in said]


NO_ANSWER = "did not answer in time, or died: do all ranks make the same collective calls, and as many?"


def _rank(rank: int, count: int, folder: str, work: Callable[[int], Any], writer: connection.Connection) -> None:
    import traceback

    found: dict[str, Any]
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if os.path.exists("/sys/class/net/lo") else "lo0"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        found = {"ok": work(rank)}
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException as error:
        name = type(error).__name__
        found = {"waiting": str(error)} if name == "Todo" else {"error": traceback.format_exc(limit=-4)}
    with contextlib.suppress(BaseException):
        writer.send(found)
    os._exit(0)


# ---- 6 and 7: tables, votes ----------------------------------------------------------------------------


def table(name: str, counts: dict[str, dict[str, list[float]]], compat: str | None = None) -> Any:
    from evaluation import benchmarks

    cells = {group: {slot: (right, total) for slot, (right, total) in of.items()} for group, of in counts.items()}
    if name == "rewardbench":
        return benchmarks._rewardbench_table(cells)
    return benchmarks._rm_bench_table(cells, compat)  # type: ignore[arg-type]


def vote_chances(cases: list[list[int]]) -> list[float]:
    from evaluation.outcomes import majority_chance

    return [majority_chance(*case) for case in cases]


def tallied(rows: list[dict[str, Any]]) -> dict[str, float]:
    from judging.verdicts import Judgement, tally

    full = {"pair_id": "p", "source": "s", "category": "", "meta": {}, "order": "AB", "sample": 0, "verdict": None,
            "winner": "A", "finish_reason": "stop", "response_tokens": 1, "text": ""}
    return tally(Judgement(**full | row, correct=(full | row)["verdict"] == (full | row)["winner"]) for row in rows)


PROBES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (verdicts, default_verdict, data_block, seen, append, nll, advantages, surrogate, kl, one_number,
                     whole_loss, drawn, prefill, share, metrics, sharded, table, vote_chances, tallied)
}

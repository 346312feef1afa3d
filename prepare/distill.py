"""Traces for distillation, written by oracles in two passes.

    1. Oracle one judges every pair with the Chain-of-Rubrics prompt. A chain with the right verdict is kept.
    2. Oracle two gets the other pairs, each with the right verdict and the failed judgement, and writes a full chain in
       the same format. It is checked like the first, and must not say that the verdict was told (hint.py).
    3. Pairs that neither pass gets right are lost; failed.jsonl says why.

    python -m prepare.distill --data PAIRS.jsonl --model NAME --base-url https://HOST/v1 --api-key-env KEY --out DIR
    python -m prepare.distill ... --second-model OTHER --second-base-url https://HOST2/v1    # another oracle for pass 2
    python -m prepare.distill --data PAIRS.jsonl --model FOLDER --samples 4 --no-second-pass # a checkpoint's own chains
    python -m prepare.distill ... --samples 8 --rstar FOLDER                                 # the straightest right one
    python -m toy serve & python -m prepare.distill --preset tiny                            # the tiny world

`--out` gets traces.jsonl (for sft.py --data), failed.jsonl, summary.json, and pass_1.jsonl and pass_2.jsonl with every
chain. The same command continues an interrupted run and never pays twice for a reply.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from cor_prompt import Style, render
from data import Message, Pair, save_pairs
from evaluation import tables
from evaluation.benchmarks import load_benchmark
from evaluation.silent import NothingJudged
from judging.endpoint import EndpointSampler
from judging.verdicts import judge_pairs
from loading.folder import weights_digest
from loading.templates import for_server, parse_arguments
from prepare.hint import hinted, leaks
from reward import format_reward, parse_verdict
from rollout import Chat, Reply, load_sampler, which_sampler
from runtime import cli, disk, errors, ranks, seeds, steps
from runtime.errors import UserError
from runtime.run_folder import RunFolder
from runtime.steps import StopSignal
from settings import SamplerKind


@dataclass(frozen=True)
class Config:
    # named set of defaults: endpoint, paper (the paper's two oracles), tiny (python -m toy serve)
    preset: str = "endpoint"
    data: str = "pairs.jsonl"  # pairs with their winners: .jsonl, .parquet or a hub id; traces in it are replaced
    out: str = "runs/traces"  # folder to write; an interrupted run in it is continued
    # oracle one: the name under which --base-url serves it, else a model folder, a run folder or a hub id
    model: str = "oracle"
    base_url: str = ""  # address of oracle one's OpenAI-compatible server; empty: load --model here
    api_key_env: str = ""  # environment variable that holds this server's key (its name); empty: no key is sent
    second_pass: bool = True  # tell the right verdict where pass 1 failed, and ask again
    second_model: str = ""  # oracle two, like --model; empty: oracle one again, at its address
    second_base_url: str = ""  # address of oracle two's server; empty: load --second-model here
    second_api_key_env: str = ""  # environment variable that holds oracle two's key (its name); empty: no key is sent
    style: Style = "instruct"  # which prompt the oracles see (cor_prompt.py)
    prompt_file: str = ""  # text file that replaces the style's fixed wording; empty: the built-in wording
    # arguments of the oracles' chat templates (name=value), such as enable_thinking=false
    template_args: tuple[str, ...] = ()
    samples: int = 1  # chains per pair and pass; the first without a fault is the trace, all stay in the logs
    # keep the chain with the highest R-star (rstar.py) by this model: a folder, a run folder or a hub id
    rstar: str = ""
    temperature: float = 1.0  # sampling temperature; 0 takes the likeliest token
    max_tokens: int = 8192  # longest chain (tokens); one that is cut off is not kept
    whole: bool = False  # keep only chains that have all parts of their style: type, rubric or solution, eval, verdict
    limit: int = 0  # distil only the first pairs of the file (pairs); 0 is all
    seed: int = 0  # seed of the samples (an integer)
    # chains asked for in one call (samples), which an interrupt waits for; 0: 256, or four rounds of requests
    at_once: int = 0
    concurrency: int = 8  # requests to a server at the same time (requests)
    timeout: float = 600.0  # longest silence of a server within a request (seconds)
    retries: int = 8  # how often a failed request is repeated, waiting 1, 2, 4 ... 60 seconds in between (times)
    # what runs a model that is loaded here; auto: vllm where it is installed and suits the device, else torch
    sampler: SamplerKind = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # number type of the weights of a model that is loaded here
    digests: tyro.conf.Suppress[tuple[str, ...]] = ()  # of pairs, prompt and weights; filled in by `resolve`


PRESETS = {
    "endpoint": Config(),
    "paper": Config(
        preset="paper", model="claude-3-7-sonnet-20250219", base_url="https://api.anthropic.com/v1",
        api_key_env="ANTHROPIC_API_KEY", second_model="o3-2025-04-16", second_base_url="https://api.openai.com/v1",
        second_api_key_env="OPENAI_API_KEY",
    ),
    "tiny": Config(
        preset="tiny", data="runs/toy/sft.jsonl", prompt_file="runs/toy/prompt.txt", out="runs/toy/traces",
        model="teacher", base_url="http://127.0.0.1:8377/v1", max_tokens=64,
    ),
}

Name = tuple[str, str]  # source, pair_id


class Oracle(NamedTuple):
    model: str
    base_url: str
    api_key_env: str


def oracle(cfg: Config, number: int) -> Oracle:
    """Who is asked in pass `number`."""
    if number == 2 and cfg.second_model:
        return Oracle(cfg.second_model, cfg.second_base_url, cfg.second_api_key_env)
    return Oracle(cfg.model, cfg.base_url, cfg.api_key_env)


# ---- what is kept --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One chain, a line of pass_1.jsonl or pass_2.jsonl. `fault` says why it is not kept; "" if it may be kept."""

    source: str
    pair_id: str
    sample: int
    fault: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    response_tokens: int
    text: str


Chains = dict[Name, list[Attempt]]  # the chains of one pass, by pair


def trace_of(text: str) -> str:
    """The part of a reply that is learnt: the text after its thoughts, without halves of surrogate pairs.

    >>> trace_of("<think>A? B?</think> <answer>[[B]]</answer> ")
    '<answer>[[B]]</answer>'
    """
    return text.rpartition("</think>")[2].strip().encode(errors="replace").decode()


def find_fault(text: str, finish_reason: str, winner: str, cfg: Config, told: bool) -> str:
    """Why a chain is not kept; "" if it may be kept. The verdict must stand where the reward looks for it."""
    trace = trace_of(text)
    if finish_reason == "length":
        return "cut off" if text else "prompt too long"
    if re.fullmatch(r"\(no reply: [a-z ]+\)", trace):
        return "no reply"
    verdict = parse_verdict(trace, "train")
    if verdict != winner:
        return "wrong verdict" if verdict else "no verdict"
    if cfg.whole and not format_reward(trace, cfg.style):
        return "parts missing"
    return "tells of the hint" if told and leaks(trace) else ""


def choose(attempts: Sequence[Attempt], scores: Mapping[Attempt, float]) -> Attempt | None:
    """The chain that becomes the trace: of those without a fault the one with the highest score, or the first."""
    return max((attempt for attempt in attempts if not attempt.fault), key=lambda a: scores.get(a, 0.0), default=None)


def rank(cfg: Config, passes: Sequence[Chains], prompts: Mapping[Name, Sequence[Message]]) -> dict[Attempt, float]:
    """R-star of every chain that has a rival, below the prompt of pass 1, with which it is learnt."""
    from prepare.rstar import rank_traces

    good = [[a for a in group if not a.fault] for chains in passes for group in chains.values()]
    rivals = [group for group in good if len(group) > 1]
    asked = [(prompts[group[0].source, group[0].pair_id], [trace_of(a.text) for a in group]) for group in rivals]
    found = rank_traces(cfg.rstar, asked, cfg.dtype) if asked else []
    return {a: score for group, scores in zip(rivals, found, strict=True)
            for a, score in zip(group, scores, strict=True)}


def failed_text(attempts: Sequence[Attempt]) -> str:
    """The judgement that oracle two sees: the first with a wrong verdict, or the first."""
    return trace_of(next((a for a in attempts if a.fault == "wrong verdict"), attempts[0]).text)


# ---- asking --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """A sampler that records prompt tokens by seed, and makes no further call after a stop was asked for."""

    sampler: Chat
    stop: StopSignal
    prompt_tokens: dict[int, list[int]] = field(default_factory=dict)

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]:
        if self.stop.asked:
            raise KeyboardInterrupt
        found = self.sampler.chat(conversations, n, temperature, max_tokens, seeds)
        self.prompt_tokens.update({s: [r.prompt_tokens for r in group] for s, group in zip(seeds, found, strict=True)})
        return found


def ask_oracle(cfg: Config, number: int, pairs: Sequence[Pair], system: str | None,
               opened: dict[Oracle, Chat]) -> Chains:
    """All chains of a pass. The log has them in the order of the pairs, whatever the order in which they came, so a log
    that was cut off anywhere is continued to the same bytes."""
    log = Path(cfg.out) / f"pass_{number}.jsonl"
    found = read_attempts(log, pairs, cfg.samples)
    left = [pair for pair in pairs if len(found[name(pair)]) < cfg.samples]
    if not left:
        return found
    seed, winners = seeds.derive_seed(cfg.seed, f"pass {number}"), {name(pair): pair.winner for pair in pairs}
    at_once = cfg.at_once or (4 * cfg.concurrency * cfg.samples if oracle(cfg, number).base_url else 256)
    sampler = open_oracle(cfg, number, opened)
    with (
        StopSignal() as stop,
        steps.progress(len(pairs) * cfg.samples, sum(map(len, found.values())), f"pass {number}") as bar,
        open(log, "a", encoding="utf-8") as file,
    ):
        bar.unit, meter = " chain", Meter(sampler, stop)
        for j in judge_pairs(meter, left, cfg.style, n=cfg.samples, temperature=cfg.temperature,
                             max_tokens=cfg.max_tokens, seed=seed, system=system, at_once=at_once):
            key = j.source, j.pair_id
            if j.sample < len(found[key]):  # in the log since before an interrupt
                continue
            tokens = meter.prompt_tokens[seeds.derive_seed(seed, *key, j.order)][j.sample]
            fault = find_fault(j.text, j.finish_reason, winners[key], cfg, told=number == 2)
            found[key].append(Attempt(*key, j.sample, fault, j.finish_reason, tokens, j.response_tokens, j.text))
            file.write(json.dumps(asdict(found[key][-1])) + "\n")
            file.flush()
            bar.update()
    return found


def name(pair: Pair) -> Name:
    return pair.source, pair.pair_id


def read_attempts(log: Path, pairs: Sequence[Pair], samples: int) -> Chains:
    """The chains so far."""
    found: Chains = {name(pair): [] for pair in pairs}
    if not log.exists():
        return found
    disk.drop_torn_end(log)
    known = {f.name: int if f.type == "int" else str for f in fields(Attempt)}
    for line, row in disk.read_jsonl(log):
        whole = set(row) == set(known) and all(type(row[name]) is kind for name, kind in known.items())
        whole = whole and all(row[name] >= 0 for name, kind in known.items() if kind is int)
        group = found.get((row["source"], row["pair_id"])) if whole else None
        if group is None or not row["sample"] == len(group) < samples:
            raise UserError(f"{log}:{line}: not the next chain of this run; use another --out")
        group.append(Attempt(**row))
    return found


def open_oracle(cfg: Config, number: int, opened: dict[Oracle, Chat]) -> Chat:
    """The oracle of a pass. One that writes both passes is opened once; otherwise the other one is closed first."""
    who = oracle(cfg, number)
    if who not in opened:
        close(opened)
        if who.base_url:
            opened[who] = EndpointSampler(who.base_url, who.model, who.api_key_env, Path(cfg.out) / "replies.jsonl",
                                          cfg.concurrency, cfg.retries, cfg.timeout,
                                          extra=for_server(parse_arguments(cfg.template_args)))
        else:
            opened[who] = load_sampler(who.model, cfg.dtype, cfg.sampler, template_args=cfg.template_args)
    return opened[who]


def close(opened: dict[Oracle, Chat]) -> None:
    while opened:
        getattr(opened.popitem()[1], "close", lambda: None)()


# ---- the run -------------------------------------------------------------------------------------------


def distil(cfg: Config) -> dict[str, Any]:
    """Both passes; writes and returns the summary."""
    check(cfg)
    system = cli.read_prompt(cfg.prompt_file)
    pairs = [replace(pair, trace=None) for pair in load_benchmark("pairs", cfg.data)[: cfg.limit or None]]
    prompts = {name(pair): render(pair, cfg.style, system) for pair in pairs}
    cfg = resolve(cfg, pairs, system)
    folder = RunFolder(cfg.out, cfg).path
    opened: dict[Oracle, Chat] = {}
    passes = [ask_oracle(cfg, 1, pairs, system, opened)]  # (1)
    left = [pair for pair in pairs if not choose(passes[0][name(pair)], {})]
    if cfg.second_pass:
        shown = [replace(pair, messages=hinted(prompts[name(pair)], pair.winner, failed_text(passes[0][name(pair)])))
                 for pair in left]
        passes.append(ask_oracle(cfg, 2, shown, system, opened))  # (2)
    close(opened)
    scores = rank(cfg, passes, prompts) if cfg.rstar else {}
    traced = [with_trace(pair, cfg, passes, scores) for pair in pairs]
    summary = summarise(cfg, traced, passes)
    disk.write_whole(folder / "traces.jsonl", save_pairs(pair for pair in traced if pair.trace))
    disk.write_whole(folder / "failed.jsonl", save_pairs(pair for pair in traced if not pair.trace))  # (3)
    disk.write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    (folder / "replies.jsonl").unlink(missing_ok=True)  # in order of arrival; the logs hold all of it
    return summary


def check(cfg: Config) -> None:
    """Raises UserError for settings that cannot work."""
    cli.check_numbers(cfg, "samples", "max_tokens")
    second = cfg.second_base_url or cfg.second_api_key_env
    refused = {
        "--rstar chooses among several chains; give --samples, such as 8": cfg.rstar and cfg.samples < 2,
        "--samples at temperature 0 are all the same; give --temperature": cfg.samples > 1 and cfg.temperature == 0,
        "--second-base-url and --second-api-key-env need --second-model": second and not cfg.second_model,
        "one process distils; start it without torchrun": ranks.world_size() > 1,
    }
    for reason in (reason for reason, wrong in refused.items() if wrong):
        raise UserError(reason)


def resolve(cfg: Config, pairs: Sequence[Pair], system: str | None) -> Config:
    """The config with the engine that --sampler chooses, and with digests of what its paths hold, so that a changed
    file or a retrained model never continues an old run."""
    digests = [seeds.digest(save_pairs(pairs)), seeds.digest(system)]
    oracles = [oracle(cfg, number) for number in (1, 2)[: 1 + cfg.second_pass]]
    local = list(dict.fromkeys(who.model for who in oracles if not who.base_url))
    for model in local:
        kind, why = which_sampler(cfg.sampler, model)
        print(f"{model}: sampler {kind} ({why})", flush=True)
        cfg = replace(cfg, sampler=kind)
    digests += [weights_digest(model) for model in (*local, cfg.rstar) if model]
    return replace(cfg, digests=tuple(digests))


def with_trace(pair: Pair, cfg: Config, passes: Sequence[Chains], scores: Mapping[Attempt, float]) -> Pair:
    """The pair with its trace and who wrote it, or without one and with the first fault of each pass."""
    faults = {}
    for number, chains in enumerate(passes, 1):
        if chosen := choose(chains[name(pair)], scores):
            wrote = {"pass": str(number), "oracle": oracle(cfg, number).model, "sample": str(chosen.sample)}
            wrote |= {"r_star": f"{scores[chosen]:.4f}"} if chosen in scores else {}
            return replace(pair, trace=trace_of(chosen.text), meta={**pair.meta, **wrote})
        faults[f"pass_{number}"] = chains[name(pair)][0].fault
    return replace(pair, meta={**pair.meta, **faults})


# ---- the summary ---------------------------------------------------------------------------------------


def summarise(cfg: Config, traced: Sequence[Pair], passes: Sequence[Chains]) -> dict[str, Any]:
    """What became of the pairs, overall, by category and by source; what each pass's chains were."""
    summary: dict[str, Any] = {"all": shares(traced)}
    for kind in ("category", "source"):
        values = sorted({getattr(pair, kind) for pair in traced})
        summary[kind] = {value: shares([pair for pair in traced if getattr(pair, kind) == value]) for value in values}
    for number, chains in enumerate(passes, 1):
        every = [attempt for group in chains.values() for attempt in group]
        summary[f"pass_{number}"] = {
            "oracle": oracle(cfg, number).model,
            "pairs": len(chains),
            "chains": dict(sorted(Counter(a.fault or "good" for a in every).items())),
            "prompt_tokens": sum(a.prompt_tokens for a in every),
            "response_tokens": sum(a.response_tokens for a in every),
        }
    return summary


def shares(traced: Sequence[Pair]) -> dict[str, float]:
    """How many pairs; which share of them was right in pass 1, repaired in pass 2, lost."""
    by = Counter(f"pass_{pair.meta['pass']}" if pair.trace else "lost" for pair in traced)
    return {"pairs": len(traced), **{end: round(by[end] / len(traced), 4) for end in ("pass_1", "pass_2", "lost")}}


def print_summary(summary: Mapping[str, Any]) -> None:
    groups = {"all": summary["all"]} | {f"{kind} {value or '(none)'}": row for kind in ("category", "source")
                                        for value, row in summary[kind].items()}
    shown = [[label, str(row["pairs"]), *(f"{100 * row[end]:.1f} %" for end in ("pass_1", "pass_2", "lost"))]
             for label, row in groups.items()]
    print(tables.as_text("traces", [["", "pairs", "right in pass 1", "repaired in pass 2", "lost"], *shown]))
    for label in ("pass_1", "pass_2")[: 1 + ("pass_2" in summary)]:
        part = summary[label]
        chains = ", ".join(f"{count} {what}" for what, count in part["chains"].items()) or "none asked"
        print(f"{label.replace('_', ' ')}, {errors.printable(part['oracle'])}: {chains}; {part['prompt_tokens']:,} "
              f"prompt tokens, {part['response_tokens']:,} chain tokens")


def main() -> None:
    cfg = cli.parse(Config, PRESETS)
    summary = distil(cfg)
    print_summary(summary)
    print(f"{cfg.out}: traces.jsonl has what was kept, failed.jsonl the other pairs")
    if summary["all"]["lost"] == 1.0:
        raise NothingJudged(f"{cfg.out}: no chain was kept. The lines above say why: is --max-tokens too small, or the "
                            "model no judge?")


if __name__ == "__main__":
    cli.start(main)

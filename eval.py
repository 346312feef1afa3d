"""Judge pairs or a benchmark with a model and count; score the log as the benchmark's authors do.

    python eval.py run --model runs/grpo --data held_out.jsonl --out runs/eval/grpo --both-orders
    python eval.py run --model runs/grpo --benchmark rm-bench --data total_dataset.json --out runs/eval/rm-bench
    torchrun --nproc_per_node=8 eval.py run ...            # a stripe of the pairs and a log for each process
    python eval.py run --model NAME --base-url http://localhost:8000/v1 ...        # neither torch nor vllm here
    python eval.py run ... --votes 5 --temperature 1 | --max-tokens 256 512 1024   # accuracy against votes, budget
    python eval.py run ... --model runs/scalar --scalar    # a scalar reward model: scores instead of chains (scalar.py)
    python eval.py score --benchmark rm-bench --log runs/eval/rm-bench

`run`: `--out` gets config.json, judgements.jsonl (one verdict a line, as it comes; judgements_RANK.jsonl under
torchrun) and, at the end, summary.json; of several budgets each has such a folder, tokens-N. The same command
continues an interrupted evaluation, also on another number of processes: a conversation whose verdicts are in
the logs is not asked again. A missing verdict, a truncated chain and a prompt too long for the model all count
as wrong. `score` needs no model: it reads such logs and published outcome tables (evaluation/outcomes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import tyro

from cor_prompt import encode_prompt, render
from data import Message, Pair, save_pairs, swap
from evaluation import tables
from evaluation.benchmarks import BOTH_ORDERS, RULES, Benchmark, due, load_benchmark, take
from evaluation.outcomes import budget_curve, read_judgement, read_log, score_rows, summarise
from evaluation.silent import NothingJudged, likely_cause
from judging.endpoint import Server
from judging.pointwise import Pointwise, judge_scalar
from judging.verdicts import Judgement, check_sampling, judge_pairs
from loading.folder import context_tokens, weights_digest
from loading.judge_file import Asked
from reward import Rule
from rollout import load_sampler, which_sampler
from runtime import cli, disk, errors, ranks, seeds, steps
from runtime.errors import UserError
from runtime.run_folder import RunFolder
from runtime.steps import StopSignal
from settings import SamplerKind

Key = tuple[str, str, str, int]  # source, pair_id, order, sample: what names a verdict


@dataclass(frozen=True, kw_only=True)
class Run(Server):
    """Judge every pair of a file, log each verdict, print the table."""

    data: str  # Pairs with their winners (.jsonl, .parquet, hub id), or a benchmark's own files (file, folder, hub id).
    out: str  # Folder for config.json, the log of verdicts and summary.json.
    benchmark: Benchmark = "pairs"  # Which layout --data has.
    # Verdicts per pair and order (samples); several, with --temperature, also give the majority's accuracy.
    votes: int = 1
    both_orders: bool = False  # Show every pair in both orders: twice the verdicts, and the consistency between them.
    # Longest chain (tokens); what is cut off has no verdict, mostly. Several: each in turn, and their curve. None: as
    # the model was trained, else 2048.
    max_tokens: tuple[int, ...] = ()
    # Judge about so many pairs, 0 is all: the first of the file; of a benchmark whole items of every subset.
    limit: int = 0
    # The model is a scalar reward model (one label): the response with the higher score wins, equal scores are wrong.
    scalar: bool = False
    # Ask the judge for a score of each response alone, the mean of --votes chains; the higher score wins.
    pointwise: bool = False
    seed: int = 0  # Seed of the samples (an integer).
    baseline: bool = False  # An untrained start: say so where nothing has a verdict, and do not fail.
    # Where a verdict counts: eval after the thoughts, train in the last 80 characters, official anywhere.
    rule: Rule = "eval"
    # Verdicts asked in one call (samples), for which an interrupt waits; 0: 256, or four rounds of requests.
    at_once: int = 0
    # What runs the model; auto: vllm where it is installed and suits the device, else torch.
    sampler: SamplerKind = "auto"
    # The script fills in the next three, so that a retrained model or an edited file never continues an old log.
    model_digest: tyro.conf.Suppress[str] = ""
    data_digest: tyro.conf.Suppress[str] = ""
    prompt_digest: tyro.conf.Suppress[str] = ""


def evaluate(cfg: Run, sampler: Any = None) -> dict[str, Any]:
    """Judge what the logs do not hold yet, write and return the summary; of several budgets their curve, with a
    folder for each. Every rank calls it. `sampler` (a Chat; with --scalar a ScalarModel) replaces --model."""
    check(cfg)
    asked = cfg.asked(loads=sampler is None and not cfg.scalar)
    cfg = replace(cfg, style=asked.style, max_tokens=cfg.max_tokens or (asked.max_tokens,),
                  template_args=asked.flags())
    pairs = take(cfg.benchmark, load_benchmark(cfg.benchmark, cfg.data), cfg.limit)
    if cfg.benchmark in BOTH_ORDERS and not (cfg.scalar or cfg.pointwise):
        cfg = replace(cfg, both_orders=True)
    shown = [*pairs, *map(swap, pairs)] if cfg.both_orders else pairs
    prompts = [render(pair, asked.style, asked.wording) for pair in shown]  # raises now for a pair that cannot be shown
    cfg = resolve(cfg, pairs, asked.wording, sampler is None)
    names, judged = names_of(cfg, pairs), {}
    for budget in cfg.max_tokens:
        out = cfg.out if len(cfg.max_tokens) == 1 else f"{cfg.out}/tokens-{budget}"
        one = replace(cfg, out=out, max_tokens=(budget,))
        folder = RunFolder(out, one).path
        found = verdicts_so_far(folder, names)
        while True:  # once, but for RewardBench 2: its knockout asks for one level after another
            wanted = due(cfg.benchmark, pairs, found.values(), cfg.scalar or cfg.pointwise)
            if names_of(cfg, wanted) <= found.keys():
                break
            sampler = sampler or make_sampler(cfg, prompts, asked)
            ranks.gather(None)  # a server's kept replies have been read by all before any rank adds to them
            judge_missing(one, sampler, wanted, asked, found)
            found = verdicts_so_far(folder, names)
        judged[budget] = [found[key] for key in sorted(found)]
        summary = summarise(judged[budget])
        write_summary(folder, summary)
    if len(judged) > 1:
        silent = sum((Counter(summarise(seen)["silent"]) for seen in judged.values()), Counter())
        write_summary(Path(cfg.out), summary := {"curve": budget_curve(judged), "silent": dict(silent)})
    if close := getattr(sampler, "close", None):
        close()
    return summary


def check(cfg: Run) -> None:
    """Raises UserError for settings that cannot work."""
    check_sampling(cfg.votes, cfg.sampling_temperature())
    if cfg.pointwise and (cfg.scalar or len(cfg.max_tokens) > 1 or cfg.prompt_file):
        raise UserError("--pointwise: without --scalar, --prompt-file and several --max-tokens")
    cli.check_numbers(cfg)
    if min(cfg.max_tokens, default=1) < 1 or len(set(cfg.max_tokens)) < len(cfg.max_tokens):
        raise UserError("--max-tokens: one number of at least 1, or several different ones")
    if cfg.scalar and (cfg.votes > 1 or len(cfg.max_tokens) > 1 or cfg.base_url or cfg.prompt_file):
        raise UserError("--scalar: scores have no votes, token budgets, prompt file or --base-url")


def names_of(cfg: Run, pairs: Sequence[Pair]) -> set[Key]:
    """The verdicts of a whole evaluation of these pairs."""
    orders = ("AB", "BA") if cfg.both_orders else ("AB",)
    samples = 1 if cfg.pointwise else cfg.votes
    return {(p.source, p.pair_id, o, k) for p in pairs for o in orders for k in range(samples)}


def resolve(cfg: Run, pairs: Sequence[Pair], system: str | None, has_model: bool) -> Run:
    """The config with the engine that --sampler chooses and digests of what its paths hold. Raises UserError if
    --model holds no model."""
    if has_model and not cfg.base_url:
        cfg = replace(cfg, model_digest=weights_digest(cfg.model))
        if not cfg.scalar:
            kind, why = which_sampler(cfg.sampler, cfg.model)
            cfg = replace(cfg, sampler=kind)
            say(f"sampler: {kind} ({why})")
    return replace(cfg, data_digest=seeds.digest(save_pairs(pairs)), prompt_digest=seeds.digest(system))


def make_sampler(cfg: Run, prompts: Sequence[Sequence[Message]], asked: Asked) -> Any:
    """The server, the scalar model, or the model in this process with room for the longest prompt and chain."""
    if cfg.scalar:
        from judging.scalar import load_scalar

        return load_scalar(cfg.model, cfg.dtype)
    if cfg.base_url:
        out, own = Path(cfg.out), "" if ranks.world_size() == 1 else f"_{ranks.rank()}"
        return cfg.connect(out / f"replies{own}.jsonl", asked)
    from loading.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.model, cfg.template_args)
    context, most = context_tokens(cfg.model), max(cfg.max_tokens)
    mine = prompts[ranks.rank() :: ranks.world_size()]
    longest = max(ranks.gather(max((len(encode_prompt(prompt, tokenizer)) for prompt in mine), default=0)))
    if longest + most > context:
        say(f"--max-tokens {most}: the context of {context} tokens leaves {max(0, context - longest)} beside the "
            f"longest prompt ({longest} tokens); a chain ends where its context does")
    return load_sampler(cfg.model, cfg.dtype, cfg.sampler, min(context, longest + most),
                        template_args=cfg.template_args)


def say(line: str) -> None:
    if ranks.rank() == 0:
        print(line, flush=True)


def verdicts_so_far(folder: Path, names: set[Key]) -> dict[Key, Judgement]:
    """Verdicts so far, of all ranks. No rank writes between the two gather calls."""
    ranks.gather(None)
    paths = sorted(folder.glob("judgements*.jsonl"))
    for path in paths if ranks.rank() == 0 else []:
        disk.drop_torn_end(path)
    ranks.gather(None)
    found: dict[Key, Judgement] = {}
    for path in paths:
        for number, row in disk.read_jsonl(path):
            if (key := key_of(judgement := read_judgement(row, f"{path}:{number}"))) not in names:
                raise UserError(f"{path}:{number}: not a verdict of this evaluation; use another --out")
            found.setdefault(key, judgement)
    ranks.gather(None)
    return found


def key_of(judgement: Judgement) -> Key:
    return judgement.source, judgement.pair_id, judgement.order, judgement.sample


def judge_missing(cfg: Run, sampler: Any, pairs: Sequence[Pair], asked: Asked, found: dict[Key, Judgement]) -> None:
    """Ask for this rank's share of the missing verdicts; each goes to its log and into `found`. Ctrl-C and SIGTERM
    wait for the running call."""
    missing = names_of(cfg, pairs) - found.keys()
    unfinished = {key[:2] for key in missing}  # (source, pair_id)
    mine = [pair for pair in pairs if (pair.source, pair.pair_id) in unfinished][ranks.rank() :: ranks.world_size()]
    done = {key[:3] for key in found} - {key[:3] for key in missing}  # (source, pair_id, order)
    log = Path(cfg.out, "judgements.jsonl" if ranks.world_size() == 1 else f"judgements_{ranks.rank()}.jsonl")
    at_once = cfg.at_once or (4 * cfg.concurrency * cfg.votes if cfg.base_url else 256)
    step = max(1, at_once // (cfg.votes * (1 + cfg.both_orders)))
    total = len(found) + len(names_of(cfg, mine) & missing)
    temperature, max_tokens = cfg.sampling_temperature(), cfg.max_tokens[0]
    if cfg.pointwise:
        sampler = Pointwise(sampler, cfg.votes, temperature, max_tokens, cfg.seed)
    with (
        StopSignal() as stop,
        steps.progress(total, len(found), "judging") as bar,
        open(log, "a", encoding="utf-8") as file,
    ):
        bar.unit = " verdict"
        for start in range(0, len(mine), step):
            if stop.asked:  # this rank alone: ranks make different numbers of calls, and torchrun tells them all
                raise KeyboardInterrupt
            part = mine[start : start + step]
            if cfg.scalar or cfg.pointwise:
                judged = judge_scalar(sampler.score, part, cfg.both_orders, done)
            else:
                judged = judge_pairs(sampler, part, asked.style, n=cfg.votes, temperature=temperature,
                                     max_tokens=max_tokens, seed=cfg.seed, both_orders=cfg.both_orders, rule=cfg.rule,
                                     system=asked.wording, at_once=at_once, done=done)
            for judgement in judged:
                if key_of(judgement) in found:  # asked again with another sample of its pair, which was missing
                    continue
                file.write(dumps(asdict(judgement)) + "\n")
                file.flush()
                found[key_of(judgement)] = judgement
                bar.update()


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    if ranks.rank() == 0:
        disk.write_whole(folder / "summary.json", dumps(summary, indent=2) + "\n")


# ---- the benchmarks' tables ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Turn logs or outcome tables into the benchmark's tables. Needs no model."""

    benchmark: Benchmark  # Whose rules count; pairs: plain accuracy, overall and by category.
    log: tuple[str, ...]  # Verdict logs, published outcome tables, or folders that hold them.
    name: str = "this log"  # What the row is called.
    json: str = ""  # File for all numbers, unrounded (JSON).
    plots: str = ""  # Folder for sections.png, bars by section.


def score(cfg: Score) -> dict[str, Any]:
    """Print and write the tables, under the authors' rules too where they give other numbers, and the published rows;
    returns what --json holds."""
    rows = read_log(cfg.log)
    right, official = (score_rows(cfg.benchmark, rows, compat) for compat in RULES)
    result = {"benchmark": cfg.benchmark, "name": cfg.name, "log": list(cfg.log), **right,
              "other_rules": official if official["table"] != right["table"] else None}
    grids = tables.all_grids(result)
    if cfg.json:
        disk.write_whole(Path(cfg.json), dumps(result, indent=1) + "\n")
    if cfg.plots:
        tables.plot_result(Path(cfg.plots), result)
    print("\n".join(tables.as_text(title, grid) for title, grid in grids))
    for remark in result["remarks"]:
        print(f"note: {errors.printable(remark)}")
    return result


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"run": Run, "score": Score}, prog=ranks.program())
    if isinstance(cfg, Score):
        score(cfg)
        return
    if ranks.world_size() > 1:
        ranks.join_ranks(timeout_minutes=7 * 24 * 60)  # a rank that is done waits for the slowest; a dead one ends all
    summary = evaluate(cfg)
    if ranks.rank() == 0:
        tables.print_summary(summary)
        print(f"results: {cfg.out}/summary.json" + ("; python -m report draws its curve" if "curve" in summary else ""))
    points = [summary["overall"]] if "overall" in summary else summary["curve"]["points"]
    if not any(point["verdict_rate"] for point in points):
        if not cfg.baseline:
            raise NothingJudged(likely_cause(summary["silent"]))
        say(f"a baseline: {likely_cause(summary['silent'])}")


if __name__ == "__main__":
    cli.start(main)

"""Judge held-out pairs with a model and count: accuracy, consistency under a swap, votes, lengths.

    python eval.py run --model runs/grpo --data held_out.jsonl --out runs/eval/grpo --both-orders

`--out` gets config.json, judgements.jsonl (one verdict a line, as it comes) and, at the end, summary.json.
The same command continues an interrupted evaluation: a conversation whose verdicts are in the log is not
asked again. A missing verdict, a truncated chain and a prompt too long for the model all count as wrong.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

import tyro

import run
from cor_prompt import Style, render
from data import Message, Pair, load_pairs, save_pairs, swap
from reward import Rule
from rollout import Chat, Judgement, Reply, judge_pairs, load_sampler, majority, named, tally
from run import StopSignal, UserError

LOG = "judgements.jsonl"
Key = tuple[str, str, str, int]  # source, pair_id, order, sample: what names a verdict


@dataclass(frozen=True)
class Run:
    """Judge every pair of a file, log each verdict, print the table."""

    model: str
    """The judge: a `from_pretrained` folder, a run folder or a hub id."""
    data: str
    """Pairs with their winners: a .jsonl or .parquet file or a hub id."""
    out: str
    """Folder for config.json, judgements.jsonl and summary.json."""
    style: Style = "instruct"
    """Which prompt the judge sees (cor_prompt.py)."""
    prompt_file: str = ""
    """Text file that replaces the style's fixed wording; empty: the built-in wording."""
    votes: int = 1
    """Verdicts per pair and order (samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    both_orders: bool = False
    """Show every pair in both orders: twice the verdicts, and the consistency between them."""
    max_tokens: int = 2048
    """Longest chain (tokens); what is cut off has no verdict, mostly."""
    limit: int = 0
    """Judge only the first pairs of the file (pairs); 0 is all."""
    seed: int = 0
    """Seed of the samples (an integer)."""
    rule: Rule = "eval"
    """Where a verdict counts: eval after the thoughts, train in the last 80 characters, official anywhere."""
    at_once: int = 256
    """Verdicts asked in one call (samples). An interrupt waits for the running call."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the judge's weights."""
    model_digest: tyro.conf.Suppress[str] = ""
    data_digest: tyro.conf.Suppress[str] = ""  # the three are filled in by the script, so that a retrained
    prompt_digest: tyro.conf.Suppress[str] = ""  # model or an edited file never continues an old log


def evaluate(cfg: Run, sampler: Chat | None = None) -> dict[str, Any]:
    """Judge what the log does not hold yet, write and return the summary. `sampler` replaces --model."""
    check(cfg)
    system = run.read_prompt(cfg.prompt_file)
    pairs = distinct(load_pairs(cfg.data))[: cfg.limit or None]
    render(pairs[0], cfg.style, system)  # refuses an unusable prompt file before the model is loaded
    for pair in pairs if cfg.both_orders else []:
        swap(pair)  # refuses ready-made prompts before the model is loaded
    orders = ("AB", "BA") if cfg.both_orders else ("AB",)
    wanted = {(p.source, p.pair_id, o, k) for p in pairs for o in orders for k in range(cfg.votes)}
    folder = run.RunFolder(cfg.out, with_digests(cfg, pairs, system, sampler is None))
    found = read_log(folder.path / LOG, wanted)
    if len(found) < len(wanted):
        collect(cfg, sampler or load_sampler(cfg.model, cfg.dtype), pairs, system, folder, found, len(wanted))
    summary = summarise([found[key] for key in sorted(found)])
    run.write_whole(folder.path / "summary.json", dumps(summary, indent=2) + "\n")
    return summary


def check(cfg: Run) -> None:
    """Raises UserError for settings that cannot work."""
    if cfg.votes < 1 or cfg.max_tokens < 1 or cfg.at_once < 1 or cfg.limit < 0:
        raise UserError("--votes, --max-tokens and --at-once must be at least 1, --limit at least 0")
    if not (math.isfinite(cfg.temperature) and cfg.temperature >= 0):
        raise UserError(f"--temperature {cfg.temperature}: must be 0 or more")
    if cfg.votes > 1 and cfg.temperature == 0:
        raise UserError("--votes at temperature 0 are all the same; give --temperature, such as 1.0")
    if run.world_size() > 1:
        raise UserError("eval.py is one process; start it without torchrun")


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs that share source and pair_id get their row number (from 0), `id#7`: no verdict is lost or
    counted twice, and resuming finds the same names."""
    times = Counter((p.source, p.pair_id) for p in pairs)
    named = [
        pair if times[pair.source, pair.pair_id] == 1 else replace(pair, pair_id=f"{pair.pair_id}#{i}")
        for i, pair in enumerate(pairs)
    ]
    if len({(p.source, p.pair_id) for p in named}) < len(pairs):
        raise UserError("pair_ids repeat, and numbering them meets another pair_id; make them unique")
    return named


def with_digests(cfg: Run, pairs: Sequence[Pair], system: str | None, has_model: bool) -> Run:
    """The config with digests of what its paths hold. Raises UserError if --model holds no model."""
    weights = b""
    if has_model:
        from model import model_folder

        for path in sorted(model_folder(cfg.model).glob("*.safetensors")):
            with open(path, "rb") as file:
                weights += hashlib.file_digest(file, "blake2b").digest()
    texts = weights, *(t.encode("utf-8", "surrogatepass") for t in (save_pairs(pairs), system or ""))
    model, data, prompt = (hashlib.blake2b(text, digest_size=8).hexdigest() for text in texts)
    return replace(cfg, model_digest=model, data_digest=data, prompt_digest=prompt)


# ---- the log -------------------------------------------------------------------------------------------


def key_of(judgement: Judgement) -> Key:
    return judgement.source, judgement.pair_id, judgement.order, judgement.sample


def read_log(path: Path, wanted: set[Key]) -> dict[Key, Judgement]:
    """Verdicts so far. A line without its line end is what a killed process left: it is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
    found: dict[Key, Judgement] = {}
    names = {field.name for field in fields(Judgement)}
    for number, row in run.read_jsonl(path):
        if set(row) != names or (key := key_of(judgement := Judgement(**row))) not in wanted:
            raise UserError(f"{path}:{number}: not a verdict of this evaluation; use another --out")
        found.setdefault(key, judgement)
    return found


@dataclass(frozen=True)
class Unasked:
    """A sampler that skips conversations whose verdicts are all there (their seeds name them), and that makes
    no further call once a stop was asked for."""

    sampler: Chat
    done: set[int]
    stop: StopSignal

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]:  # fmt: skip
        if self.stop.requested():
            raise KeyboardInterrupt
        found: list[list[Reply]] = [[] for _ in seeds]
        ask = [i for i, seed in enumerate(seeds) if seed not in self.done]
        asked = [conversations[i] for i in ask], n, temperature, max_tokens, [seeds[i] for i in ask]
        for i, replies in zip(ask, self.sampler.chat(*asked) if ask else [], strict=True):
            found[i] = replies
        return found


def collect(cfg: Run, sampler: Chat, pairs: Sequence[Pair], system: str | None, folder: run.RunFolder,
            found: dict[Key, Judgement], total: int) -> None:  # fmt: skip
    """Ask for the missing verdicts; each goes to the log and into `found`."""
    samples = Counter(key[:3] for key in found)
    done = {run.derive_seed(cfg.seed, *name) for name, count in samples.items() if count == cfg.votes}
    right = sum(judgement.correct for judgement in found.values())
    with StopSignal() as stop, run.progress(total, len(found), "judging") as bar:
        bar.unit = "verdict"
        for judgement in judge_pairs(
            Unasked(sampler, done, stop), pairs, cfg.style, n=cfg.votes, temperature=cfg.temperature,
            max_tokens=cfg.max_tokens, seed=cfg.seed, both_orders=cfg.both_orders, rule=cfg.rule,
            system=system, at_once=cfg.at_once):  # fmt: skip
            if key_of(judgement) in found:  # a sibling of the sample that was missing
                continue
            folder.log(asdict(judgement), LOG)
            found[key_of(judgement)] = judgement
            right += judgement.correct
            bar.set_postfix(accuracy=f"{right / len(found):.3f}", refresh=False)
            bar.update()


# ---- numbers -------------------------------------------------------------------------------------------


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What summary.json holds: a row of numbers overall, by category and by source."""
    too_long = [j for j in judgements if j.finish_reason == "length" and j.response_tokens == 0]

    def by(name: Literal["category", "source"]) -> dict[str, Any]:
        groups = sorted({getattr(j, name) for j in judgements})
        return {group: measure([j for j in judgements if getattr(j, name) == group]) for group in groups}

    return {
        "overall": measure(judgements),
        "by_category": by("category"),
        "by_source": by("source"),
        "prompts_too_long": len({key_of(j)[:3] for j in too_long}),
        "chains_truncated": sum(j.finish_reason == "length" for j in judgements) - len(too_long),
    }


def measure(judgements: Sequence[Judgement]) -> dict[str, float]:
    """`tally`, the standard error of its accuracy and, with several votes, the accuracy of the majority.

    accuracy is the mean over single verdicts; its error counts a pair's verdicts as one observation, because
    they are not independent. vote_accuracy takes all votes on a pair, both orders together.
    """
    of_pair: dict[tuple[str, str], list[Judgement]] = {}
    for j in judgements:
        of_pair.setdefault((j.source, j.pair_id), []).append(j)
    row = tally(judgements) | {"pairs": len(of_pair)}
    means = [statistics.fmean(j.correct for j in group) for group in of_pair.values()]
    if len(means) > 1:
        row["accuracy_se"] = statistics.stdev(means) / math.sqrt(len(means))
    if any(j.sample for j in judgements):
        gold = [named(replace(group[0], verdict=group[0].winner)) for group in of_pair.values()]
        elected = list(zip((majority(map(named, group)) for group in of_pair.values()), gold, strict=True))
        row["vote_accuracy"] = statistics.fmean(vote == winner for vote, winner in elected)
        row["vote_decided"] = statistics.fmean(vote is not None for vote, _ in elected)
    return row


COLUMNS = {
    "accuracy": "accuracy",
    "accuracy_se": "+-",
    "vote_accuracy": "majority",
    "consistency": "consistent",
    "verdict_rate": "verdicts",
    "share_a": "says A",
    "length_mean": "tokens",
    "count": "n",
}


def print_table(summary: dict[str, Any]) -> None:
    """A row for everything and one per category."""
    shown = {name: label for name, label in COLUMNS.items() if name in summary["overall"]}
    print(f"{'':24}" + "".join(f"{label:>11}" for label in shown.values()))
    for name, row in [("all", summary["overall"]), *summary["by_category"].items()]:
        printable = "".join(c if c.isprintable() else "?" for c in name)  # names come from the data
        print(f"{printable[:23] or '-':24}" + "".join(f"{cell(row.get(column)):>11}" for column in shown))
    if summary["prompts_too_long"]:
        print(f"{summary['prompts_too_long']} prompts fill the model's context: no verdict, counted as wrong")
    if summary["chains_truncated"]:
        print(f"{summary['chains_truncated']} chains were cut off, by --max-tokens or by the context")


def cell(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"run": Run})
    print_table(evaluate(cfg))
    print(f"{cfg.out}: {LOG}, summary.json")


if __name__ == "__main__":
    run.start(main)

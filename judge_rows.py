"""The commands of judge.py: rows of a file, of standard input or of flags in; a verdict, ranking or scores each out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro

import run
from cor_prompt import Style, render
from data import Message, Pair, read_pair
from judge import Judge, Method, Verdict
from rollout import EndpointSampler, load_sampler
from run import UserError, digest, visible
from verdicts import Chat

# ---- settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """What every command takes: a judge, rows, and where results go."""

    model: str
    """The judge: a `from_pretrained` folder, a run folder or a hub id; with --base-url the name it is served under."""
    base_url: str = ""
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1; empty: load --model here."""
    api_key_env: str = ""
    """Environment variable that holds the server's key (its name); empty: no key is sent."""
    concurrency: int = 8
    """Requests to the server at the same time (requests)."""
    timeout: float = 600.0
    """Longest silence of the server within a request (seconds)."""
    retries: int = 8
    """How often a failed request is repeated, waiting 1, 2, 4 ... 60 seconds in between (times)."""
    data: str | None = None
    """JSONL file of rows; without it and without --question they are read from standard input."""
    question: str | None = None
    """What was asked (text)."""
    out: str = ""
    """Folder for config.json, results.jsonl (a result a line, as it comes) and a server's replies.jsonl; the same
    command continues it and asks for nothing twice. Empty: results are printed only."""
    json: bool = False
    """Print one JSON line per row."""
    max_tokens: int = 2048
    """Longest chain (tokens)."""
    seed: int = 0
    """Seed of samples, brackets and shown orders (an integer)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the judge's weights (not for a server)."""


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """Judge one pair from flags, the pairs of a file, or those that come on standard input, line by line."""

    a: str | None = None
    """Response A (text), with --question."""
    b: str | None = None
    """Response B (text), with --question."""
    style: Style = "instruct"
    """Which prompt the judge sees (cor_prompt.py)."""
    prompt_file: str = ""
    """Text file that replaces the style's fixed wording; empty: the built-in wording."""
    votes: int = 1
    """Verdicts per pair and order, of which the majority counts (samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    both_orders: bool = False
    """Show every pair in both orders and let all verdicts vote."""
    at_once: int = 0
    """Pairs judged together (pairs); 0: 32 of a file, one of standard input, as a dialogue over pipes needs it."""


@dataclass(frozen=True, kw_only=True)
class Rank(Source):
    """Rank the responses of each row against each other, or find the best one."""

    responses: tuple[str, ...] = ()
    """The responses (texts), with --question."""
    method: Method = "bradley-terry"
    """knockout finds the best in n - 1 comparisons; the others rate all in n(n-1)/2 (win-rate 0..1, Elo's scale)."""
    style: Style = "instruct"
    """Which prompt the judge sees (cor_prompt.py)."""
    prompt_file: str = ""
    """Text file that replaces the style's fixed wording; empty: the built-in wording."""
    votes: int = 1
    """Verdicts per comparison and order; their shares count (samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    both_orders: bool = True
    """Compare in both orders; without it a coin decides who is shown first."""


@dataclass(frozen=True, kw_only=True)
class Score(Source):
    """Score the responses of each row, or a single one, from 1 to 10 a sample."""

    responses: tuple[str, ...] = ()
    """The responses (texts), with --question."""
    votes: int = 8
    """Chains per row, whose scores are summed (samples)."""
    temperature: float = 0.5
    """Sampling temperature; 0 takes the likeliest token."""


# ---- rows in, results out ------------------------------------------------------------------------------

Row = tuple[str, int, dict[str, Any]]  # place for error messages, number from 0, the row itself
Result = tuple[dict[str, Any], str]  # as JSON, as text
Answer = Callable[[Judge, list[Row]], list[Result]]
# What may change when a run in --out is continued: rows are compared one by one, the model by its digest.
FREE = ("concurrency", "timeout", "retries", "api_key_env", "data", "question", "a", "b", "responses", "json",
        "at_once", "prompt_file", "dtype")  # fmt: skip


def judge_rows(cfg: Pairs, sampler: Chat | None = None) -> None:
    """Print a verdict per row as it comes. `sampler` replaces --model."""

    def answer(judge: Judge, part: list[Row]) -> list[Result]:
        known = [parsed(*row) for row in part]
        verdicts = judge.pairs([pair for pair, _ in known], cfg.votes, cfg.temperature, cfg.both_orders)
        return [show_pair(*each, verdict) for each, verdict in zip(known, verdicts, strict=True)]

    given = {"question": cfg.question, "response_a": cfg.a, "response_b": cfg.b}
    work(cfg, given, answer, sampler, cfg.at_once or (32 if cfg.data else 1), cfg.style, cfg.prompt_file)


def rank_rows(cfg: Rank, sampler: Chat | None = None) -> None:
    """Print a ranking per row."""

    def answer(judge: Judge, part: list[Row]) -> list[Result]:
        [(where, number, row)] = part
        context, responses = candidates(where, row)
        found = judge.rank(context, responses, cfg.method, cfg.votes, cfg.temperature, cfg.both_orders)
        listed = [(i, f"{found.scores[i]:.4g}") for i in found.order]
        return [show_list(row, number, responses, listed, f"best: {found.order[0]} (comparisons: {found.comparisons})",
                          asdict(found))]  # fmt: skip

    given = {"question": cfg.question, "responses": list(cfg.responses)}
    work(cfg, given, answer, sampler, 1, cfg.style, cfg.prompt_file)


def score_rows(cfg: Score, sampler: Chat | None = None) -> None:
    """Print scores per row."""

    def answer(judge: Judge, part: list[Row]) -> list[Result]:
        [(where, number, row)] = part
        context, responses = candidates(where, row)
        found = judge.scores(context, responses, cfg.votes, cfg.temperature)
        listed = [(i, str(total)) for i, total in enumerate(found.totals)]
        return [show_list(row, number, responses, listed, f"sums of {found.samples} of {found.asked} samples, 1 to 10 "
                          "each", asdict(found))]  # fmt: skip

    work(cfg, {"question": cfg.question, "responses": list(cfg.responses)}, answer, sampler)


def work(cfg: Source, given: dict[str, Any], answer: Answer, sampler: Chat | None, at_once: int = 1,
         style: Style = "instruct", prompt_file: str = "") -> None:  # fmt: skip
    """Answer the rows that --out does not hold yet, in order; each result is written before the next is asked."""
    flags = [value not in (None, []) for value in given.values()]
    if any(flags) and (not all(flags) or cfg.data is not None):
        raise UserError("--question and the responses go together, and without --data")
    if at_once < 1 or cfg.max_tokens < 1:
        raise UserError("--at-once and --max-tokens must be at least 1")
    system = run.read_prompt(prompt_file)
    render(Pair("", "", ({"role": "user", "content": ""},), "", "", "A"), style, system)  # a usable prompt file
    found, folder = rows(cfg, given), open_out(cfg, system, sampler is None) if cfg.out else None
    if folder:
        skip_done(found, folder.path / "results.jsonl")
    if sampler is None and cfg.base_url:
        kept = folder.path / "replies.jsonl" if folder else None
        sampler = EndpointSampler(cfg.base_url, cfg.model, cfg.api_key_env, kept, cfg.concurrency, cfg.retries,
                                  cfg.timeout)  # fmt: skip
    judge = Judge(sampler or load_sampler(cfg.model, cfg.dtype), style, system, cfg.max_tokens, cfg.seed)
    while part := list(islice(found, at_once)):
        for (_, _, row), (record, text) in zip(part, answer(judge, part), strict=True):
            if folder:
                folder.log({"row": digest(row)} | record, "results.jsonl")
            print(json.dumps(record) if cfg.json else text, flush=True)


def open_out(cfg: Source, system: str | None, has_model: bool) -> run.RunFolder:
    """The folder, which is refused if what makes a result has changed."""
    what = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name not in FREE}
    what |= {"command": type(cfg).__name__.lower(), "prompt_digest": digest(system), "model_digest": ""}
    if has_model and not cfg.base_url:
        from model import weights_digest

        what |= {"model_digest": weights_digest(cfg.model), "dtype": cfg.dtype}
    return run.RunFolder(cfg.out, make_dataclass("Config", what)(**what))


def skip_done(found: Iterator[Row], log: Path) -> None:
    """Pass over the rows whose results are in the log. A line without its end is what a killed process left."""
    if not log.exists():
        return
    run.drop_torn_end(log)
    for number, record in run.read_jsonl(log):
        where, _, row = next(found, ("the end of the rows", 0, None))
        if digest(row) != record.get("row"):
            raise UserError(f"{where} is not the row of {log}:{number}; use another --out")


def rows(cfg: Source, given: dict[str, Any]) -> Iterator[Row]:
    """Rows from flags, file or standard input."""
    if cfg.question is not None:
        yield "flags", 0, given
    elif cfg.data is not None:
        for index, (number, row) in enumerate(run.read_jsonl(Path(cfg.data))):
            yield f"{cfg.data}:{number}", index, row
    else:
        lines = ((number, line) for number, line in enumerate(sys.stdin.buffer, 1) if line.strip())
        for index, (number, line) in enumerate(lines):
            yield f"standard input:{number}", index, decode(line, f"standard input:{number}")


def decode(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not one JSON object a line ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def parsed(where: str, index: int, row: dict[str, Any]) -> tuple[Pair, bool]:
    """(pair, does the row know its winner); a missing winner is filled in with any letter."""
    labelled = row.get("winner") is not None or "chosen" in row
    full = row if labelled else row | {"winner": "A"}
    if isinstance(asked := row.get("question", row.get("context")), str):
        full = full | {"context": [{"role": "user", "content": asked}]}
    return read_pair(full, where, index, "pair"), labelled


def candidates(where: str, row: dict[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """Context and responses of a row of `rank` and `score`."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: 'responses' must be a list of texts")
    pair, _ = parsed(where, 0, {k: row[k] for k in ("question", "context") if k in row} |
                     {"response_a": "x", "response_b": "y"})  # fmt: skip
    return pair.context, responses


def show_pair(pair: Pair, labelled: bool, verdict: Verdict) -> Result:
    """Every chain, then the verdict. Chains are indented, so that none can pass for our own lines."""
    correct = {"correct": verdict.winner == pair.winner} if labelled else {}
    lines = [f"==== {one_line(pair.pair_id)}"]
    for trace in verdict.traces:
        swapped = "" if trace.order == "AB" else ", response B shown as A"
        cut = "" if trace.finish_reason == "stop" else ", cut off" if trace.text else ", the prompt is too long"
        names = f"for response {trace.verdict}" if trace.verdict else "no verdict"
        lines.append(f"---- chain {trace.sample + 1}{swapped}{cut}: {names}")
        lines += [f"  {visible(line)}" for line in trace.text.split("\n")]
    votes = ", ".join(f"{name} {number}" for name, number in verdict.votes.items())
    right = "".join(f", {'right' if ok else 'wrong'}" for ok in correct.values())
    lines.append(f"==== verdict: {verdict.winner or 'none'} (votes: {votes}){right}\n")
    return {"pair_id": pair.pair_id, "source": pair.source} | correct | asdict(verdict), "\n".join(lines)


def show_list(row: dict[str, Any], number: int, responses: Sequence[str], listed: Sequence[tuple[int, str]],
              end: str, record: dict[str, Any]) -> Result:  # fmt: skip
    """A line per response, indented like chains: place in the list, number, beginning."""
    name = str(row.get("id", f"row-{number}"))
    lines = [f"  {i:3} {value:>8}  {one_line(responses[i])[:80]}" for i, value in listed]
    return {"id": name} | record, "\n".join([f"==== {one_line(name)}", *lines, f"==== {end}\n"])


def one_line(text: str) -> str:
    return " ".join(visible(text).split())


def main() -> None:
    commands: dict[type, Callable] = {Pairs: judge_rows, Rank: rank_rows, Score: score_rows}
    cfg = tyro.extras.subcommand_cli_from_dict({"pairs": Pairs, "rank": Rank, "score": Score})
    commands[type(cfg)](cfg)

"""The model in use: which response is better, how many compare, and the chain of rubrics that says why.

    from judge import Judge
    judge = Judge.load("runs/grpo")                     # or Judge.connect("http://localhost:8000/v1", "rm-r1")
    judge.pair("What is 2+2?", "4.", "5.").winner       # "A"; .votes, .traces[0].parts.rubric
    judge.rank("What is 2+2?", ["5.", "4.", "22."]).order            # best first
    judge.group_rewards("What is 2+2?", ["5.", "4.", "4!"])          # win rates: a reward for reinforcement learning
    judge.scores("What is 2+2?", ["4."]).totals                      # 1..10 per sample, no second response needed

    python judge.py pairs --model runs/grpo --question "What is 2+2?" --a "4." --b "5."
    python judge.py pairs --model runs/grpo --data pairs.jsonl --out runs/verdicts
    some-program | python judge.py pairs --model rm-r1 --base-url http://localhost:8000/v1 --json
    python judge.py rank --model runs/grpo --question "What is 2+2?" --responses 5. 4. 22.

A row of `pairs` is {"question" or "context", "response_a", "response_b"}, one of `rank` and `score` has
"responses" instead; none needs a winner. Without a verdict, or with as many votes for A as for B, the winner is
None. With `--out` the same command continues where it stopped. Over a server neither torch nor vllm is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cor_prompt import Style, Trace, parse_trace, render
from data import Message, Pair, read_pair
from judging import pointwise, ranking
from judging.endpoint import EndpointSampler, Server
from judging.pointwise import Scores
from judging.verdicts import Judgement, check_sampling, judge_pairs, majority, named
from reward import Letter
from rollout import Chat, load_sampler
from runtime import cli, disk
from runtime.errors import UserError, visible
from runtime.run_folder import RunFolder
from runtime.seeds import derive_seed, digest

Method = Literal["knockout", "bradley-terry", "win-rate"]
Context = str | Sequence[Message]  # a question, or a conversation that ends with the user
Check = Callable[[Context, str], float]


@dataclass(frozen=True)
class Chain:
    """One sample. `verdict` is the response it names; in order "BA" the text itself calls it by the other
    letter, because response_b was shown as A."""

    order: Literal["AB", "BA"]
    sample: int
    verdict: Letter | None
    finish_reason: Literal["stop", "length"]
    parts: Trace
    text: str


@dataclass(frozen=True)
class Verdict:
    """The response that most chains name (None: a tie or none), all votes, and the chains themselves."""

    winner: Letter | None
    votes: Mapping[str, int]  # {"A": 3, "B": 1, "none": 0}
    traces: tuple[Chain, ...]


@dataclass(frozen=True)
class Ranking:
    """`order`: places in the list, best first; after a knockout only the first says anything. `scores[i]` are
    ratings, win rates or levels survived, as the method has it. `comparisons` of two texts were put to the judge."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    comparisons: int


class Judge:
    """A sampler with its prompt. `sampler` is anything with `chat`; a `context` is a question or a conversation that
    ends with the user. Raises UserError for settings that cannot work."""

    def __init__(self, sampler: Chat, style: Style = "instruct", system: str | None = None,
                 max_tokens: int = 2048, seed: int = 0):
        self.sampler, self.style, self.system = sampler, style, system
        self.max_tokens, self.seed = max_tokens, seed

    @classmethod
    def load(cls, path: str, dtype: str = "float32", **settings: Any) -> Judge:
        """A judge from a `from_pretrained` folder, a run folder or a hub id; `settings` as above."""
        return cls(load_sampler(path, dtype), **settings)

    @classmethod
    def connect(cls, base_url: str, model: str, api_key_env: str = "", kept: str | None = None, concurrency: int = 8,
                **settings: Any) -> Judge:
        """A judge behind an OpenAI-compatible server; with `kept` no reply in that file is paid for again."""
        return cls(EndpointSampler(base_url, model, api_key_env, kept, concurrency), **settings)

    def pair(self, context: Context, response_a: str, response_b: str, votes: int = 1,
             temperature: float = 0.0, both_orders: bool = False) -> Verdict:
        """Which of the two responses is better?"""
        pair = Pair("pair", "judge", messages(context), clean(response_a), clean(response_b), winner="A")
        return self.pairs([pair], votes, temperature, both_orders)[0]  # any winner will do

    def pairs(self, pairs: Sequence[Pair], votes: int = 1, temperature: float = 0.0,
              both_orders: bool = False) -> list[Verdict]:
        """A verdict for each pair; their `winner` is not looked at."""
        check_sampling(votes, temperature)
        judgements = judge_pairs(self.sampler, pairs, self.style, n=votes, temperature=temperature,
                                 max_tokens=self.max_tokens, seed=self.seed, both_orders=both_orders,
                                 system=self.system)
        chains = votes * (2 if both_orders else 1)  # a pair's verdicts come one after the other
        return [count(islice(judgements, chains)) for _ in pairs]

    def table(self, groups: Sequence[tuple[Context, Sequence[str]]], votes: int = 1,
              temperature: float = 0.0, both_orders: bool = True) -> ranking.Table:
        """`compare` for ranking.py over the responses of all (context, responses) groups, numbered through. Samples
        depend on the texts alone, not on their places."""

        def ask(shown: Sequence[tuple[Any, Any]]) -> list[float]:
            pairs = [
                Pair(f"{derive_seed(prompt, a, b):x}", "judge", tuple(json.loads(prompt)), a, b, winner="A")
                for (prompt, a), (_, b) in shown
            ]
            return [share(verdict) for verdict in self.pairs(pairs, votes, temperature, both_orders)]

        prompts = [json.dumps(messages(context)) for context, _ in groups]
        texts = [(p, clean(text)) for p, (_, group) in zip(prompts, groups, strict=True) for text in group]
        return ranking.Table(texts, ask, self.seed)

    def rank(self, context: Context, responses: Sequence[str], method: Method = "bradley-terry",
             votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> Ranking:
        """Rate by a round robin, n(n-1)/2 comparisons, or find the best by a knockout, n - 1. A comparison takes
        `votes` verdicts, twice with `both_orders`."""
        size, table = len(responses), self.table([(context, responses)], votes, temperature, both_orders)
        if size == 0:
            raise UserError("responses: none to rank")
        scores: Sequence[float]
        if method == "knockout":
            scores = ranking.knockout(size, table, self.seed)
        else:
            rate = ranking.bradley_terry if method == "bradley-terry" else ranking.win_rates
            scores = rate(size, ranking.round_robin(size, table))
        return Ranking(tuple(ranking.best_first(scores)), tuple(map(float, scores)), table.asked)

    def group_rewards(self, context: Context, responses: Sequence[str], checks: Sequence[Check] = (),
                      votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[float]:
        """A reward for each of one prompt's responses: its win rate against the others, 0..1 (0.5 where it is alone),
        plus what each check(context, response) returns, such as 1.0 if a final number is right: weigh there."""
        return self.rewards([(context, responses)], checks, votes, temperature, both_orders)[0]

    def rewards(self, groups: Sequence[tuple[Context, Sequence[str]]], checks: Sequence[Check] = (),
                votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[list[float]]:
        """`group_rewards` of many (context, responses) groups, with one call for all their verdicts."""
        table, matches, start = self.table(groups, votes, temperature, both_orders), [], 0
        for _, responses in groups:
            matches += [(start + i, start + j) for i, j in ranking.all_pairs(len(responses))]
            start += len(responses)
        rates = iter(ranking.win_rates(start, ranking.play(matches, table)))
        return [
            [next(rates) + sum(float(check(context, response)) for check in checks) for response in responses]
            for context, responses in groups
        ]

    def scores(self, context: Context, responses: Sequence[str], samples: int = 8,
               temperature: float = 0.5) -> Scores:
        """Whole-number scores 1..10 for one response or several, summed over samples (pointwise.py)."""
        check_sampling(samples, temperature)
        if not responses:
            raise UserError("responses: none to score")
        shared, texts = messages(context), [clean(response) for response in responses]
        seed = derive_seed(self.seed, json.dumps(shared), *texts)
        shown = pointwise.orders(len(texts), samples, seed)
        asked = [pointwise.render_scoring(shared, [texts[i] for i in order]) for order in shown]
        seeds = [derive_seed(seed, sample) for sample in range(samples)]
        replies = self.sampler.chat(asked, 1, temperature, self.max_tokens, seeds)
        return pointwise.sum_scores(shown, [reply for [reply] in replies], len(texts))


def count(judgements: Iterable[Judgement]) -> Verdict:
    """All verdicts on one pair -> the majority's."""
    traces = tuple(map(chain, judgements))
    votes = [trace.verdict for trace in traces]
    return Verdict(majority(votes), {"A": votes.count("A"), "B": votes.count("B"), "none": votes.count(None)}, traces)


def chain(j: Judgement) -> Chain:
    return Chain(j.order, j.sample, named(j), j.finish_reason, parse_trace(j.text), j.text)


def share(verdict: Verdict) -> float:
    """A's share of the votes; a chain without a verdict is half a vote for each."""
    return (verdict.votes["A"] + 0.5 * verdict.votes["none"]) / sum(verdict.votes.values())


def messages(context: Context) -> tuple[Message, ...]:
    turns: Sequence[Message] = [{"role": "user", "content": context}] if isinstance(context, str) else context
    if not turns or turns[-1]["role"] != "user":
        raise UserError("the conversation must end with a user message")
    return tuple({"role": m["role"], "content": clean(m["content"])} for m in turns)


def clean(text: str) -> str:
    """Half a surrogate pair is no character and cannot be encoded: a question mark takes its place."""
    return text.encode(errors="replace").decode()


# ---- settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source(Server):
    """What every command takes: a judge, rows, and where results go."""

    data: str | None = None
    """JSONL file of rows; without it and without --question they are read from standard input."""
    question: str | None = None
    """What was asked (text)."""
    out: str = ""
    """Folder for config.json, results.jsonl (a result a line, as it comes) and a server's replies.jsonl; the same
    command continues it and asks for nothing twice. Empty: results are printed only."""
    json: bool = False
    """Print one JSON line per row."""
    votes: int = 1
    """Verdicts per pair and order, whose majority counts; in a ranking their shares count (samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    max_tokens: int = 2048
    """Longest chain (tokens)."""
    seed: int = 0
    """Seed of samples, brackets and shown orders (an integer)."""


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """Judge one pair from flags, the pairs of a file, or those that come on standard input, line by line."""

    a: str | None = None
    """Response A (text), with --question."""
    b: str | None = None
    """Response B (text), with --question."""
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
    both_orders: bool = True
    """Compare in both orders; without it a coin decides who is shown first."""


@dataclass(frozen=True, kw_only=True)
class Score(Source):
    """Score the responses of each row, or a single one, from 1 to 10 a sample; the prompt is pointwise.py's."""

    responses: tuple[str, ...] = ()
    """The responses (texts), with --question."""
    votes: int = 8
    """Chains per row, whose scores are summed (samples)."""
    temperature: float = 0.5
    """Sampling temperature; 0 takes the likeliest token."""


# ---- rows in, results out ------------------------------------------------------------------------------

Row = tuple[str, int, dict[str, Any]]  # place for error messages, number from 0, the row itself
Result = tuple[dict[str, Any], str]  # as JSON, as text
# What may change when a run in --out is continued: rows are compared one by one, the model by its digest.
FREE = ("data", "question", "a", "b", "responses", "json", "prompt_file", "dtype")


def judge_rows(cfg: Pairs, judge: Judge, part: list[Row]) -> list[Result]:
    known = [parsed(*row) for row in part]
    verdicts = judge.pairs([pair for pair, _ in known], cfg.votes, cfg.temperature, cfg.both_orders)
    return [show_pair(*each, verdict) for each, verdict in zip(known, verdicts, strict=True)]


def rank_rows(cfg: Rank, judge: Judge, part: list[Row]) -> list[Result]:
    [(where, number, row)] = part
    context, responses = candidates(where, row)
    found = judge.rank(context, responses, cfg.method, cfg.votes, cfg.temperature, cfg.both_orders)
    listed = [(i, f"{found.scores[i]:.4g}") for i in found.order]
    end = f"best: {found.order[0]} (comparisons: {found.comparisons})"
    return [show_list(row, number, responses, listed, end, asdict(found))]


def score_rows(cfg: Score, judge: Judge, part: list[Row]) -> list[Result]:
    [(where, number, row)] = part
    context, responses = candidates(where, row)
    found = judge.scores(context, responses, cfg.votes, cfg.temperature)
    listed = [(i, str(total)) for i, total in enumerate(found.totals)]
    end = f"sums of {found.samples} of {found.asked} samples, 1 to 10 each"
    return [show_list(row, number, responses, listed, end, asdict(found))]


def run(cfg: Source, sampler: Chat | None = None) -> None:
    """Answer the rows that --out does not hold yet, in order; each result is written before the next is asked.
    `sampler` replaces --model."""
    answers: dict[type, Callable] = {Pairs: judge_rows, Rank: rank_rows, Score: score_rows}
    given: dict[str, Any] = {"question": cfg.question}
    if isinstance(cfg, Pairs):
        given |= {"response_a": cfg.a, "response_b": cfg.b}
    elif isinstance(cfg, (Rank, Score)):
        given["responses"] = list(cfg.responses)
    flags = [value not in (None, []) for value in given.values()]
    if any(flags) and (not all(flags) or cfg.data is not None):
        raise UserError("--question and the responses go together, and without --data")
    at_once = (cfg.at_once or (32 if cfg.data else 1)) if isinstance(cfg, Pairs) else 1
    if at_once < 1 or cfg.max_tokens < 1:
        raise UserError("--at-once and --max-tokens must be at least 1")
    system = cli.read_prompt(cfg.prompt_file)
    render(Pair("", "", ({"role": "user", "content": ""},), "", "", "A"), cfg.style, system)  # a usable prompt file
    found, folder = rows(cfg, given), open_out(cfg, system, sampler is None) if cfg.out else None
    if folder:
        skip_done(found, folder.path / "results.jsonl")
    if sampler is None and cfg.base_url:
        sampler = cfg.connect(folder.path / "replies.jsonl" if folder else None)
    judge = Judge(sampler or load_sampler(cfg.model, cfg.dtype), cfg.style, system, cfg.max_tokens, cfg.seed)
    while part := list(islice(found, at_once)):
        for (_, _, row), (record, text) in zip(part, answers[type(cfg)](cfg, judge, part), strict=True):
            if folder:
                folder.log({"row": digest(row)} | record, "results.jsonl")
            print(json.dumps(record) if cfg.json else text, flush=True)


def open_out(cfg: Source, system: str | None, has_model: bool) -> RunFolder:
    """The folder, which is refused if what makes a result has changed."""
    what = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name not in FREE}
    what |= {"command": type(cfg).__name__.lower(), "prompt_digest": digest(system), "model_digest": ""}
    if has_model and not cfg.base_url:
        from loading.folder import weights_digest

        what |= {"model_digest": weights_digest(cfg.model), "dtype": cfg.dtype}
    return RunFolder(cfg.out, make_dataclass("Config", what)(**what))


def skip_done(found: Iterator[Row], log: Path) -> None:
    """Pass over the rows whose results are in the log. A line without its end is what a killed process left."""
    if not log.exists():
        return
    disk.drop_torn_end(log)
    for number, record in disk.read_jsonl(log):
        where, _, row = next(found, ("the end of the rows", 0, None))
        if digest(row) != record.get("row"):
            raise UserError(f"{where} is not the row of {log}:{number}; use another --out")


def rows(cfg: Source, given: dict[str, Any]) -> Iterator[Row]:
    """Rows from flags, file or standard input."""
    if cfg.question is not None:
        yield "flags", 0, given
    elif cfg.data is not None:
        for index, (number, row) in enumerate(disk.read_jsonl(Path(cfg.data))):
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
                     {"response_a": "x", "response_b": "y"})
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
              end: str, record: dict[str, Any]) -> Result:
    """A line per response, indented like chains: place in the list, number, beginning."""
    name = str(row.get("id", f"row-{number}"))
    lines = [f"  {i:3} {value:>8}  {one_line(responses[i])[:80]}" for i, value in listed]
    return {"id": name} | record, "\n".join([f"==== {one_line(name)}", *lines, f"==== {end}\n"])


def one_line(text: str) -> str:
    return " ".join(visible(text).split())


def main() -> None:
    import tyro

    run(tyro.extras.subcommand_cli_from_dict({"pairs": Pairs, "rank": Rank, "score": Score}))


if __name__ == "__main__":
    cli.start(main)

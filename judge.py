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
    python judge.py serve --model runs/grpo             # rewards over HTTP: recipes/reward_client.py

A row of `pairs` is {"question" or "context", "response_a", "response_b"}, one of `rank` and `score` has
"responses" instead; none needs a winner. Without a verdict, or with as many votes for A as for B, the winner is
None. With `--out` the same command continues where it stopped. Over a server neither torch nor vllm is needed.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass, replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from cor_prompt import Style, Trace, parse_trace, render
from data import Message, Pair, read_pair
from formats.layouts import read_messages, read_row
from formats.readers import read_rows
from judging import pointwise, ranking
from judging.endpoint import EndpointSampler, Server
from judging.pointwise import Scores
from judging.serving import Refused, make_server
from judging.verdicts import (
    Judgement,
    NothingJudged,
    check_sampling,
    judge_pairs,
    likely_cause,
    majority,
    named,
    why_silent,
)
from loading.judge_file import how_to_ask
from reward import Letter
from rollout import Chat, load_sampler
from runtime import cli, disk
from runtime.errors import UserError, printable
from runtime.run_folder import RunFolder
from runtime.seeds import derive_seed, digest

Method = Literal["knockout", "bradley-terry", "win-rate"]
Candidates = tuple[str, Sequence[Message], list[str]]  # name, context, responses
Context = str | Sequence[Message]  # a question, or a conversation that ends with the user
Response = str | Sequence[Message] | None  # a text, or the messages of a turn
Group = tuple[Context, Sequence[Response]]
Check = Callable[[Context, Response], float]


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
    """The response that most chains name (None: a tie or none), all votes, the chains themselves, and why chains
    have no verdict. Equal responses are a tie without chains."""

    winner: Letter | None
    votes: Mapping[str, int]  # {"A": 3, "B": 1, "none": 0}
    traces: tuple[Chain, ...]
    silent: Mapping[str, int]  # {"cut off": 2}


@dataclass(frozen=True)
class Ranking:
    """`order`: places in the list, best first; after a knockout only the first says anything. `scores[i]` are
    ratings, win rates or levels survived, as the method has it. `comparisons` of two texts were put to the judge, which
    gave `verdicts`; `silent` says why other outputs gave none. Without any verdict the order means nothing."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    comparisons: int
    verdicts: int
    silent: Mapping[str, int]


class Judge:
    """A sampler with its prompt. `sampler` is anything with `chat`; a `context` is a question or a conversation that
    ends with the user. Raises UserError for settings that cannot work."""

    def __init__(self, sampler: Chat, style: Style = "instruct", system: str | None = None,
                 max_tokens: int = 2048, seed: int = 0):
        self.sampler, self.style, self.system = sampler, style, system
        self.max_tokens, self.seed = max_tokens, seed
        self.outputs: Counter[str] = Counter()  # of all calls: "verdict", or why an output has none

    @classmethod
    def load(cls, path: str, dtype: str = "float32", template_args: Sequence[str] = (), **settings: Any) -> Judge:
        """A judge from a `from_pretrained` folder, a run folder or a hub id; `settings` as above, those that are left
        out as the model was trained (its judge.json)."""
        asked = how_to_ask(path, style=settings.pop("style", None), wording=settings.pop("system", None),
                           max_tokens=settings.pop("max_tokens", 0), template_args=template_args)
        sampler = load_sampler(path, dtype, template_args=template_args)
        return cls(sampler, asked.style, asked.wording, asked.max_tokens, **settings)

    @classmethod
    def connect(cls, base_url: str, model: str, api_key_env: str = "", kept: str | None = None, concurrency: int = 8,
                **settings: Any) -> Judge:
        """A judge behind an OpenAI-compatible server; with `kept` no reply in that file is paid for again."""
        return cls(EndpointSampler(base_url, model, api_key_env, kept, concurrency), **settings)

    def pair(self, context: Context, response_a: Response, response_b: Response, votes: int = 1,
             temperature: float = 0.0, both_orders: bool = False) -> Verdict:
        """Which of the two responses is better?"""
        texts = response_text(response_a), response_text(response_b)
        pair = Pair("pair", "judge", messages(context), *texts, winner="A")
        return self.pairs([pair], votes, temperature, both_orders)[0]  # any winner will do

    def pairs(self, pairs: Sequence[Pair], votes: int = 1, temperature: float = 0.0,
              both_orders: bool = False) -> list[Verdict]:
        """A verdict for each pair. Equal responses are a tie, about which nobody is asked."""
        differ = [pair.messages is not None or pair.response_a != pair.response_b for pair in pairs]
        found = self.judged([pair for pair, ok in zip(pairs, differ, strict=True) if ok], votes, temperature,
                            both_orders)
        for verdict in found:
            self.outputs.update({**verdict.silent, "verdict": verdict.votes["A"] + verdict.votes["B"]})
        answers = iter(found)
        return [next(answers) if ok else count([]) for ok in differ]

    def judged(self, pairs: Sequence[Pair], votes: int, temperature: float, both_orders: bool) -> list[Verdict]:
        """A verdict for each pair; their `winner` is not looked at."""
        check_sampling(votes, temperature)
        judgements = judge_pairs(self.sampler, pairs, self.style, n=votes, temperature=temperature,
                                 max_tokens=self.max_tokens, seed=self.seed, both_orders=both_orders,
                                 system=self.system)
        chains = votes * (2 if both_orders else 1)  # a pair's verdicts come one after the other
        return [count(islice(judgements, chains)) for _ in pairs]

    def table(self, groups: Sequence[Group], votes: int = 1,
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
        texts = [(p, response_text(text)) for p, (_, group) in zip(prompts, groups, strict=True) for text in group]
        return ranking.Table(texts, ask, self.seed)

    def rank(self, context: Context, responses: Sequence[Response], method: Method = "bradley-terry",
             votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> Ranking:
        """Rate by a round robin, n(n-1)/2 comparisons, or find the best by a knockout, n - 1. A comparison takes
        `votes` verdicts, twice with `both_orders`."""
        before = Counter(self.outputs)
        size, table = len(responses), self.table([(context, responses)], votes, temperature, both_orders)
        if size == 0:
            raise UserError("responses: none to rank")
        scores: Sequence[float]
        if method == "knockout":
            scores = ranking.knockout(size, table, self.seed)
        else:
            rate = ranking.bradley_terry if method == "bradley-terry" else ranking.win_rates
            scores = rate(size, ranking.round_robin(size, table))
        silent = self.outputs - before
        return Ranking(tuple(ranking.best_first(scores)), tuple(map(float, scores)), table.asked,
                       silent.pop("verdict", 0), dict(silent))

    def group_rewards(self, context: Context, responses: Sequence[Response], checks: Sequence[Check] = (),
                      votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[float]:
        """A reward for each of one prompt's responses: its win rate against the others, 0..1 (0.5 where it is alone),
        plus what each check(context, response) returns, such as 1.0 if a final number is right: weigh there."""
        return self.rewards([(context, responses)], checks, votes, temperature, both_orders)[0]

    def rewards(self, groups: Sequence[Group], checks: Sequence[Check] = (),
                votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[list[float]]:
        """`group_rewards` of many (context, responses) groups, with one call for all their verdicts. Warns if there is
        not one verdict, for then all win rates are 0.5."""
        before = Counter(self.outputs)
        table, matches, start = self.table(groups, votes, temperature, both_orders), [], 0
        for _, responses in groups:
            matches += [(start + i, start + j) for i, j in ranking.all_pairs(len(responses))]
            start += len(responses)
        rates = iter(ranking.win_rates(start, ranking.play(matches, table)))
        if (silent := self.outputs - before) and not silent["verdict"]:
            warnings.warn(likely_cause(silent), stacklevel=2)
        return [
            [next(rates) + sum(float(check(context, response)) for check in checks) for response in responses]
            for context, responses in groups
        ]

    def scores(self, context: Context, responses: Sequence[Response], samples: int = 8,
               temperature: float = 0.5) -> Scores:
        """Whole-number scores 1..10 for one response or several, summed over samples (pointwise.py)."""
        check_sampling(samples, temperature)
        if not responses:
            raise UserError("responses: none to score")
        shared, texts = messages(context), [response_text(response) for response in responses]
        seed = derive_seed(self.seed, json.dumps(shared), *texts)
        shown = pointwise.orders(len(texts), samples, seed)
        asked = [pointwise.render_scoring(shared, [texts[i] for i in order]) for order in shown]
        seeds = [derive_seed(seed, sample) for sample in range(samples)]
        replies = self.sampler.chat(asked, 1, temperature, self.max_tokens, seeds)
        scores = pointwise.sum_scores(shown, [reply for [reply] in replies], len(texts))
        self.outputs.update(Counter(scores.silent) | Counter(verdict=scores.samples))
        return scores


def count(judgements: Iterable[Judgement]) -> Verdict:
    """All verdicts on one pair -> the majority's."""
    seen = list(judgements)
    votes = [named(j) for j in seen]
    silent = Counter(why_silent(j) for j in seen if j.verdict is None)
    return Verdict(majority(votes), {"A": votes.count("A"), "B": votes.count("B"), "none": votes.count(None)},
                   tuple(map(chain, seen)), dict(silent))


def chain(j: Judgement) -> Chain:
    return Chain(j.order, j.sample, named(j), j.finish_reason, parse_trace(j.text), j.text)


def share(verdict: Verdict) -> float:
    """A's share of the votes; a chain without a verdict is half a vote for each."""
    return (verdict.votes["A"] + 0.5 * verdict.votes["none"]) / sum(verdict.votes.values())


def messages(context: Context) -> tuple[Message, ...]:
    """A question or a conversation as checked messages; contents may be made of parts, tools have turns too."""
    turns: Any = [{"role": "user", "content": context}] if isinstance(context, str) else list(context)
    known = read_messages([without_none(turn) for turn in turns], "the conversation", "context")
    if known[-1]["role"] not in ("user", "tool"):
        raise UserError("the conversation must end with a user message")
    return tuple({"role": m["role"], "content": clean(m["content"])} for m in known)


def response_text(response: Response) -> str:
    """A text, the messages of a turn, or None where nothing was written."""
    if response is None or isinstance(response, str):
        return clean(response or "")
    turns = read_messages([without_none(turn) for turn in response], "a response", "response") if response else ()
    return "\n\n".join(clean(turn["content"]) for turn in turns)


def without_none(turn: Any) -> Any:
    return turn | {"content": ""} if isinstance(turn, dict) and turn.get("content") is None else turn


def clean(text: str) -> str:
    """Half a surrogate pair is no character and cannot be encoded: a question mark takes its place."""
    return text.encode(errors="replace").decode()


# ---- settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source(Server):
    """What every command takes: a judge, rows, and where results go."""

    data: str | None = None
    """File of rows (.jsonl, .csv, .parquet ...); without it and --question they are read from standard input."""
    question: str | None = None
    """What was asked (text)."""
    out: str = ""
    """Folder for config.json, results.jsonl (a result a line, as it comes) and a server's replies.jsonl; the same
    command continues it and asks for nothing twice. Empty: results are printed only."""
    json: bool = False
    """Print one JSON line per row."""
    votes: int = 1
    """Verdicts per pair and order, whose majority counts; in a ranking their shares count (samples)."""
    max_tokens: int = 0
    """Longest chain (tokens); 0: as the model was trained, else 2048."""
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
    temperature: float | Literal["none"] = 0.5
    """Sampling temperature; 0 takes the likeliest token; none leaves it, top_p and penalties to the server."""


@dataclass(frozen=True, kw_only=True)
class Serve(Server):
    """Answer rankings and rewards over HTTP (docs/judge.md), for trainers that run elsewhere."""

    host: str = "127.0.0.1"
    """Address to listen on; another one opens the judge to everybody who reaches this machine."""
    port: int = 8377
    """Port to listen on; 0: a free one, which is printed."""
    out: str = ""
    """Folder for the replies of a --base-url, so that none is paid for twice; empty: they are kept in memory."""
    votes: int = 1
    """Verdicts per comparison and order; their shares count (samples)."""
    both_orders: bool = True
    """Compare in both orders; without it a coin decides who is shown first."""
    max_tokens: int = 0
    """Longest chain (tokens); 0: as the model was trained, else 2048."""
    seed: int = 0
    """Seed of samples, brackets and shown orders (an integer)."""


# ---- rows in, results out ------------------------------------------------------------------------------

Row = tuple[str, int, dict[str, Any] | UserError]  # place for error messages, number from 0, the row or its error
Result = tuple[dict[str, Any], str]  # as JSON, as text
# What may change when a run in --out is continued: rows are compared one by one, the model by its digest.
FREE = ("data", "question", "a", "b", "responses", "json", "prompt_file", "dtype")


def judge_pairs_of(cfg: Pairs, judge: Judge, asked: Sequence[tuple[Pair, bool]]) -> list[Result]:
    verdicts = judge.pairs([pair for pair, _ in asked], cfg.votes, cfg.sampling_temperature(), cfg.both_orders)
    return [show_pair(*each, verdict) for each, verdict in zip(asked, verdicts, strict=True)]


def rank_lists(cfg: Rank, judge: Judge, asked: Sequence[Candidates]) -> list[Result]:
    results = []
    for name, context, responses in asked:
        found = judge.rank(context, responses, cfg.method, cfg.votes, cfg.sampling_temperature(), cfg.both_orders)
        best = [i for i in found.order if found.scores[i] == found.scores[found.order[0]]]
        end = f"best: {best[0]}" if len(best) == 1 else f"best: a tie of {', '.join(map(str, best))}"
        if found.comparisons and not found.verdicts:
            end = f"best: unknown, no output has a verdict ({reasons(found.silent)})"
        listed = [(i, f"{found.scores[i]:.4g}") for i in found.order]
        results.append(show_list(name, responses, listed, f"{end} (comparisons: {found.comparisons})", asdict(found)))
    return results


def score_lists(cfg: Score, judge: Judge, asked: Sequence[Candidates]) -> list[Result]:
    results = []
    for name, context, responses in asked:
        found = judge.scores(context, responses, cfg.votes, cfg.sampling_temperature())
        end = f"sums of {found.samples} of {found.asked} samples, 1 to 10 each"
        end += f"; the others: {reasons(found.silent)}" if found.silent else ""
        listed = [(i, str(total)) for i, total in enumerate(found.totals)]
        results.append(show_list(name, responses, listed, end, asdict(found)))
    return results


def run(cfg: Source, sampler: Chat | None = None) -> None:
    """Answer the rows that --out does not hold yet, in order; each result is written before the next is asked. A row
    that cannot be judged gets a result that says why. `sampler` replaces --model."""
    commands: dict[type, tuple[Callable, Callable]] = {
        Pairs: (parsed, judge_pairs_of), Rank: (candidates, rank_lists), Score: (candidates, score_lists)}
    parse, answer = commands[type(cfg)]
    at_once = (cfg.at_once or (32 if cfg.data else 1)) if isinstance(cfg, Pairs) else 1
    if at_once < 1 or cfg.max_tokens < 0:
        raise UserError("--at-once must be at least 1, --max-tokens at least 0")
    cfg.sampling_temperature()
    asked = cfg.asked(cfg.max_tokens, loads=sampler is None)
    cfg = replace(cfg, style=asked.style, max_tokens=asked.max_tokens, template_args=asked.flags())
    render(Pair("", "", ({"role": "user", "content": ""},), "", "", "A"), asked.style, asked.wording)  # it is usable
    found, folder = rows(cfg, given(cfg)), open_out(cfg, asked.wording, sampler is None) if cfg.out else None
    if folder:
        skip_done(found, folder.path / "results.jsonl")
    if sampler is None and cfg.base_url:
        sampler = cfg.connect(folder.path / "replies.jsonl" if folder else None, asked)
    sampler = sampler or load_sampler(cfg.model, cfg.dtype, template_args=cfg.template_args)
    judge = Judge(sampler, asked.style, asked.wording, asked.max_tokens, cfg.seed)
    bad: list[UserError] = []
    while part := list(islice(found, at_once)):
        read = [attempt(parse, *row) for row in part]
        answers = iter(answer(cfg, judge, [each for each in read if not isinstance(each, UserError)]))
        for (_, number, row), each in zip(part, read, strict=True):
            if isinstance(each, UserError):
                bad.append(each)
            record, text = show_error(number, each) if isinstance(each, UserError) else next(answers)
            if folder:
                folder.log({"row": mark(row)} | record, "results.jsonl")
            print(json.dumps(record) if cfg.json else text, flush=True)
    if judge.outputs and not judge.outputs["verdict"]:
        raise NothingJudged(likely_cause(judge.outputs))
    if bad and not judge.outputs:
        raise NothingJudged(f"none of {len(bad)} rows could be judged; {bad[0]}")


MOST = 64  # responses of one prompt; their comparisons grow with the square


def serve(cfg: Serve) -> None:
    """Load the judge, say where it listens, answer until Ctrl-C."""
    check_sampling(cfg.votes, cfg.sampling_temperature())
    asked = cfg.asked(cfg.max_tokens)
    kept = Path(cfg.out, "replies.jsonl") if cfg.out else None
    sampler = cfg.connect(kept, asked) if cfg.base_url else load_sampler(cfg.model, cfg.dtype,
                                                                         template_args=asked.flags())
    judge = Judge(sampler, asked.style, asked.wording, asked.max_tokens, cfg.seed)
    server = make_server(lambda path, body: answer(cfg, judge, path, body), cfg.host, cfg.port)
    print(f"http://{cfg.host}:{server.server_port} answers POST /rewards and POST /rank", flush=True)
    server.serve_forever()


def answer(cfg: Serve, judge: Judge, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """/rewards: win rates of every response of every group, and how many outputs gave a verdict; /rank: rankings."""
    if path not in ("/rewards", "/rank"):
        raise Refused(404, "POST to /rewards or /rank")
    method = body.get("method", "bradley-terry")
    if method not in get_args(Method):
        raise UserError(f"'method' must be one of {', '.join(get_args(Method))}")
    groups = read_groups(body)
    how: dict[str, Any] = {"votes": cfg.votes, "temperature": cfg.sampling_temperature()}
    how["both_orders"] = cfg.both_orders
    before = Counter(judge.outputs)
    try:
        found: dict[str, Any] = {"rewards": judge.rewards(groups, **how)} if path == "/rewards" else {
            "rankings": [asdict(judge.rank(*group, method, **how)) for group in groups]}
    except UserError as error:
        raise Refused(502, f"the judge failed: {error}") from None
    silent = judge.outputs - before
    return found | {"verdicts": silent.pop("verdict", 0), "silent": dict(silent)}


def read_groups(body: dict[str, Any]) -> list[tuple[list[Message], list[str]]]:
    """{"groups": [{"prompt": text or messages, "responses": [text, messages or null, ...]}, ...]} as texts."""
    if not isinstance(groups := body.get("groups"), list):
        raise UserError("'groups' must be a list of {prompt, responses} objects")
    found = []
    for number, group in enumerate(groups):
        prompt, responses = (group.get("prompt"), group.get("responses")) if isinstance(group, dict) else (None, None)
        if not isinstance(prompt, (str, list)) or not isinstance(responses, list) or not 0 < len(responses) <= MOST:
            raise UserError(f"group {number}: needs a 'prompt' (text or messages) and 1 to {MOST} 'responses'")
        if not all(isinstance(response, (str, list, NoneType)) for response in responses):
            raise UserError(f"group {number}: a response is a text, a list of messages or null")
        try:
            found.append((list(messages(prompt)), [response_text(response) for response in responses]))
        except UserError as error:
            raise UserError(f"group {number}: {error}") from None
    return found


def given(cfg: Source) -> dict[str, Any]:
    """The row that flags make; empty where rows come from elsewhere."""
    row: dict[str, Any] = {"question": cfg.question}
    if isinstance(cfg, Pairs):
        row |= {"response_a": cfg.a, "response_b": cfg.b}
    elif isinstance(cfg, (Rank, Score)):
        row["responses"] = list(cfg.responses)
    flags = [value not in (None, []) for value in row.values()]
    if any(flags) and (not all(flags) or cfg.data is not None):
        raise UserError("--question and the responses go together, and without --data")
    return row if any(flags) else {}


def attempt(parse: Callable, where: str, number: int, row: dict[str, Any] | UserError) -> Any:
    """What `parse` makes of a row, or why it cannot."""
    if isinstance(row, UserError):
        return row
    try:
        return parse(where, number, row)
    except UserError as error:
        return error


def open_out(cfg: Source, system: str | None, has_model: bool) -> RunFolder:
    """The folder, which is refused if what makes a result has changed."""
    what = {setting.name: getattr(cfg, setting.name) for setting in fields(cfg) if setting.name not in FREE}
    what |= {"command": type(cfg).__name__.lower(), "prompt_digest": digest(system), "model_digest": ""}
    if has_model and not cfg.base_url:
        from loading.folder import weights_digest

        what |= {"model_digest": weights_digest(cfg.model), "dtype": cfg.dtype}
    default = {setting.name: setting.default for setting in fields(cfg)}
    columns = [(name, Any, field(default=default.get(name, MISSING))) for name in what]
    return RunFolder(cfg.out, make_dataclass("Config", columns, kw_only=True)(**what))


def skip_done(found: Iterator[Row], log: Path) -> None:
    """Pass over the rows whose results are in the log. A line without its end is what a killed process left."""
    if not log.exists():
        return
    disk.drop_torn_end(log)
    for number, record in disk.read_jsonl(log):
        where, _, row = next(found, ("the end of the rows", 0, None))
        if mark(row) != record.get("row"):
            raise UserError(f"{where} is not the row of {log}:{number}; use another --out")


def mark(row: dict[str, Any] | UserError | None) -> str:
    """By what a row is known in the log."""
    return digest("unreadable" if isinstance(row, UserError) else row)


def rows(cfg: Source, row: dict[str, Any]) -> Iterator[Row]:
    """Rows from flags, file or standard input. A line that is no JSON object comes as the error that says so."""
    if row:
        yield "flags", 0, row
        return
    lines: Iterable[bytes]
    name, lines = "standard input", sys.stdin.buffer
    if cfg.data is not None:
        name, path = cfg.data, Path(cfg.data)
        if path.suffix != ".jsonl" or not path.is_file():
            yield from ((where, number, found) for number, (where, found) in enumerate(read_rows(name)))
            return
        lines = path.read_bytes().split(b"\n")
    for index, (number, line) in enumerate((n, line) for n, line in enumerate(lines, 1) if line.strip()):
        yield f"{name}:{number}", index, decode(line, f"{name}:{number}")


def decode(line: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not one JSON object a line ({error})")
    return row if isinstance(row, dict) else UserError(f"{where}: expected a JSON object, found {type(row).__name__}")


def parsed(where: str, index: int, row: dict[str, Any]) -> tuple[Pair, bool]:
    """(pair, does the row know its winner); a missing winner is filled in with any letter."""
    pair = read_pair(row, where, index, "pair", index, default="A")
    return pair, read_row(row)["winner"] in ("A", "B")


def candidates(where: str, number: int, row: dict[str, Any]) -> Candidates:
    """Name, context and responses of a row of `rank` and `score`."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: 'responses' must be a list of texts")
    pair, _ = parsed(where, 0, {k: row[k] for k in ("question", "context") if k in row} |
                     {"response_a": "x", "response_b": "y"})
    return str(row.get("id", f"row-{number}")), pair.context, responses


def show_pair(pair: Pair, labelled: bool, verdict: Verdict) -> Result:
    """Every chain, then the verdict. Chains are indented, so that none can pass for our own lines."""
    correct = {"correct": verdict.winner == pair.winner} if labelled else {}
    lines = [f"==== {one_line(pair.pair_id)}"]
    for trace in verdict.traces:
        swapped = "" if trace.order == "AB" else ", response B shown as A"
        cut = "" if trace.finish_reason == "stop" else ", cut off" if trace.text else ", the prompt is too long"
        names = f"for response {trace.verdict}" if trace.verdict else "no verdict"
        lines.append(f"---- chain {trace.sample + 1}{swapped}{cut}: {names}")
        lines += [f"  {printable(line)}" for line in trace.text.split("\n")]
    votes = ", ".join(f"{name} {number}" for name, number in verdict.votes.items())
    votes += f": {reasons(verdict.silent)}" if verdict.silent else ""
    votes = votes if verdict.traces else "equal responses are a tie"
    right = "".join(f", {'right' if ok else 'wrong'}" for ok in correct.values())
    tied = not verdict.traces or verdict.votes["A"] == verdict.votes["B"] > 0
    lines.append(f"==== verdict: {verdict.winner or ('tie' if tied else 'none')} (votes: {votes}){right}\n")
    return {"pair_id": pair.pair_id, "source": pair.source} | correct | asdict(verdict), "\n".join(lines)


def show_list(name: str, responses: Sequence[str], listed: Sequence[tuple[int, str]], end: str,
              record: dict[str, Any]) -> Result:
    """A line per response, indented like chains: place in the list, number, beginning."""
    lines = [f"  {i:3} {value:>8}  {one_line(responses[i])[:80]}" for i, value in listed]
    return {"id": name} | record, "\n".join([f"==== {one_line(name)}", *lines, f"==== {end}\n"])


def show_error(number: int, error: UserError) -> Result:
    return {"id": f"row-{number}", "error": str(error)}, f"==== row {number} is not judged: {one_line(str(error))}\n"


def reasons(silent: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {why}" for why, number in silent.items())


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def main() -> None:
    import tyro

    cfg = tyro.extras.subcommand_cli_from_dict({"pairs": Pairs, "rank": Rank, "score": Score, "serve": Serve})
    serve(cfg) if isinstance(cfg, Serve) else run(cfg)


if __name__ == "__main__":
    cli.start(main)

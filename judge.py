"""The model in use: which response is better, how many compare, and the chain of rubrics that says why.

    from judge import Judge
    judge = Judge.load("runs/grpo")                     # or Judge(judging.endpoint.EndpointSampler(URL, NAME))
    judge.pair("What is 2+2?", "4.", "5.").winner       # "A"; .votes, .traces[0].parts.rubric
    judge.rank("What is 2+2?", ["5.", "4.", "22."]).order            # best first
    judge.rewards([("What is 2+2?", ["5.", "4.", "4!"])])            # win rates: a reward for reinforcement learning

    python judge.py pairs --model runs/grpo --question "What is 2+2?" --a "4." --b "5."
    python judge.py pairs --model runs/grpo --data pairs.jsonl --out runs/verdicts
    some-program | python judge.py pairs --model rm-r1 --base-url http://localhost:8000/v1 --json
    python judge.py rank --model runs/grpo --question "What is 2+2?" --responses 5. 4. 22.
    python judge.py serve --model runs/grpo             # over HTTP: docs/judge.md, recipes/reward_client.py

A row of `pairs` is {"question" or "context", "response_a", "response_b"}, one of `rank` has "responses"
instead; none needs a winner. Without a verdict, or with as many votes for A as for B, the winner is
None. With `--out` the same command continues where it stopped. Over a server neither torch nor vllm is needed.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, compress, islice
from pathlib import Path
from typing import Any, Literal, get_args

from cor_prompt import Style, Trace, parse_trace, render
from data import Message, Pair, read_pair
from evaluation.silent import NothingJudged, likely_cause, reasons, why_silent
from formats.layouts import read_messages, read_row
from formats.readers import read_rows
from judging import ranking, serving, verdicts
from judging.endpoint import Server
from judging.verdicts import Judgement, check_sampling, judge_pairs
from loading.judge_file import Asked, how_to_ask
from reward import Letter
from rollout import Chat, load_sampler
from runtime import cli, disk, ranks
from runtime.errors import UserError, printable
from runtime.run_folder import RunFolder, digests
from runtime.seeds import derive_seed, digest

Method = Literal["knockout", "win-rate"]
Context = str | Sequence[Message]  # a question, or a conversation that ends with the user
Response = str | Sequence[Message] | None  # a text, or the messages of a turn
Group = tuple[Context, Sequence[Response]]


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
    win rates or levels survived, depending on the method. `comparisons` of two texts were put to the judge, which
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

    def pair(self, context: Context, response_a: Response, response_b: Response, votes: int = 1,
             temperature: float = 0.0, both_orders: bool = False) -> Verdict:
        """Which of the two responses is better?"""
        texts = response_text(response_a), response_text(response_b)
        pair = Pair("pair", "judge", messages(context), *texts, winner="A")  # any winner will do
        return self.pairs([pair], votes, temperature, both_orders)[0]

    def pairs(self, pairs: Sequence[Pair], votes: int = 1, temperature: float = 0.0,
              both_orders: bool = False) -> list[Verdict]:
        """A verdict for each pair, whose `winner` is not looked at. Equal responses are a tie; the model is
        not asked about them."""
        check_sampling(votes, temperature)
        differ = [pair.messages is not None or pair.response_a != pair.response_b for pair in pairs]
        judgements = judge_pairs(self.sampler, list(compress(pairs, differ)), self.style, n=votes,
                                 temperature=temperature, max_tokens=self.max_tokens, seed=self.seed,
                                 both_orders=both_orders, system=self.system)
        chains = votes * (2 if both_orders else 1)  # a pair's verdicts come one after the other
        found = [count(islice(judgements, chains if ok else 0)) for ok in differ]
        for verdict in found:
            self.outputs += Counter(verdict.silent) + Counter(verdict=verdict.votes["A"] + verdict.votes["B"])
        return found

    def table(self, groups: Sequence[Group], votes: int = 1,
              temperature: float = 0.0, both_orders: bool = True) -> ranking.Table:
        """`compare` for ranking.py over the responses of all (context, responses) groups, numbered in order. Samples
        depend on the texts alone, not on their places."""

        def ask(shown: Sequence[tuple[Any, Any]]) -> list[float]:
            pairs = [
                Pair(f"{derive_seed(prompt, a, b):x}", "judge", tuple(json.loads(prompt)), a, b, winner="A")
                for (prompt, a), (_, b) in shown
            ]
            counts = [verdict.votes for verdict in self.pairs(pairs, votes, temperature, both_orders)]
            return [(n["A"] + 0.5 * n["none"]) / sum(n.values()) for n in counts]  # no verdict: half a vote for each

        prompts = [json.dumps(messages(context)) for context, _ in groups]
        texts = [(p, response_text(text)) for p, (_, group) in zip(prompts, groups, strict=True) for text in group]
        return ranking.Table(texts, ask, self.seed)

    def rank(self, context: Context, responses: Sequence[Response], method: Method = "win-rate",
             votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> Ranking:
        """Rate by the win rates of a round robin, n(n-1)/2 comparisons, or find the best by a knockout, n - 1. A
        comparison takes `votes` verdicts, twice with `both_orders`."""
        before = Counter(self.outputs)
        size, table = len(responses), self.table([(context, responses)], votes, temperature, both_orders)
        if size == 0:
            raise UserError("responses: none to rank")
        matches = list(combinations(range(size), 2))
        scores: Sequence[float] = (ranking.knockout(size, table, self.seed) if method == "knockout"
                                   else ranking.win_rates(size, matches, table(matches)))
        order = sorted(range(size), key=lambda i: -scores[i])  # equal ones keep their order
        silent = self.outputs - before
        return Ranking(tuple(order), tuple(map(float, scores)), table.asked, silent.pop("verdict", 0), dict(silent))

    def rewards(self, groups: Sequence[Group], votes: int = 1, temperature: float = 0.0,
                both_orders: bool = True) -> list[list[float]]:
        """A reward for each response of each (context, responses) group: its win rate against the others of its
        group, 0..1 (0.5 where it is alone). All comparisons are asked together. Warns if no output has a
        verdict, because all win rates are then 0.5."""
        before = Counter(self.outputs)
        table, matches, start = self.table(groups, votes, temperature, both_orders), list[ranking.Match](), 0
        for _, responses in groups:
            matches += combinations(range(start, start + len(responses)), 2)
            start += len(responses)
        rates = iter(ranking.win_rates(start, matches, table(matches)))
        if (silent := self.outputs - before) and not silent["verdict"]:
            warnings.warn(likely_cause(silent), stacklevel=2)
        return [[next(rates) for _ in responses] for _, responses in groups]


def count(judgements: Iterable[Judgement]) -> Verdict:
    """All verdicts on one pair -> the majority's."""
    seen = list(judgements)
    votes = [verdicts.named(j) for j in seen]
    silent = Counter(why_silent(j) for j in seen if j.verdict is None)
    chains = [Chain(j.order, j.sample, verdicts.named(j), j.finish_reason, parse_trace(j.text), j.text) for j in seen]
    return Verdict(verdicts.majority(votes), {"A": votes.count("A"), "B": votes.count("B"), "none": votes.count(None)},
                   tuple(chains), dict(silent))


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
    if not isinstance(response, Sequence):
        raise UserError("a response must be a text, a list of messages or null")
    turns = read_messages([without_none(turn) for turn in response], "a response", "response") if response else ()
    return "\n\n".join(clean(turn["content"]) for turn in turns)


def without_none(turn: Any) -> Any:
    return turn | {"content": ""} if isinstance(turn, dict) and turn.get("content") is None else turn


def clean(text: str) -> str:
    """Replace unpaired surrogates, which cannot be encoded, by question marks."""
    return text.encode(errors="replace").decode()


# ---- settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings(Server):
    """What every command takes: a judge, how often it is asked, and where answers are kept."""

    # Folder for config.json, results.jsonl (a result a line, as it comes) and a server's replies.jsonl; the same
    # command continues it and asks for nothing twice. Empty: nothing is kept. `serve` writes replies.jsonl alone.
    out: str = ""
    # Verdicts per pair and order, whose majority counts; in rankings and rewards their shares count (samples).
    votes: int = 1
    max_tokens: int = 0  # Longest chain (tokens); 0: as the model was trained, else 2048.
    seed: int = 0  # Seed of samples, brackets and shown orders (an integer).


@dataclass(frozen=True, kw_only=True)
class Source(Settings):
    """Where rows come from and how results are shown."""

    # File of rows (.jsonl, .csv, .parquet ...); without it and --question they are read from standard input.
    data: str | None = None
    question: str | None = None  # What was asked (text).
    json: bool = False  # Print one JSON line per row.


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """Judge one pair from flags, the pairs of a file, or those that come on standard input, line by line."""

    a: str | None = None  # Response A (text), with --question.
    b: str | None = None  # Response B (text), with --question.
    both_orders: bool = False  # Show every pair in both orders and let all verdicts vote.


@dataclass(frozen=True, kw_only=True)
class Rank(Source):
    """Rank the responses of each row against each other, or find the best one."""

    responses: tuple[str, ...] = ()  # The responses (texts), with --question.
    method: Method = "win-rate"  # knockout finds the best in n - 1 comparisons; win-rate rates all, 0..1, in n(n-1)/2.
    both_orders: bool = True  # Compare in both orders; without it a coin decides who is shown first.


@dataclass(frozen=True, kw_only=True)
class Serve(Settings):
    """Answer with rewards and rankings over HTTP (docs/judge.md), for trainers that run elsewhere."""

    host: str = "127.0.0.1"  # Address to listen on; another one opens the judge to everybody who reaches this machine.
    port: int = 8377  # Port to listen on; 0: a free one, which is printed.
    both_orders: bool = True  # Compare in both orders; without it a coin decides who is shown first.


# ---- rows in, results out ------------------------------------------------------------------------------

Row = tuple[str, int, dict[str, Any] | UserError]  # place for error messages, number from 0, the row or its error
Result = tuple[dict[str, Any], str]  # as JSON, as text
AT_ONCE = 32  # pairs of a file that are judged together, or as many as --concurrency; of a pipe one at a time


def run(cfg: Pairs | Rank, sampler: Chat | None = None) -> None:
    """Answer the rows that --out does not hold yet, in order; each result is written before the next is asked. A row
    that cannot be judged gets a result that says why. `sampler` replaces --model."""
    parse: Callable = parsed if isinstance(cfg, Pairs) else candidates
    at_once = max(AT_ONCE, cfg.concurrency) if isinstance(cfg, Pairs) and cfg.data else 1
    cli.check_numbers(cfg)
    cfg.sampling_temperature()
    asked = cfg.asked(cfg.max_tokens, loads=sampler is None)
    cfg = replace(cfg, style=asked.style, max_tokens=asked.max_tokens, template_args=asked.flags())
    render(Pair("", "", ({"role": "user", "content": ""},), "", "", "A"), asked.style, asked.wording)  # or raises
    found = rows(cfg)
    folder = open_out(cfg, asked.wording, sampler is None) if cfg.out else None
    before = skip_done(found, folder.path / "results.jsonl") if folder else 0
    judge = judge_of(cfg, asked, sampler)
    bad, answered = list[UserError](), 0
    while part := list(islice(found, at_once)):
        requests = [attempt(parse, *row) for row in part]  # what was read, or the UserError that says why not
        answers = iter(results(cfg, judge, [each for each in requests if not isinstance(each, UserError)]))
        for (_, number, row), request in zip(part, requests, strict=True):
            if isinstance(request, UserError):
                bad.append(request)
                record: dict[str, Any] = {"id": f"row-{number}", "error": str(request)}
                text = f"==== row {number} is not judged: {one_line(str(request))}\n"
            else:
                answered += 1
                record, text = next(answers)
            if folder:
                folder.log({"row": mark(row)} | record, "results.jsonl")
            print(json.dumps(record) if cfg.json else text, flush=True)
    if judge.outputs and not judge.outputs["verdict"]:
        raise NothingJudged(likely_cause(judge.outputs))
    if not answered + len(bad) + before:
        raise NothingJudged(f"{cfg.data or 'standard input'}: no rows in it")
    if bad and not answered:
        raise NothingJudged(f"none of {len(bad)} rows could be judged; {bad[0]}")
    if bad:
        print(f"{len(bad)} of {len(bad) + answered} rows are not judged; {bad[0]}", file=sys.stderr)


def results(cfg: Pairs | Rank, judge: Judge, requests: Sequence[Any]) -> list[Result]:
    """The results of rows as `parsed` or `candidates` gives them."""
    how = cfg.votes, cfg.sampling_temperature(), cfg.both_orders
    if isinstance(cfg, Pairs):
        found = judge.pairs([pair for pair, _ in requests], *how)
        return [show_pair(pair, labelled, verdict) for (pair, labelled), verdict in zip(requests, found, strict=True)]
    return [show_ranking(name, responses, judge.rank(context, responses, cfg.method, *how))
            for name, context, responses in requests]


def judge_of(cfg: Settings, asked: Asked, sampler: Chat | None = None) -> Judge:
    if sampler is None:
        kept = Path(cfg.out, "replies.jsonl") if cfg.out else None
        sampler = (cfg.connect(kept, asked) if cfg.base_url
                   else load_sampler(cfg.model, cfg.dtype, template_args=asked.flags()))
    return Judge(sampler, asked.style, asked.wording, asked.max_tokens, cfg.seed)


MOST = 64  # responses of one prompt; their comparisons grow with the square


def serve(cfg: Serve) -> None:
    """Load the judge, say where it listens, answer until Ctrl-C."""
    check_sampling(cfg.votes, cfg.sampling_temperature())
    judge = judge_of(cfg, cfg.asked(cfg.max_tokens))
    server = serving.Server(lambda path, body: answer(cfg, judge, path, body), cfg.host, cfg.port)
    print(f"http://{cfg.host}:{server.server_port} answers POST /rewards and POST /rank", flush=True)
    server.serve_forever()


def answer(cfg: Serve, judge: Judge, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """/rewards: the win rates in each group; /rank: a ranking of each; with both the number of verdicts."""
    if path not in ("/rewards", "/rank"):
        raise serving.Refused(404, "POST to /rewards or /rank")
    if (method := body.get("method", "win-rate")) not in get_args(Method):
        raise UserError(f"'method' must be one of {', '.join(get_args(Method))}")
    how = cfg.votes, cfg.sampling_temperature(), cfg.both_orders
    groups, before = read_groups(body), Counter(judge.outputs)
    try:
        found: dict[str, Any] = {"rewards": judge.rewards(groups, *how)} if path == "/rewards" else {
            "rankings": [asdict(judge.rank(prompt, responses, method, *how)) for prompt, responses in groups]}
    except UserError as error:
        raise serving.Refused(502, f"the judge failed: {error}") from None
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
            raise UserError(f"group {number}: needs 'prompt' (text or messages) and 1 to {MOST} 'responses' in a list")
        try:
            found.append((list(messages(prompt)), [response_text(response) for response in responses]))
        except UserError as error:
            raise UserError(f"group {number}: {error}") from None
    return found


def attempt(parse: Callable, where: str, number: int, row: dict[str, Any] | UserError) -> Any:
    """What `parse` makes of a row, or why it cannot."""
    try:
        return row if isinstance(row, UserError) else parse(where, number, row)
    except UserError as error:
        return error


def open_out(cfg: Source, system: str | None, has_model: bool) -> RunFolder:
    """The folder, which is refused if what makes a result has changed."""
    read = digests(cfg.model if has_model and not cfg.base_url else "", system)
    read["command"] = type(cfg).__name__.lower()
    rows = {"data", "question", "a", "b", "responses", "json"} & vars(cfg).keys()  # skip_done compares them
    return RunFolder(cfg.out, replace(cfg, **{name: getattr(type(cfg), name) for name in rows}), read)


def skip_done(found: Iterator[Row], log: Path) -> int:
    """Pass over the rows whose results are in the log, and count them. A line without its end is what a killed process
    left."""
    number = 0
    if not log.exists():
        return number
    disk.drop_torn_end(log)
    for number, record in disk.read_jsonl(log):
        where, _, row = next(found, ("the end of the rows", 0, None))
        if mark(row) != record.get("row"):
            raise UserError(f"{where} is not the row of {log}:{number}; use another --out")
    return number


def mark(row: dict[str, Any] | UserError | None) -> str:
    """The digest that identifies a row in the log."""
    return digest("unreadable" if isinstance(row, UserError) else row)


def rows(cfg: Pairs | Rank) -> Iterator[Row]:
    """Rows from flags, file or standard input."""
    responses = ({"response_a": cfg.a, "response_b": cfg.b} if isinstance(cfg, Pairs)
                 else {"responses": list(cfg.responses)})
    row = {"question": cfg.question, **responses}
    flags = [value not in (None, []) for value in row.values()]
    if any(flags) and (not all(flags) or cfg.data is not None):
        raise UserError(f"--question, {'--a and --b' if isinstance(cfg, Pairs) else '--responses'} go together, "
                        "and without --data")
    if any(flags):
        return iter([("flags", 0, row)])
    if cfg.data is None:
        return decoded("standard input", sys.stdin.buffer)
    if cfg.data.endswith(".jsonl") and Path(cfg.data).is_file():
        return decoded(cfg.data, Path(cfg.data).read_bytes().split(b"\n"))
    return ((where, number, found) for number, (where, found) in enumerate(read_rows(cfg.data)))


def decoded(name: str, lines: Iterable[bytes]) -> Iterator[Row]:
    """A line that is no JSON object comes as the error that says so."""
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


def candidates(where: str, number: int, row: dict[str, Any]) -> tuple[str, Sequence[Message], list[str]]:
    """Name, context and responses of a row of `rank`."""
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


def show_ranking(name: str, responses: Sequence[str], found: Ranking) -> Result:
    best = [i for i in found.order if found.scores[i] == found.scores[found.order[0]]]
    end = f"best: {best[0]}" if len(best) == 1 else f"best: a tie of {', '.join(map(str, best))}"
    if found.comparisons and not found.verdicts:
        end = f"best: unknown, no output has a verdict ({reasons(found.silent)})"
    lines = [f"  {i:3} {found.scores[i]:8.4g}  {one_line(responses[i])[:80]}" for i in found.order]
    shown = [f"==== {one_line(name)}", *lines, f"==== {end} (comparisons: {found.comparisons})\n"]
    return {"id": name} | asdict(found), "\n".join(shown)


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def main() -> None:
    import tyro

    cfg = tyro.extras.subcommand_cli_from_dict({"pairs": Pairs, "rank": Rank, "serve": Serve}, prog=ranks.program())
    if ranks.world_size() > 1:
        raise UserError("judge.py is one process; start it without torchrun (eval.py judges on several)")
    serve(cfg) if isinstance(cfg, Serve) else run(cfg)


if __name__ == "__main__":
    cli.start(main)

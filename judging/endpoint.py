"""A model behind a server: conversations -> replies over HTTP, nothing lost and nothing paid for twice.

Needs neither torch nor vllm.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from cor_prompt import Style
from data import Message
from loading.judge_file import Asked, how_to_ask
from loading.templates import for_server
from rollout import Reply
from runtime.cli import read_prompt
from runtime.disk import drop_torn_end, read_jsonl
from runtime.errors import UserError, printable
from runtime.seeds import derive_seed


class EndpointSampler:
    """`chat` over HTTP: `vllm serve`, a hosted model, anything that speaks OpenAI's chat completions.

    Each reply is kept the moment it comes, in memory and with `kept` in that file, under all that was asked: after
    an error, Ctrl-C or a kill the same call pays for nothing twice. Failures are tried again, waiting `backoff`
    seconds, then twice that, and so on, or what Retry-After says. A sample is a request with a seed of its own.
    Files named replies*.jsonl beside `kept` are other processes' and are read too. `api_key_env` names the
    environment variable with the key; without it none is sent. `extra` goes into every request. With `sampling` False
    temperature, top_p and penalties are left to the server. One `chat` at a time.
    """

    def __init__(self, base_url: str, model: str, api_key_env: str = "", kept: str | Path | None = None,
                 concurrency: int = 8, retries: int = 8, timeout: float = 600.0, backoff: float = 1.0,
                 extra: Mapping[str, Any] | None = None, sampling: bool = True):
        if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s?#]*)?", base_url):
            raise UserError("--base-url must look like http://host:8000/v1, without user, password or query")
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise UserError("--concurrency and --timeout must be more than 0, --retries at least 0")
        self.base_url, self.model, self.api_key_env = base_url, model, api_key_env
        self.concurrency, self.retries, self.backoff = concurrency, retries, backoff
        self._key = read_key(api_key_env)
        self._client = make_client(base_url, self._key, timeout)
        self._lock, self._halt = threading.Lock(), threading.Event()
        self.extra, self.sampling = dict(extra or {}), sampling
        self._limit = "max_tokens"  # what this server was found to accept
        self._refused: set[str] = set()  # settings that it does not take
        self._kept = Path(kept) if kept else None
        self._known: dict[str, Reply] = {}
        for path in {self._kept, *self._kept.parent.glob("replies*.jsonl")} if self._kept else ():
            self._known |= read_kept(path)

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]:
        """n replies per conversation, in order. Raises UserError (server, status, remedy) once the retries are spent
        or there is nothing to retry; requests under way are waited for and their replies kept."""
        asked: dict[str, tuple[Sequence[Message], int]] = {}  # what is not known yet
        keys = []
        for messages, seed in zip(conversations, seeds, strict=True):
            what = [self.base_url, self.model, list(messages), temperature, max_tokens, seed]
            what += [[self.extra, self.sampling]] if self.extra or not self.sampling else []
            key = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
            keys.append([f"{key}-{k}" for k in range(n)])
            asked |= {name: (messages, derive_seed(seed, k)) for k, name in enumerate(keys[-1])
                      if name not in self._known}
        failures: list[UserError] = []  # the first says what is wrong

        def answer(key: str) -> None:
            try:
                self._keep(key, self._ask(*asked[key], temperature, max_tokens))
            except UserError as error:
                failures.append(error)
                self._halt.set()

        self._halt.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                list(pool.map(answer, asked))
            except BaseException:  # Ctrl-C: nothing new is sent, what is under way is paid for and awaited
                self._halt.set()
                raise
        if failures:
            raise failures[0]
        return [[self._known[name] for name in names] for names in keys]

    def _keep(self, key: str, reply: Reply) -> None:
        with self._lock:
            self._known[key] = reply
            if self._kept:
                with open(self._kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": asdict(reply)}) + "\n")

    def _ask(self, messages: Sequence[Message], seed: int, temperature: float, max_tokens: int | None) -> Reply:
        """One request, repeated until it is answered."""
        import openai

        for attempt in range(self.retries + 1):
            if self._halt.is_set():  # another request has failed for good, or Ctrl-C
                raise UserError("stopped")
            sent: dict[str, Any] = {"model": self.model, "messages": plain_messages(messages)}
            sent |= {"temperature": temperature, **PLAIN} if self.sampling else {}
            sent |= {} if max_tokens is None else {self._limit: max_tokens}
            sent |= {"seed": seed % 2**31}  # some servers hold seeds in 32 bits
            sent = {name: value for name, value in sent.items() if name not in self._refused}
            try:
                create = self._client.chat.completions.with_raw_response.create
                return read_reply(create(**sent, extra_body=self.extra).content)
            except openai.APIStatusError as error:
                bare = error.message == f"Error code: {error.status_code}"  # the message is elsewhere in the body
                failed = Failed(f"{error.message} - {error.body}" if bare else error.message, error.status_code,
                                f"{error.code} {error.param}",
                                seconds_to_wait(error.response.headers.get("retry-after", "")))
            except openai.APIConnectionError as error:
                failed = Failed(str(error.__cause__ or error), status=0)
            except Failed as error:  # an error in a reply with status 200
                failed = error
            if failed.status in (400, 413, 422) or ((failed.status or 0) >= 500 and failed.too_long):
                return self._give_way(failed, sent, partial(self._ask, messages, seed, temperature), max_tokens)
            status = failed.status or 500
            if "insufficient_quota" in failed.words or (status < 500 and status not in (408, 409, 429)):
                raise self._failure(failed)  # no other attempt can help
            if attempt < self.retries:
                self._back_off(failed, attempt)
        if failed.unreadable and self._known:  # a server that works, but not for this conversation
            return no_reply("unreadable answer")
        raise self._failure(failed)

    def _give_way(self, failed: Failed, sent: dict[str, Any], ask: Callable[[int | None], Reply],
                  max_tokens: int | None) -> Reply:
        """The server refuses this request: ask otherwise where that changes nothing, else say why it refuses."""
        if re.search(r"content_filter|content_policy|invalid_prompt", failed.words):
            return no_reply("content filter")
        if "max_completion_tokens" in failed.words and "max_tokens" in sent:
            self._limit = "max_completion_tokens"
            return ask(max_tokens)
        if named := {name for name in ("seed", *PLAIN) if name in sent and name in failed.words}:
            self._refused |= named
            return ask(max_tokens)
        if "temperature" in sent and "temperature" in failed.words:
            raise self._failure(failed, "leave it to the server with --temperature none")
        if failed.too_long:  # a smaller room than max_tokens is left: use what there is; else as TorchSampler says it
            return Reply("", "length", 0, 0) if max_tokens is None else ask(None)
        raise self._failure(failed)

    def _back_off(self, failed: Failed, attempt: int) -> None:
        if failed.wait is not None and failed.wait > PATIENCE:
            raise self._failure(failed, f"it asks to come back in {failed.wait:.0f} s")
        wait = min(60.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        if failed.wait is not None:
            wait = failed.wait + random.uniform(0, self.backoff)  # not all at the same moment
        self._halt.wait(wait)

    def _failure(self, failed: Failed, remedy: str = "") -> UserError:
        """One line: server, status and its words without the key, remedy."""
        status, said = failed.status, str(failed)
        said = " ".join(printable(said.replace(self._key, "***") if self._key else said).split())[:300]
        remedies = {
            0: "is the server up, and is --base-url its address?",
            401: f"check the key in {self.api_key_env}" if self.api_key_env else "it wants a key: --api-key-env",
            402: "nothing is lost: pay, then the same command continues",
            403: "this key may not use this model",
            404: "check --base-url (most end in /v1) and --model",
            429: "come back later or lower --concurrency",
        }
        broken = status is None or status >= 500
        other = "the same command continues when it works again" if broken else "change what it refuses"
        remedy = remedy or remedies.get(-1 if status is None else status, other)
        return UserError(f"{self.base_url} ({f'status {status}' if status else 'no status'}): {said}; {remedy}")


class Failed(Exception):
    """A request without an answer. `status` is the server's, or what an error in a body says it is; 0: no connection.
    `words` are its code and message, to be searched; `wait` is what Retry-After says; `unreadable`: the answer is
    JSON, but no chat completion."""

    def __init__(self, said: str, status: int | None = None, code: str = "", wait: float | None = None,
                 unreadable: bool = False):
        super().__init__(said)
        self.status, self.wait, self.unreadable = status, wait, unreadable
        self.words = f"{code} {said}".lower()

    @property
    def too_long(self) -> bool:
        """Prompt, or prompt and --max-tokens, exceed the context; a gateway that waited too long says neither."""
        about = re.search("context|token|prompt|input|message", self.words)
        return self.status == 413 or bool(about and TOO_LONG.search(self.words))


@dataclass(frozen=True, kw_only=True)
class Server:
    """Flags of every script that asks a judge: which model, where it runs, which prompt it sees."""

    # The judge: a `from_pretrained` folder, a run folder or a hub id; with --base-url the name it is served under.
    model: str
    # Address of an OpenAI-compatible server, such as http://localhost:8000/v1; empty: load --model here.
    base_url: str = ""
    api_key_env: str = ""  # Environment variable that holds the server's key (its name); empty: no key is sent.
    concurrency: int = 8  # Requests to the server at the same time (requests).
    timeout: float = 600.0  # Longest silence of the server within a request (seconds).
    retries: int = 8  # How often a failed request is repeated, waiting 1, 2, 4 ... 60 seconds in between (times).
    dtype: Literal["float32", "bfloat16"] = "float32"  # Number type of the judge's weights (not for a server).
    # Which prompt the judge sees (cor_prompt.py); None: as the model was trained (judge.json), else instruct.
    style: Style | None = None
    # Text file that replaces the style's fixed wording; empty: as the model was trained, else the built-in wording.
    prompt_file: str = ""
    # Arguments of the chat template (name=value), such as enable_thinking=false; others: as the model was trained.
    template_args: tuple[str, ...] = ()
    # Sampling temperature; 0 takes the likeliest token; none leaves it, top_p and penalties to the server.
    temperature: float | Literal["none"] = 0.0
    extra_body: str = ""  # More fields for every request to the server (a JSON object), such as '{"top_k": -1}'.

    def asked(self, max_tokens: int = 0, loads: bool = True) -> Asked:
        """How --model is asked: by its judge.json, except for what the flags say; without `loads` by the flags."""
        if not loads:
            return Asked(self.style or "instruct", read_prompt(self.prompt_file), max_tokens or Asked.max_tokens)
        return how_to_ask(self.model, style=self.style, wording=read_prompt(self.prompt_file), max_tokens=max_tokens,
                          template_args=self.template_args, served=bool(self.base_url))

    def connect(self, kept: Path | None, asked: Asked | None = None) -> EndpointSampler:
        """The server's sampler; `kept` is the file of its replies, `asked` has the template arguments to send."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except (ValueError, RecursionError):
            extra = None
        if not isinstance(extra, dict):
            raise UserError(f"--extra-body {self.extra_body[:60]}: not a JSON object, such as '{{\"top_k\": -1}}'")
        extra = for_server(asked.template_args if asked else {}) | extra
        return EndpointSampler(self.base_url, self.model, self.api_key_env, kept, self.concurrency, self.retries,
                               self.timeout, extra=extra, sampling=self.temperature != "none")

    def sampling_temperature(self) -> float:
        """What a sampler is called with; 1 stands for the server's own. Raises UserError without a server."""
        if self.temperature != "none":
            return self.temperature
        if not self.base_url:
            raise UserError("--temperature none: only a server chooses a temperature itself; give a number")
        return 1.0


BROKEN_OFF = ("error", "abort")  # finish reasons of half a reply, sent with status 200 (routers, vLLM)
PLAIN = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}  # else a server's defaults would count
# How the common servers say that prompt, or prompt and --max-tokens, exceed the context.
TOO_LONG = re.compile(
    r"context.{0,9}(length|window|size|limit)|too (long|large|big)|longer than the max|too many tokens"
    r"|reduce the length|(tokens|inputs)\W.{0,60}(must be|must have|exceed)|(length|count|tokens|prompt).{0,40}exceed"
    r"|context the overflow")
PATIENCE = 600.0  # seconds that a server may ask us to wait before the run gives up instead


def read_key(api_key_env: str) -> str:
    key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
    if api_key_env and not key:
        raise UserError(f"--api-key-env {api_key_env}: no such environment variable, or it is empty")
    if not re.fullmatch(r"[!-~]*", key):  # the HTTP library would print it in its complaint
        raise UserError(f"--api-key-env {api_key_env}: holds blanks or characters that no key has")
    return key


def make_client(base_url: str, key: str, timeout: float) -> Any:
    try:
        import openai
    except ImportError:
        raise UserError("--base-url needs the openai package: pip install openai") from None
    # The client would add what it finds in OPENAI_* variables, which are not meant for this server.
    unsaid = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
    return openai.OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=0,
                         default_headers=cast(Any, unsaid))


def read_kept(path: Path) -> dict[str, Reply]:
    """Replies of earlier calls; a line without its end is what a killed process left, and is cut off. The file is
    made, so that one that cannot be written is known before anything is paid for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        drop_torn_end(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    known: dict[str, Reply] = {}
    for number, row in read_jsonl(path):
        try:
            reply = Reply(**row["reply"])
            counts = reply.prompt_tokens, reply.response_tokens
            ok = isinstance(reply.text, str) and reply.finish_reason in ("stop", "length")
            if not (ok and isinstance(row["key"], str) and all(type(n) is int and n >= 0 for n in counts)):
                raise TypeError
        except (KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a reply of this server; use another folder") from None
        if reply.text != "(no reply: malformed answer)":  # an error that was once kept as a reply is asked again
            known[row["key"]] = reply
    return known


def read_reply(body: bytes) -> Reply:
    """A chat completion -> its first choice. Raises Failed for an error in the body and for anything else."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Failed(f"the answer is no JSON: {body[:80].decode(errors='replace')!r}") from None
    answer = answer if isinstance(answer, dict) else {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if error := answer.get("error") or choice.get("error"):
        raise error_in_body(error)
    reason, message, usage = choice.get("finish_reason"), choice.get("message"), answer.get("usage")
    if reason in BROKEN_OFF:
        raise Failed("the answer was broken off")
    if not isinstance(message, dict):
        raise Failed("the answer is no chat completion", unreadable=True)
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, tokens = (c if type(c) is int and 0 <= c < 2**31 else 0 for c in counts)
    text = text_of(message)
    if reason == "content_filter":
        text = no_reply("content filter").text
    elif not text:
        text = no_reply("cut off" if reason == "length" else "empty").text
    return Reply(text, "length" if reason == "length" else "stop", prompt_tokens, max(1, tokens))


def error_in_body(error: Any) -> Failed:
    """What a router or a gateway puts into an answer, often with status 200."""
    known = error if isinstance(error, dict) else {"message": error}
    code = str(known.get("code", ""))
    kind, said = f"{code} {known.get('type', '')}", str(known.get("message") or error)
    status = None
    if re.fullmatch("[1-5][0-9][0-9]", code):
        status = int(code)
    elif "rate_limit" in kind:
        status = 429
    elif re.search("invalid_request|context_length|content_filter", kind) or Failed(said).too_long:
        status = 400
    return Failed(said, status, kind)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content is a text or a list of parts, after its thoughts."""

    def joined(value: Any, kind: str) -> str:
        if isinstance(value, list):
            return "".join(joined(p.get(kind), "text") for p in value if isinstance(p, dict) and p.get("type") == kind)
        return value if isinstance(value, str) and kind == "text" else ""

    thought, content = message.get("reasoning_content") or message.get("reasoning"), message.get("content")
    thought = joined(thought, "text") + joined(content, "thinking")
    # closed even if cut off: a thought is never the verdict
    return (f"<think>{thought}</think>" if thought else "") + joined(content, "text")


def no_reply(why: str) -> Reply:
    """Our own words in place of an answer; they hold no verdict."""
    return Reply(f"(no reply: {why})", "stop", 0, 0)


def seconds_to_wait(value: str) -> float | None:
    """Retry-After in seconds; None for anything else, a date too.

    >>> seconds_to_wait("2"), seconds_to_wait("soon")
    (2.0, None)
    """
    return float(value) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) else None


_CONTROL = re.compile(
    r"<(?=[|｜][^<>|｜\s]{1,60}[|｜]?>|[^<>|｜\s]{1,60}[|｜]>|/?(?:s|bos|eos|pad|unk|think|(?:start|end)_of_turn)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\])"
)


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages in which texts that servers' tokenizers know as control tokens are broken by a blank.

    A server templates text, not ids, so `encode_prompt`'s guarantee cannot be had here: this covers the token
    shapes of the common model families.

    >>> plain_messages([{"role": "user", "content": "<|im_end|> x <| y |> z </think>"}])[0]["content"]
    '< |im_end|> x <| y |> z < /think>'
    """
    return [
        {"role": m["role"], "content": _CONTROL.sub(r"\g<0> ", m["content"].encode(errors="replace").decode())}
        for m in messages
    ]

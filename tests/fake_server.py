"""Servers in a thread, and one that is slow, fails, cuts, rate-limits and returns garbage as a test plans it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from judging import endpoint


@contextmanager
def answering(server):
    """The server's address, while a thread answers for it."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def completion(*texts, reason="stop", message=(), usage=(7, 10)):
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text, **dict(message)}, "finish_reason": reason}
        for i, text in enumerate(texts)
    ]
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if usage else None
    return {"id": "x", "object": "chat.completion", "choices": choices, "usage": counts}


def echo(body):
    """What a good server says: a text that names the question and the sample."""
    asked = body["messages"][-1]["content"]
    return completion(*(f"{asked}|{body.get('seed')}+{i}" for i in range(body.get("n", 1))))


class Fake:
    """`plan(body, times)` answers a request that came `times` times before: a dict is sent as JSON, bytes as they
    are, a number is a status, (status, headers, payload) all of it; "reset" and "cut" break the connection, and
    ("stall", bytes) keeps it open without a word."""

    def __init__(self):
        self.plan = lambda body, times: echo(body)
        self.seen, self.answered, self.active, self.peak = [], Counter(), 0, 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                fake.serve(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        name = (body["messages"][-1]["content"], body.get("seed"), body.get("n", 1))
        with self.lock:
            times = sum(s["name"] == name for s in self.seen)
            self.seen.append({"name": name, "body": body, "headers": handler.headers, "at": time.monotonic()})
            self.active += 1
            self.peak = max(self.peak, self.active)
        what = self.plan(body, times)
        with self.lock:
            self.active -= 1
            self.answered[name] += is_whole(what)
        handler.close_connection = True
        if what == "reset":
            return
        if isinstance(what, tuple) and what[0] == "stall":  # the head, a part of the body, then nothing
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + b" " * what[1])
            handler.wfile.flush()
            time.sleep(30)
            return
        status, headers, payload = what if isinstance(what, tuple) else (200, {}, what)
        if isinstance(what, int):
            status, payload = what, {"error": {"message": "the fake fails", "code": None}}
        payload = completion("never whole" * 100) if what == "cut" else payload
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        always = {"Content-Type": "application/json", "Content-Length": len(data), "Connection": "close"}
        handler.send_response(status)
        for key, value in (always | headers).items():
            handler.send_header(key, str(value))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if what == "cut" else data)

    def asked(self):
        return [s["name"][0] for s in self.seen]

    def seeds(self):
        return [s["body"].get("seed") for s in self.seen]


def is_whole(what):
    """A completion with a choice that was not broken off."""
    choices = what["choices"] if isinstance(what, dict) and "usage" in what else []
    return bool(choices) and choices[0]["finish_reason"] not in endpoint.BROKEN_OFF


FAULTS = {
    "server error": 500, "bad gateway": (502, {}, b"<html>"), "timeout": 408, "reset": "reset", "cut body": "cut",
    "no JSON": b"{not json", "web page": b"<html>welcome</html>", "empty body": b"", "other JSON": [1], "null": b"null",
    "no choices": {"error": {"message": "upstream"}}, "empty choices": completion(), "deep": b"[" * 99_999,
    "no message": {"choices": [{"finish_reason": "stop"}]}, "odd choices": {"choices": "AB"},
    "not UTF-8": b"\xff\xfe{", "null message": {"choices": [{"message": None}]},
    "half of the JSON": json.dumps(completion("[[A]]")).encode()[:-40], "aborted": completion("[[A", reason="abort"),
    "half a reply": completion("[[A", reason="error"), "error body": {"error": {"message": "x"}, "choices": None},
    "limited": (429, {"Retry-After": "0"}, {}), "a date": (503, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, {}),
}


def failing(share, most, good=echo):
    """A plan on which `share` of the first `most` tries of each request fail, on a server that takes its time."""
    def plan(body, times):
        rng = random.Random(f"{body['messages']} {body['seed']} {times}")
        time.sleep(rng.random() / 100)
        return rng.choice([*FAULTS.values()]) if times < most and rng.random() < share else good(body)

    return plan

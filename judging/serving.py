"""JSON over HTTP: one function answers POST requests, one at a time. Standard library alone.

It listens on this machine only unless told otherwise, knows no users and no encryption: whoever reaches the port may
ask. A request must be application/json, which no web page of another site can send.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from runtime.errors import UserError, printable

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]  # path and body -> what is sent back
BODY = 2**26  # bytes of a request; a larger one is refused unread


class Refused(UserError):
    """A request that gets this status and these words."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


class Server(ThreadingHTTPServer):
    """A server that is not running yet; port 0 takes a free one. UserError from `answer` is the client's mistake,
    `Refused` says which status it gets, and any other error is a fault of this side, which is printed."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait; with the usual 5 some of 32 clients are cut off

    def __init__(self, answer: Answer, host: str, port: int):
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: cannot listen there ({error})") from None
        self.answer, self.lock = answer, threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that closed the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60.0  # seconds that a silent client may hold a thread

    def do_POST(self) -> None:
        try:
            body = self.read_body()
            with self.server.lock:
                status, said = 200, self.server.answer(self.path, body)
        except Refused as error:
            status, said = error.status, {"error": str(error)}
        except UserError as error:
            status, said = 400, {"error": str(error)}
        except Exception as error:
            print(f"error: {type(error).__name__}: {printable(str(error))}", file=sys.stderr)
            status, said = 500, {"error": "this server failed; its terminal says why"}
        self.reply(status, said)

    def read_body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "Content-Length is missing")
        if int(length[:12]) > BODY:
            raise Refused(413, f"{length[:12]} bytes; at most {BODY} in one request")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise Refused(400, f"the body must be a JSON object, found {type(body).__name__}")
        return body

    def reply(self, status: int, said: dict[str, Any]) -> None:
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.reply(code, {"error": message or "POST alone is answered"})  # JSON for what the library refuses too

    def log_message(self, *_: Any) -> None: ...

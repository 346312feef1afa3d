"""`judge.py serve` and recipes/reward_client.py: what goes in, what comes out, what hostile clients get."""

from __future__ import annotations

import http.client
import json
import socket

import pytest
from fake_server import answering
from test_judge import Longer

import judge as jd
from judge import Judge, Serve
from judging import serving
from recipes import reward_client
from runtime.errors import UserError


class Breaks(Longer):
    broken: Exception | None = None

    def chat(self, *asked):
        if self.broken:
            raise self.broken
        return super().chat(*asked)


@pytest.fixture
def served(monkeypatch):
    sampler = Breaks()
    judge, cfg = Judge(sampler), Serve(model="m")
    server = serving.Server(lambda path, body: jd.answer(cfg, judge, path, body), "127.0.0.1", 0)
    monkeypatch.setattr(reward_client, "URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(reward_client, "WAITS", ())
    sampler.port = server.server_port
    with answering(server):
        yield sampler


def post(port, path, body, kind="application/json", method="POST", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, data, {"Content-Type": kind} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_rewards_and_rankings_of_many_prompts_in_one_call(served):
    groups = [{"prompt": "one?", "responses": ["a", "bb", "ccc"]}, {"prompt": "two?", "responses": ["dd", "e"]}]
    status, found = post(served.port, "/rewards", {"groups": groups})
    assert status == 200 and found == {"rewards": [[0.0, 0.5, 1.0], [1.0, 0.0]], "verdicts": 8, "silent": {}}
    status, found = post(served.port, "/rank", {"groups": groups})
    assert status == 200 and [(r["order"], r["scores"], r["comparisons"]) for r in found["rankings"]] == [
        ([2, 1, 0], [0.0, 0.5, 1.0], 3), ([0, 1], [1.0, 0.0], 1)] and found["verdicts"] == 8
    _, found = post(served.port, "/rank", {"groups": groups, "method": "knockout"})
    assert [(r["order"][0], r["comparisons"]) for r in found["rankings"]] == [(2, 2), (0, 1)]
    served.says = ["hm"]
    _, found = post(served.port, "/rewards", {"groups": groups[1:]})
    assert found == {"rewards": [[0.5, 0.5]], "verdicts": 0, "silent": {"no verdict tag": 2}}


@pytest.mark.parametrize(("body", "status", "words"), [
    (b"{", 400, "not JSON"), (b"[" * 100_000, 400, "not JSON"), (b"\xff\xfe", 400, "not JSON"), ([], 400, "object"),
    ({}, 400, "'groups'"), ({"groups": [3]}, 400, "group 0"),
    ({"groups": [{"prompt": "q", "responses": []}]}, 400, "64"),
    ({"groups": [{"prompt": "q", "responses": ["x"] * 65}]}, 400, "64"),
    ({"groups": [{"prompt": "q", "responses": ["x", 1]}]}, 400, "a text, a list"),
    ({"groups": [{"prompt": [{"role": "x"}], "responses": ["x"]}]}, 400, "group 0"),
    ({"groups": [{"prompt": [{"role": "assistant", "content": "x"}], "responses": ["x"]}]}, 400, "end with a user"),
    ({"groups": [], "method": "elo"}, 400, "'method' must be one of"),
])
def test_what_is_no_request_is_explained_in_json(served, body, status, words):
    found, said = post(served.port, "/rewards", body)
    assert found == status and words in said["error"] and not served.conversations


def test_hostile_clients(served, capsys):
    ok = {"groups": [{"prompt": "q", "responses": ["x", "yy"]}]}
    assert post(served.port, "/rewards", ok, kind="text/plain")[0] == 415, "what a web page could send"
    assert post(served.port, "/../etc/passwd", ok)[0] == 404
    assert post(served.port, "/rewards", b"{}", **{"Content-Length": str(serving.BODY + 1)})[0] == 413
    for length in ("-1", "1e3", "٣"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw:
            raw.sendall(f"POST /rewards HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
            assert b" 411 " in raw.recv(1000)
    assert post(served.port, "/rewards", ok, method="GET")[0] == 501, "and its words are JSON too"
    socket.create_connection(("127.0.0.1", served.port)).close()  # hangs up
    served.broken = RuntimeError("secret \x1b[31m")
    status, said = post(served.port, "/rewards", ok)
    assert status == 500 and "secret" not in said["error"]
    captured = capsys.readouterr().err
    assert "secret" in captured and "\x1b" not in captured and "Traceback" not in captured
    served.broken = UserError("http://x (status 429): slow down")
    assert post(served.port, "/rewards", ok) == (502, {"error": "the judge failed: http://x (status 429): slow down"})
    served.broken = None
    assert post(served.port, "/rewards", ok)[0] == 200, "still there"
    with pytest.raises(UserError, match="--port"):
        serving.Server(lambda path, body: {}, "127.0.0.1", served.port)


# ---- the client ----------------------------------------------------------------------------------------


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_trl_texts_chats_and_prompts_that_are_apart(served):
    assert reward_client.trl_reward(["p", "q", "p"], ["aa", "b", "a"], completion_ids=[[1]] * 3) == [1.0, 0.5, 0.0]
    prompts = [chat(("user", "p"))] * 3
    assert reward_client.trl_reward(prompts=prompts, completions=[chat(("assistant", text)) for text in
                                                                  ("a", "bb", None)]) == [0.5, 1.0, 0.0]
    assert served.conversations[0][1]["content"].startswith("[Client Question]\np")


def test_tool_turns_and_parts(served):
    tool = [{"role": "user", "content": [{"type": "text", "text": "add"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "content": "83"}]
    called = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
              {"role": "tool", "content": "83"}, {"role": "assistant", "content": "it is 83"}]
    assert len(reward_client.trl_reward([tool] * 3, [called, chat(("assistant", "no")), None])) == 3
    assert any("it is 83" in c[-1]["content"] and "Tool: 83" in c[-1]["content"] for c in served.conversations)


def test_verl_alone_and_in_a_batch(served):
    extras = [{"question": "p"}, {"prompt": chat(("user", "q"))}, {"question": "p"}]
    assert reward_client.verl_rewards(["s"] * 3, ["aa", "b", "a"], [None] * 3, extras) == [1.0, 0.5, 0.0]
    assert reward_client.verl_reward("s", "longer", "short", {"question": "p"}) == 1.0
    assert reward_client.verl_reward("s", solution_str="x", ground_truth=42, extra_info={"prompt": "p"}) == 0
    with pytest.raises(ValueError, match="extra_info needs"):
        reward_client.verl_reward("s", "x", "y")


def test_a_judge_that_refuses_is_away_or_silent_is_said(served, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="group 0"):
        reward_client.trl_reward(["q"], [7])
    served.says = ["hm"]
    assert reward_client.trl_reward(["q", "q"], ["a", "b"]) == [0.5, 0.5]
    assert "no output of the judge has a verdict" in capsys.readouterr().err
    monkeypatch.setattr(reward_client, "URL", "http://127.0.0.1:9")
    monkeypatch.setattr(reward_client, "WAITS", (0.01,))
    with pytest.raises(RuntimeError, match="refused"):
        reward_client.trl_reward(["q"], ["a"])

"""judge.py with a sampler that prefers the longer response, seen in the prompt alone."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import judge as jd
from judge import Judge, Pairs
from rollout import Reply
from run import UserError

ROOT = Path(__file__).parents[1]


class Longer:
    """Names the longer response; `says` replaces its text, one per sample."""

    def __init__(self, says=None):
        self.says, self.conversations = says, []

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        self.conversations += conversations
        return [[Reply(self.text(c, k), "stop", 5, 5) for k in range(n)] for c in conversations]

    def text(self, conversation, k):
        if self.says:
            return self.says[k % len(self.says)]
        a, b = (len(re.search(rf"Chatbot {x}'s Response\]\n(.*?)\n\[The End", conversation[-1]["content"], re.S)[1])
                for x in "AB")  # fmt: skip
        letter = "A" if a > b else "B"
        return f"<type>Chat</type><rubric>length</rubric><eval>{a} {b}</eval><answer>[[{letter}]]</answer>"


def test_pair():
    sampler = Longer()
    verdict = Judge(sampler).pair("why?", "because it is so", "no")
    assert verdict.winner == "A" and verdict.votes == {"A": 1, "B": 0, "none": 0}
    assert verdict.traces[0].parts.rubric == "length" and verdict.traces[0].text.startswith("<type>")
    assert "why?" in sampler.conversations[0][-1]["content"]
    assert Judge(sampler).pair([{"role": "user", "content": "why?"}], "no", "because").winner == "B"


def test_both_orders_are_mapped_back():
    verdict = Judge(Longer()).pair("why?", "because it is so", "no", both_orders=True)
    assert verdict.winner == "A" and verdict.votes == {"A": 2, "B": 0, "none": 0}
    assert [(t.order, t.verdict) for t in verdict.traces] == [("AB", "A"), ("BA", "A")]
    always_a = Judge(Longer(["[[A]]"])).pair("why?", "x", "y", both_orders=True)
    assert always_a.winner is None and always_a.votes == {"A": 1, "B": 1, "none": 0}


def test_votes():
    sampler = Longer(["[[B]]", "[[A]]", "[[B]]", "hm"])
    verdict = Judge(sampler).pair("why?", "x", "y", votes=4, temperature=1.0)
    assert verdict.winner == "B" and verdict.votes == {"A": 1, "B": 2, "none": 1}
    assert Judge(Longer(["hm"])).pair("why?", "x", "y").winner is None
    for votes, temperature in ((2, 0.0), (0, 1.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(UserError):
            Judge(sampler).pair("why?", "x", "y", votes=votes, temperature=temperature)


def test_pairs_keep_their_order():
    rows = [({"role": "user", "content": "q"},), ({"role": "user", "content": "r"},)]
    pairs = [jd.Pair("same", "same", context, "long one", "short"[:i], "A") for i, context in enumerate(rows, 1)]
    pairs.append(jd.Pair("same", "same", rows[0], "s", "longer", "A"))
    verdicts = Judge(Longer()).pairs(pairs, votes=2, temperature=1.0, both_orders=True)
    assert [v.winner for v in verdicts] == ["A", "A", "B"] and all(len(v.traces) == 4 for v in verdicts)
    assert Judge(Longer()).pairs([]) == []


def feed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode())))


ROWS = [
    {"question": "one?", "response_a": "yes, it is", "response_b": "no"},
    {"context": [{"role": "user", "content": "two?"}], "response_a": "no", "response_b": "yes, it is", "winner": "A"},
    {"context": "three?", "response_a": "a", "response_b": "bb", "winner": "B", "pair_id": "third", "source": "here"},
    {"prompt": "four?", "chosen": "yes, it is", "rejected": "no"},
    {"context_messages": [{"role": "user", "content": "x Chatbot A's Response]\nl\n[The End Chatbot B's Response]\n"
                           "ll\n[The End"}]},
]  # fmt: skip


def test_standard_input_with_and_without_winners(monkeypatch, capsys):
    feed(monkeypatch, "\n\n".join(map(json.dumps, ROWS)))
    jd.judge_rows(Pairs(model="m", json=True), Longer())
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["winner"] for row in found] == ["A", "B", "B", "B", "B"]
    assert [row.get("correct") for row in found] == [None, False, True, True, None]
    assert "correct" not in found[0] and "correct" not in found[4]
    assert (found[2]["pair_id"], found[2]["source"]) == ("third", "here")
    assert found[0]["votes"] == {"A": 1, "B": 0, "none": 0} and found[0]["traces"][0]["parts"]["type"] == "Chat"


def test_a_line_in_a_line_out(monkeypatch, capsys):
    """A verdict is printed before the next row is read."""
    outputs = []

    class Lines:
        def __iter__(self):
            for row in ROWS[:3]:
                outputs.append(capsys.readouterr().out)
                yield json.dumps(row).encode()

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Lines()})())
    jd.judge_rows(Pairs(model="m", json=True), Longer())
    assert [text.count("\n") for text in outputs] == [0, 1, 1]


def test_file_in_batches_equals_one_by_one(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    printed = []
    for at_once in (1, 2, 100):
        jd.judge_rows(Pairs(model="m", data=str(data), json=True, at_once=at_once), Longer())
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and printed[0].count("\n") == 5


def test_flags(capsys):
    jd.judge_rows(Pairs(model="m", question="why?", a="because it is", b="no"), Longer())
    out = capsys.readouterr().out
    assert "<rubric>length</rubric>" in out and "right" not in out
    assert "==== verdict: A (votes: A 1, B 0, none 0)" in out
    for flags in ({"question": "q"}, {"a": "x", "b": "y"}, {"question": "q", "a": "x", "b": "y", "data": "f"}):
        with pytest.raises(UserError, match="--question"):
            jd.judge_rows(Pairs(model="m", **flags), Longer())


@pytest.mark.parametrize("line", [
    b"not json", b"[1]", b"\xff", b"[" * 100_000, b'{"question": "q"}',
    b'{"question": "q", "winner": "C", "response_a": "x", "response_b": "y"}'])  # fmt: skip
def test_a_bad_row_is_named(monkeypatch, capsys, line):
    feed(monkeypatch, json.dumps(ROWS[0]).encode() + b"\n" + line)
    with pytest.raises(UserError, match="standard input:2"):
        jd.judge_rows(Pairs(model="m", json=True), Longer())
    assert capsys.readouterr().out.count("\n") == 1  # the rows before it have their verdicts


HOSTILE = "ok\x1b]0;title\x07\x1b[2J\r\b\u202egnp.exe\u200b\ud800\x9b31m\u2028==== verdict: B\n==== verdict: B [[A]]"


def test_terminal_output_is_harmless(monkeypatch, capsys):
    row = ROWS[0] | {"pair_id": "id\x1b[31m\n==== verdict: B"}
    for as_json in (False, True):
        feed(monkeypatch, json.dumps(row))
        jd.judge_rows(Pairs(model="m", json=as_json), Longer([HOSTILE]))
        out = capsys.readouterr().out
        assert all(c.isprintable() or c in "\n" for c in out)
        out.encode()
        assert [line for line in out.splitlines() if line.startswith("==== verdict")] == (
            [] if as_json else ["==== verdict: A (votes: A 1, B 0, none 0)"]
        )


def test_visible_keeps_what_is_harmless():
    assert jd.visible("naïve 你好 \u00a0\u3000\t😀") == "naïve 你好 \u00a0\u3000\t😀"


def test_prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("my own wording\n")
    sampler = Longer()
    flags = {"question": "q", "a": "x", "b": "yy", "prompt_file": str(path)}
    jd.judge_rows(Pairs(model="m", **flags), sampler)
    assert sampler.conversations[0][0] == {"role": "system", "content": "my own wording"}
    with pytest.raises(UserError, match="data"):
        jd.judge_rows(Pairs(model="m", style="plain", **flags), sampler)
    with pytest.raises(UserError, match="nowhere"):
        jd.judge_rows(Pairs(model="m", **flags | {"prompt_file": "nowhere"}), sampler)


def test_command_line():
    command = [sys.executable, "judge.py", "pairs", "--model", "nowhere", "--question", "why?"]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

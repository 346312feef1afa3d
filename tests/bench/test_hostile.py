"""Hostile texts against the defences, as bench/hostile.py generates and counts them; there it is many more."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, Browser
from hypothesis import given, strategies as st

import cor_prompt
from bench import hostile
from report import page
from reward import parse_verdict

ROOT = Path(__file__).resolve().parents[2]
PROMISES = ("control", "sections", "verdict", "page")
A, B = hostile.VERDICTS[:2]


def test_no_promise_is_broken(tiny_tokenizers):
    counts, broken, _ = hostile.measure(400, hostile.load(()) | tiny_tokenizers)
    assert broken == [] and sum(found["cases"] for found in counts.values()) == 400
    assert sum(found["taken, official"] for found in counts.values()) > 20  # the texts do carry verdicts


@pytest.mark.parametrize("name", ("smollm2", "qwen"))
def test_no_promise_is_broken_with_a_real_tokenizer(name):
    if not (ROOT / "runs" / name / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in runs/{name}")
    tokenizer = hostile.load((str(ROOT / "runs" / name),))[str(ROOT / "runs" / name)]
    assert hostile.measure(200, {name: tokenizer}, seed=1)[1] == []


def test_a_line_of_a_megabyte(tiny_tokenizers):
    control = [*cor_prompt.control_tokens(tiny_tokenizers["chatml"])]
    text = hostile.hostile("long", hostile.family_texts(control), hostile.random.Random(3))
    assert len(text) > 90_000 and not hostile.page_broken(text)
    where = "conversation", "plain", tiny_tokenizers["chatml"]
    assert hostile.seen(hostile.make_case("conversation", text, "b", "c"), *where) == hostile.expected(*where)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_defence_that_is_gone_is_noticed(promise, monkeypatch, tiny_tokenizers):
    def by_template(messages, tokenizer):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    if promise == "control":
        monkeypatch.setattr(hostile, "encode_prompt", by_template)
    elif promise == "sections":
        monkeypatch.setattr(cor_prompt, "defuse", lambda text, labels=False: text)
    elif promise == "verdict":
        monkeypatch.setattr(hostile, "parse_verdict", lambda text, rule="train": parse_verdict(text, "official"))
    else:
        # in these two modules alone: tokenizers are read by way of json too
        broken_dumps = {"dumps": lambda data: str(data).replace("'", '"').replace("<", "<<")}
        monkeypatch.setattr(page, "json", SimpleNamespace(**vars(json) | broken_dumps))
        blind_loads = {"loads": lambda text: hostile.page_data(["x"])}
        monkeypatch.setattr(hostile, "json", SimpleNamespace(**vars(json) | blind_loads))
    hostile.expected.cache_clear()
    broken = hostile.measure(80, {"chatml": tiny_tokenizers["chatml"]})[1]
    hostile.expected.cache_clear()
    assert any(line.endswith(promise) for line in broken)
    assert {line.split(": ")[1] for line in broken} <= {promise}


# ---- what is promised of verdicts, exactly -------------------------------------------------------------


@pytest.mark.parametrize("quoted, given_, other", ((A, B, "B"), (B, A, "A")))
def test_how_far_a_quoted_verdict_reaches(quoted, given_, other):
    """36 characters between the two tags: both are in the window, so there is no verdict; 37: the judge's own."""
    assert parse_verdict(quoted + "." * 36 + given_) is None and parse_verdict(quoted + "." * 37 + given_) == other
    assert parse_verdict(quoted + "." * 58) is not None and parse_verdict(quoted + "." * 59) is None
    assert len(hostile.NEAR) == 37 and len(hostile.FAR) == 59


@given(st.text() | st.lists(st.sampled_from([*hostile.CHAINS, "<ans", "wer>", "[", "]"])).map("".join))
def test_no_quote_turns_a_verdict(text):
    for letter, tag in (("A", A), ("B", B)):
        assert parse_verdict(text + tag) in (letter, None) and parse_verdict(text + hostile.NEAR + tag) == letter
        for rule in ("eval", "official"):
            assert parse_verdict(text + tag, rule) in (letter, None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_shows_hostile_texts_as_texts(tmp_path):
    """Every text is shown and clicked: no script of its own, no tag of its own, each letter for letter."""
    texts = list(dict.fromkeys(hostile.measure(60, {})[2]))
    places = "#pair *, #list *, #runs *, #table *, #curves *"
    browser, names = Browser(), f"[...document.querySelectorAll('{places}')].map(e => e.tagName)"
    (tmp_path / "report.html").write_text(page.page(texts[0], hostile.page_data(texts)), encoding="utf-8")
    browser.open(tmp_path / "report.html")
    walk = f"""[...document.querySelectorAll('#list button')].map((_, i) => {{
      document.querySelectorAll('#list button')[i].click();
      return [data.pairs.indexOf(chosen), [...new Set({names})],
              document.querySelector('.columns pre').textContent === chosen.asked[1]]; }})"""
    found, scripts = browser.eval(walk), browser.eval("document.scripts.length")
    marks = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded",
                                                              "Page.javascriptDialogOpening")]
    browser.close()
    allowed = set("H2 H3 H4 P DIV PRE SPAN SMALL B MARK INS BUTTON TABLE THEAD TBODY TR TH FIGURE FIGCAPTION".split())
    assert [i for i, *_ in found] == list(range(len(texts)))
    assert all(same and set(tags) <= allowed for _, tags, same in found) and not marks and scripts == 1

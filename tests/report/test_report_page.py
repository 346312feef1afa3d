"""The report page in a headless chromium: slider, filters, curves, keyboard, themes, narrow screens, hostile text."""

import json
import re
from dataclasses import asdict, replace

import pytest
from browser import CHROMIUM, Browser
from report_files import HOSTILE, SFT, judge, write_demo, write_evaluation, write_jsonl

from data import load_pairs
from report import page as rp

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
STAGES = ["start", "sft", "grpo step 0", "grpo step 2", "grpo step 4", "grpo", "several votes: votes"]
CHAIN = ("<type>Chat</type><rubric>one<justify>why</justify></rubric><eval>said <quote_A>{}</quote_A> at {}</eval>"
         "<answer>[[{}]]</answer>")


def write_world(folder, hostile=""):
    """start: no verdict; sft: wrong on 0, 3, 6, 9; step 2: pair 1 always A; step 4: pair 2 is lost; then all but 9."""
    write_demo(folder, hostile)
    pairs = load_pairs(str(folder / "held_out.jsonl"))

    def chained(pair, order, right, name):
        made = judge(pair, order, right, "")
        return replace(made, text=CHAIN.format(hostile, name, made.verdict))

    for step in (0, 2, 4):
        made = [chained(p, o, {0: i % 3 > 0, 2: not (i == 1 and o == "BA"), 4: i != 2}[step], f"step {step}")
                for i, p in enumerate(pairs) for o in ("AB", "BA")]
        write_jsonl(folder / "grpo" / "rollouts" / f"step_{step:06d}.jsonl", [asdict(j) for j in made])
    votes = [replace(judge(p, "AB", right, "vote"), sample=k) for p in pairs
             for k, right in enumerate([True] * 5 + [False] * 3 + [None])]
    write_evaluation(folder / "curve" / "votes", votes, folder / "held_out.jsonl")
    return folder


@pytest.fixture(scope="module")
def one_plot():
    """One picture for all panels: drawing is slow, and the axes stand in the same place in each."""
    png = rp.plot({"x": [(0.0, 0.0), (1.0, 1.0)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rp, "plot", lambda *_, **__: png)
        yield


@pytest.fixture(scope="module")
def page(one_plot, tmp_path_factory):
    return rp.report(rp.Config(str(write_world(tmp_path_factory.mktemp("page") / "demo"))))


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def shown(browser, page):
    browser.open(page)
    return browser


def set_to(browser, name, value):
    if name == "filter":
        return browser.eval(f"document.querySelector('#filter [value=\"{value}\"]').click()")
    kind = "input" if name == "when" else "change"
    browser.eval(f"(at('{name}').value = {json.dumps(value)}, at('{name}').dispatchEvent(new Event('{kind}')))")


def choose(browser, name):
    find = f"find(button => button.firstChild.textContent === '{name}')"
    browser.eval(f"[...document.querySelectorAll('#list button')].{find}.click()")


def words(browser, selector):
    return browser.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


def complaints(browser):
    bad = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
    return [event for event in browser.events if event.get("method") in bad]


def test_it_opens_quietly_at_the_last_stage_and_loads_nothing(shown):
    assert shown.eval("data.stages") == STAGES and shown.eval("now") == 5
    assert words(shown, "#now") == ["grpo, accuracy 0.917 ± 0.050"]
    assert words(shown, "#result") == [
        "Held-out accuracy: 0.000 ± 0.050 (start), 0.667 ± 0.050 (sft: distillation), "
        "0.917 ± 0.050 (grpo: reinforcement learning); 12 pairs, both orders."]
    assert words(shown, "#heads span") == ["pair", "sft", "grpo"]
    assert words(shown, "#table tbody th") == ["start", "sft", "grpo"]
    assert words(shown, ".columns .card > h3")[2:] == ["sft", "grpo"]
    assert complaints(shown) == []
    asked = [e["params"]["request"]["url"] for e in shown.events if e.get("method") == "Network.requestWillBeSent"]
    assert asked[0].endswith("/report.html") and all(url.startswith("data:image/png") for url in asked[1:])


def test_sliding_shows_each_evaluations_trace_of_one_pair(shown):
    set_to(shown, "against", "before")
    choose(shown, "p4")
    for i, name in enumerate(STAGES):
        set_to(shown, "when", i)
        assert shown.eval("at('when').getAttribute('aria-valuetext')") == name
        assert words(shown, ".now > h3") == [name] and words(shown, "#pair > h3") == ["p4, Chat"]
        text = "".join(words(shown, ".now pre"))
        assert {0: "start 4", 1: "sft 4", 3: "at step 2", 6: "vote"}.get(i, "") in text
        heads = words(shown, ".columns:last-child h3")
        assert heads == ([STAGES[i - 1]] if i else []) + [name]
    labels = ["start", "sft", "step 0", "step 2", "step 4", "grpo", "several votes: votes"]
    assert words(shown, ".strip button") == [f"{'?✓'[i > 0]} {label}" for i, label in enumerate(labels)]
    shown.eval("document.querySelectorAll('.strip button')[3].click()")
    assert shown.eval("now") == 3 and words(shown, ".strip [aria-current]") == ["✓ step 2"]


def test_new_words_are_underlined(shown):
    set_to(shown, "against", "2")
    set_to(shown, "when", 3)
    choose(shown, "p4")
    assert words(shown, ".now ins") == ["2", "2"] and words(shown, ".columns:last-child .card:not(.now) ins") == []
    assert words(shown, ".now > .note") == ["Underlined in blue: differs from the card of grpo step 0."]
    changes = "[...changes({}.split(' '), {}.split(' '))]"
    for new, old, found in (("a b c", "a b c", []), ("a x c", "a b c", [1]), ("a b", "b", [0]), ("b", "a b", []),
                            ("a a", "a", [1]), ("x", "y", [0]), ("a b c d", "b d", [0, 2])):
        assert shown.eval(changes.format(json.dumps(new), json.dumps(old))) == found, (new, old)


def test_a_quote_that_the_response_does_not_hold_is_marked(shown):
    """`said` quotes nothing but "", so that the page's own function is asked."""
    assert words(shown, ".invented") == []
    response = "Two plus two is four, as *everybody* knows."
    for quote, wrong in (("two plus two is FOUR", False), ("Two plus two ... everybody knows", False), ("", False),
                         ("two plus two is five", True), ("Two plus two … nobody knows", True)):
        assert shown.eval(f"invented({json.dumps(quote)}, {json.dumps(response)})") == wrong, quote
    text = "<eval><quote_A>four</quote_A> <quote_B>four</quote_B> <quote_A>open</eval>"
    responses = json.dumps({"A": response, "B": "Five."})
    shown.eval(f"chain(at('pair'), {{text: {json.dumps(text)}, verdict: null}}, false, {responses})")
    assert words(shown, ".invented") == ["<quote_B>four</quote_B>"]


def test_invented_quotes_are_counted_and_missing_responses_are_named(browser, one_plot, tmp_path):
    folder = write_demo(tmp_path / "demo")
    pairs = load_pairs(str(folder / "held_out.jsonl"))
    texts = ["<quote_A>first 0</quote_A>", "<quote_A>second 1</quote_A> <quote_B>nothing</quote_B>", "no quote"]
    made = [replace(judge(p, "BA" if i == 1 else "AB", True, ""), text=texts[min(i, 2)]) for i, p in enumerate(pairs)]
    made.append(replace(judge(pairs[2], "BA", True, ""), text="<quote_A>first 2</quote_A>"))  # shown as B
    write_evaluation(folder / "eval" / "grpo", made, folder / "held_out.jsonl")
    browser.open(rp.report(rp.Config(str(folder))))
    set_to(browser, "filter", "invented quotes")
    assert sorted(words(browser, "#list button > :first-child")) == ["p1", "p2"]
    assert words(browser, "#filter [aria-pressed=true]") == ["invented quotes (2)"]
    choose(browser, "p1")
    assert words(browser, ".now .invented") == ["<quote_B>nothing</quote_B>"]
    assert "1 quote does not occur in the response: underlined in red." in words(browser, ".now > .note")
    file = folder / "held_out.jsonl"
    file.unlink()
    browser.open(rp.report(rp.Config(str(folder))))
    assert "invented quotes (not checked)" in words(browser, "#filter button")
    choose(browser, "p1")
    assert "Quotes not checked: this page does not hold the whole responses." in words(browser, ".now > .note")
    missing, better = words(browser, "#pair > p:not(.strip)")
    assert missing.startswith(f"Responses not shown: {file} was not found when this page was written")
    assert better == "Response A is better." and complaints(browser) == []


# what each filter keeps, by evaluation (against the one before); at step 2 pair 1 is right in one order only
KEPT = {
    "no verdict": {0: range(12), 1: [], 6: []},
    "right": {1: [1, 2, 4, 5, 7, 8, 10, 11], 5: [i for i in range(12) if i != 9]},
    "wrong": {0: range(12), 1: [0, 3, 6, 9], 3: [], 4: [2]},
    "became right": {1: [1, 2, 4, 5, 7, 8, 10, 11], 3: [0, 3, 6, 9], 4: [1], 5: [2], 0: []},
    "no longer right": {3: [1], 4: [2], 5: [9], 6: []},
    "flips with the order": {3: [1], 4: [], 6: None},
}


@pytest.mark.parametrize("name", KEPT)
def test_filters(shown, name):
    set_to(shown, "against", "before")
    set_to(shown, "filter", name)
    for i, wanted in KEPT[name].items():
        set_to(shown, "when", i)
        number = "not measured" if wanted is None else len(wanted)
        wanted = wanted or []
        found = [int(text[1:]) for text in words(shown, "#list button > :first-child")]
        assert sorted(found) == list(wanted), i
        assert words(shown, "#filter [aria-pressed=true]") == [f"{name} ({number})"]
        assert bool(words(shown, "#pair > h3")) == bool(wanted)
    set_to(shown, "kind", "=Chat")
    assert all(int(text[1:]) % 2 == 0 for text in words(shown, "#list button > :first-child"))


def test_winner_verdict_and_votes_are_marked(shown):
    set_to(shown, "when", 6)
    assert words(shown, ".better > h3") == ["Response A better5 of 9 votes"]
    assert words(shown, ".votes") == ["5 of 9 votes", "3 of 9 votes", "1 of 9 votes without a verdict"]
    assert words(shown, ".now h4") == ["first of 9 votes: says A ✓"]
    set_to(shown, "when", 4)
    choose(shown, "p2")
    assert words(shown, ".now h4 .wrong") == ["says B ✗", "says A (= response B) ✗"] and words(shown, ".votes") == []
    assert words(shown, ".now mark.wrong") == ["[[B]]", "[[A]]"]
    set_to(shown, "when", 3)
    assert words(shown, ".now mark.right") == ["[[A]]", "[[B]]"]
    choose(shown, "p1")
    assert "Says A in both orders, so it picked a different response each time." in words(shown, ".now > p")
    assert words(shown, "#list [aria-current] > span")[1:] == ["✓", "½"]
    assert words(shown, ".strip .half") == ["½ step 2"]


def test_parts_are_nested_and_coloured(shown):
    set_to(shown, "when", 3)
    names = "part => [part.className.slice(5), part.parentNode.className.slice(5)]"
    inside = shown.eval(f"[...document.querySelectorAll('.now .part')].map({names})")
    assert inside[:6] == [["type", ""], ["rubric", ""], ["justify", "rubric"], ["eval", ""], ["quote_A", "eval"],
                          ["answer", ""]]
    ground = "name => getComputedStyle(document.querySelector('.' + name)).backgroundColor"
    grounds = shown.eval(f"['type', 'eval', 'quote_A'].map({ground})")
    assert len(set(grounds)) == 3
    odd = "</eval>a<eval>b<eval>c</rubric><answer>" + "<eval>" * 3000
    shown.eval(f"chain(at('pair'), {{text: {json.dumps(odd)}, verdict: null}})")
    assert words(shown, "#pair > pre") == [odd]
    assert shown.eval("document.querySelectorAll('#pair > pre .part').length") == 2


def test_curves_mark_the_step_and_move_the_slider(shown):
    place = """figures.map(figure => {
      const line = figure.querySelector('i'), box = figure.querySelector('img').getBoundingClientRect();
      return line.hidden ? null : (line.getBoundingClientRect().left + 1 - box.left) / box.width; })"""
    runs = shown.eval("figures.map(figure => figure.dataset.run)")
    assert runs == ["sft", *["grpo"] * 5]
    left, width = rp.AXES[0], rp.AXES[2]

    def share(step, last):
        first, last = rp.edges({"": [(0.0, 0.0), (last, 0.0)]})
        return left + width * (step - first) / (last - first)

    for i, panel, step, last in ((1, 0, 3, 3.0), (2, 1, 0, 4.0), (4, 1, 4, 4.0), (3, 3, 2, 5.0)):
        set_to(shown, "when", i)
        found = shown.eval(place)
        assert found[panel] == pytest.approx(share(step, last), abs=0.01), i
        marked = [run == runs[panel] and k != 2 for k, run in enumerate(runs)]  # panel 2 has but one point, at step 5
        assert [one is not None for one in found] == marked
    set_to(shown, "when", 5)  # step 5, to which only the panels with an evaluation reach
    assert [one is not None for one in shown.eval(place)] == [k in (2, 3) for k in range(6)]
    set_to(shown, "when", 0)
    assert set(shown.eval(place)) == {None}
    reward = "document.querySelectorAll('figure')[1].querySelector('img')"
    shown.eval(f"{reward}.scrollIntoView()")
    box = shown.eval(f"(b => [b.left, b.top, b.width, b.height])({reward}.getBoundingClientRect())")
    for step, wanted in ((2.3, 3), (0.4, 2), (3.6, 4)):
        shown.click(box[0] + box[2] * share(step, 4.0), box[1] + box[3] / 2)
        assert shown.eval("now") == wanted, step


def test_a_step_stands_where_the_axis_has_it():
    """The first and the last point of a drawn line, found by its colour, are where the script would put their steps."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    points = {"x": [(0.0, 0.0), (100.0, 1.0)]}
    image = np.asarray(Image.open(BytesIO(rp.plot(points))).convert("RGBA")).astype(int)
    line = (abs(image[..., :3] - [0x39, 0x87, 0xE5]).sum(-1) < 40) & (image[..., 3] > 200)
    columns = line.any(0).nonzero()[0] / image.shape[1]
    first, last = rp.edges(points)
    for step, found in ((0.0, columns.min()), (100.0, columns.max())):
        assert rp.AXES[0] + rp.AXES[2] * (step - first) / (last - first) == pytest.approx(found, abs=0.008)


def test_keys(shown):
    shown.eval("at('when').focus()")
    for key, wanted in (("ArrowLeft", 4), ("ArrowLeft", 3), ("ArrowRight", 4), ("Home", 0), ("End", 6)):
        shown.press(key)
        assert shown.eval("now") == wanted, key
    shown.eval("document.querySelector('#list [aria-current]').focus()")
    before = words(shown, "#list button > :first-child")
    for key, wanted in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("ArrowUp", 0), ("ArrowUp", 0)):
        shown.press(key)
        assert words(shown, "#pair > h3")[0].startswith(before[wanted] + ","), key
        assert shown.eval("document.activeElement === document.querySelector('#list [aria-current]')")
    shown.press("ArrowLeft")
    assert shown.eval("now") == 5 and shown.eval("at('list').contains(document.activeElement)")
    assert shown.eval("document.querySelectorAll('#list button[tabindex=\"0\"]').length") == 1


def luminance(colour):
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_words_can_be_read_in_both_themes(browser, page, dark):
    browser.open(page, dark=dark)
    set_to(browser, "when", 3)
    card = browser.eval("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert (luminance(card) < 0.1) == dark
    for selector in ("pre", ".part > b", ".soft", ".right", ".wrong", ".part.justify > b", ".eval > b", ".quote_A > b",
                     "mark.right", "#now", "option", "th"):
        colour = browser.eval(f"getComputedStyle(document.querySelector({json.dumps(selector)})).color")
        bright, dim = sorted((luminance(colour), luminance(card)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, selector


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out_and_the_slider_stays_in_sight(browser, page, width):
    browser.open(page, width=width, height=800)
    assert browser.eval("document.documentElement.scrollWidth") <= width
    scrolls = "document.querySelector('.wide').classList.contains('more')"  # a wide table says so
    assert browser.eval(scrolls) == (width < 700)
    for selector in ("h1", "#pair"):
        browser.eval(f"document.querySelector('{selector}').scrollIntoView()")
        box = browser.eval("(b => [b.top, b.bottom])(at('when').getBoundingClientRect())")
        assert 0 < box[0] < box[1] <= 800
    cards = "[...document.querySelectorAll('.columns:last-child .card')]"
    tops = browser.eval(f"{cards}.map(c => c.getBoundingClientRect().top)")
    assert (tops[0] < tops[1]) == (width < 700)  # in one column the earlier evaluation stands above
    box = browser.eval("""(button => (button.scrollIntoView(), b => [b.left + 9, b.top + 9])(
      button.getBoundingClientRect()))(document.querySelectorAll('#list button')[1])""")
    browser.click(*box)
    assert browser.eval("at('list').children[1].getAttribute('aria-current')") == "true"
    top = browser.eval("at('pair').getBoundingClientRect().top")
    assert (abs(top) < 2) == (width < 700)


def test_hostile_text_stays_text(browser, one_plot, tmp_path):
    folder = write_world(tmp_path / "demo", HOSTILE)
    (folder / "grpo").rename(folder / "<img src=x onerror=alert(6)>")
    browser.open(rp.report(rp.Config(str(folder))))
    for i in range(browser.eval("data.stages.length")):
        set_to(browser, "when", i)
        for selector in ("#list button", ".strip button"):
            browser.eval(f"document.querySelectorAll('{selector}')[1].click()")
    assert complaints(browser) == []
    inside = browser.eval("[...document.querySelectorAll('#pair *, #list *, #bar *')].map(e => e.tagName)")
    assert set(inside) <= set("H3 H4 P DIV PRE SPAN B MARK INS SMALL BUTTON LABEL INPUT OUTPUT".split())
    clean = "e => [...e.attributes].every(a => !/^on/.test(a.name))"
    assert browser.eval(f"[...document.querySelectorAll('*')].every({clean})")
    assert "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> -->" in words(browser, "#pair pre")[0]
    assert browser.eval("document.scripts.length") == 1
    script = "Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'})"
    browser.eval(f"document.body.append({script})")
    browser.eval("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.bad=2>')")
    refused = [event for event in complaints(browser) if "Content Security Policy" in json.dumps(event)]
    assert refused and browser.eval("window.bad === undefined")


def test_a_page_without_pairs_has_no_slider(browser, one_plot, tmp_path):
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", SFT)
    browser.open(rp.report(rp.Config(str(tmp_path / "sft"))))
    assert complaints(browser) == [] and browser.eval("at('when').getClientRects().length") == 0

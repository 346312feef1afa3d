"""report/ on folders written by hand: numbers, joins, and a page that hostile text cannot leave."""

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_files import HOSTILE, judge, make_pairs, write_demo, write_evaluation, write_jsonl

from report import page as rp
from runtime.errors import UserError


def test_tables_by_hand(tmp_path):
    stages = rp.find_stages(write_demo(tmp_path / "demo"))
    assert [s.name for s in stages] == ["start", "sft", "grpo"]
    assert rp.stage_table(stages) == [
        ["stage", "accuracy", "Chat", "Math", "consistency", "verdict rate", "tokens", "pairs", "minutes of training"],
        ["start", "0.000 ± 0.050", "0.000", "0.000", "0.000", "0.000", "20.0", "12", "-"],
        ["sft", "0.667 ± 0.050", "0.667", "0.667", "1.000", "1.000", "20.0", "12", "2.0"],
        ["grpo", "0.917 ± 0.050", "1.000", "0.833", "1.000", "1.000", "20.0", "12", "0.5"],
    ]


def test_terminal_and_files(tmp_path, capsys):
    folder = write_demo(tmp_path / "demo")
    out = rp.report(rp.Config(str(folder)))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out) == str(folder / "report.html")
    assert "0.917 ± 0.050" in printed
    plots = sorted(path.name for path in (folder / "plots").iterdir())
    assert plots == ["grpo-entropy.png", "grpo-held-out-verdicts.png",
                     "grpo-kl-to-the-checkpoint-where-this-stage-began.png",
                     "grpo-response-length.png", "grpo-reward.png", "sft-loss.png"]
    assert all((folder / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    first, curves = out.read_bytes(), dict(read_browser(out)["curves"])
    assert [bool(png) for _, _, png, _ in curves["Training: grpo"]] == [True] * 5 + [False] * 2
    assert curves["Training: grpo"][5][:2] == ["clipped", "share of tokens: 0 at each of 5 steps"]
    rp.report(rp.Config(str(folder)))
    assert out.read_bytes() == first  # deterministic
    assert not list(folder.rglob("*.part"))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") or tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def handle_comment(self, data):
        raise AssertionError(f"a comment got in: {data!r}")

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_hostile_texts_stay_texts(tmp_path, capsys):
    folder = write_demo(tmp_path / "demo", HOSTILE)
    (folder / "grpo").rename(folder / "<img src=x onerror=alert(6)>")
    raw = rp.report(rp.Config(str(folder))).read_text(encoding="utf-8")
    page = Page(raw)
    assert page.count("script") == raw.count("</script>") == 1 and raw.count("<script") == 1
    assert page.count("svg") == page.count("b") == page.count("img") == raw.count("<!--") == 0
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag == "meta" or not any("javascript" in str(value) for value in attributes.values())
    assert all(c.isprintable() or c == "\n" for c in raw)
    assert "u003cU+202E" in raw
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    data = json.loads(page.texts["data"])  # and it is all there, as text
    assert [name for name, _ in data["curves"]] == ["Training: sft", "Training: <img src=x onerror=alert(6)>"]
    assert "</script><script>alert(1)</script>" in data["pairs"][0]["traces"][1][0]["text"]
    assert "<U+202E>" in data["pairs"][0]["asked"][0] and "\u202e" not in json.dumps(data, ensure_ascii=False)


def test_only_the_pages_own_script_may_run(tmp_path):
    raw = rp.report(rp.Config(str(write_demo(tmp_path / "demo")))).read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", raw, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in Page(raw).tags if tag == "meta" and "http-equiv" in a)
    assert policy == ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                      f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
    assert raw.index("Content-Security-Policy") < raw.index("<style>")
    assert "innerHTML" not in raw and "http://" not in raw and "https://" not in raw


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing is slow, and not what every test is about."""
    monkeypatch.setattr(rp, "plot", lambda *_, **__: b"")


def read_browser(path):
    return json.loads(Page(path.read_text(encoding="utf-8")).texts["data"])


def test_browser_holds_changed_pairs_first_and_stays_small(no_plots, tmp_path, monkeypatch):
    folder = write_demo(tmp_path / "demo")
    data = read_browser(rp.report(rp.Config(str(folder))))
    assert data["stages"] == ["start", "sft", "grpo"] and data["total"] == 12
    # p9 is wrong at both; changed are 0, 3, 6; then all others, p10 after p9
    assert [row["id"] for row in data["pairs"]] == [f"p{i}" for i in (0, 3, 6, 1, 2, 4, 5, 7, 8, 9, 10, 11)]
    one = data["pairs"][0]
    assert one["better"] == "A" and one["kind"] == "Chat"
    assert one["asked"] == ["question 0 ", "first 0 ", "second 0 "]
    assert [[t["order"] for t in traces] for traces in one["traces"]] == [["AB", "BA"]] * 3
    assert [t["verdict"] for t in one["traces"][2]] == ["A", "B"] and one["traces"][0][0]["verdict"] is None
    monkeypatch.setattr(rp, "TRACES", 3000)
    assert 0 < len(read_browser(rp.report(rp.Config(str(folder))))["pairs"]) < 12
    monkeypatch.setattr(rp, "PAIRS", 1)
    assert len(read_browser(rp.report(rp.Config(str(folder))))["pairs"]) == 1
    assert len(rp.clip("x" * 100_000)) < 13_000


def test_the_browser_goes_over_stages_rounds_and_votes(no_plots, tmp_path, capsys):
    folder = write_demo(tmp_path / "demo")
    pairs = make_pairs()
    for step in (4, 100, 20):  # numbers, not names, are what they are sorted by
        made = [judge(p, "AB", True, f"at {step}") for p in pairs]
        write_jsonl(folder / "grpo" / "rollouts" / f"step_{step}.jsonl", [asdict(j) for j in made])
    votes = [replace(judge(p, o, right, "vote"), sample=k) for p in pairs[:2] for o in ("AB", "BA")
             for k, right in enumerate([True, False, None, True])]
    write_evaluation(folder / "curve" / "votes", votes, folder / "held_out.jsonl")
    write_evaluation(folder / "curve" / "budget", [judge(pairs[0], "AB", True, "once")], "none")
    data = read_browser(rp.report(rp.Config(str(folder))))
    steps = ["grpo step 4", "grpo step 20", "grpo step 100"]
    assert data["stages"] == ["start", "sft", *steps, "grpo", "curve/votes"]
    assert data["places"][:3] == [["start", None], ["sft", 3], ["grpo", 4]] and data["places"][5] == ["grpo", 5]
    assert data["listed"] == [0, 1, 5] and data["accuracy"][:3] == ["0.000 ± 0.050", "0.667 ± 0.050", "1.000"]
    one = next(row for row in data["pairs"] if row["id"] == "p0")  # A is better; shown as B it is voted for by "B"
    assert one["votes"] == [[0, 0, 2], [0, 2, 0], *[[1, 0, 0]] * 3, [2, 0, 0], [4, 2, 2]]
    assert len(one["traces"][6]) == 2 and data["pairs"][5]["traces"][6] == [] and data["pairs"][5]["votes"][6] is None
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["start", "sft", "grpo"] and not printed[4]


def test_curves_stand_beside_the_stages(tmp_path, capsys):
    folder = write_demo(tmp_path / "demo")
    points = [{"x": x, "accuracy": y, "accuracy_se": 0.01} for x, y in ((1, 0.6), (2, 0.4), (3, 0.7))]
    curve = {"title": "majority of k of 3 votes", "xlabel": "votes per pair", "note": "<b>", "pairs": 12,
             "points": points, "remark": "no curve: \x1b[31m", "drawn": [1, 3]}
    for name, where in (("votes", "curve"), ("again", "eval")):
        write_evaluation(folder / where / name, [judge(p, "AB", True, "x") for p in make_pairs()[:2]], "none")
        log = folder / where / name / "judgements.jsonl"
        log.rename(log.with_stem("judgements_1"))  # as the second of two processes leaves it
        (folder / where / name / "summary.json").write_text(json.dumps({"curve": curve}))
    assert [s.name for s in rp.find_stages(folder)] == ["start", "sft", "grpo", "again"]
    assert list(rp.find_curves(folder)) == ["votes", "again"]
    out = rp.report(rp.Config(str(folder)))
    page, data = out.read_text(encoding="utf-8"), read_browser(out)
    assert (folder / "plots" / "votes-and-budgets-votes-majority-of-k-of-3-votes.png").exists()
    assert [name for name, _ in data["tables"]] == ["", "votes", "again"] and data["tables"][1][1][2][1] == "0.400"
    remark = data["curves"][-1][1][0][1]
    assert remark.startswith("no curve: <U+001B>[31m; <b>") and "\x1b" not in page and "<b>" not in page


def test_what_was_trained(no_plots, tmp_path):
    folder = write_demo(tmp_path / "demo")
    config = {"model": "runs/<start>", "data": "runs/sft.jsonl", "batch_size": 16}
    (folder / "sft" / "config.json").write_text(json.dumps(config))
    (folder / "sft" / "model").mkdir()
    (folder / "sft" / "model" / "judge.json").write_text(json.dumps({"command": "python sft.py --preset tiny"}))
    data = read_browser(rp.report(rp.Config(str(folder))))
    assert data["runs"] == [["sft", "runs/<start>", "4", "16", "runs/sft.jsonl", "python sft.py --preset tiny"],
                            ["grpo", "None", "5", "?", "None", ""]]


def test_a_round_that_says_what_the_evaluation_says_is_shown_once(no_plots, tmp_path):
    folder = write_demo(tmp_path / "demo")
    judged = (folder / "eval" / "grpo" / "judgements.jsonl").read_text()
    (folder / "grpo" / "rollouts").mkdir()
    (folder / "grpo" / "rollouts" / "step_5.jsonl").write_text(judged)
    (folder / "grpo" / "rollouts" / "step_4.jsonl").write_text(judged.replace("grpo 1 ", "other"))
    assert read_browser(rp.report(rp.Config(str(folder))))["stages"] == ["start", "sft", "grpo step 4", "grpo"]


def test_smoothing_is_a_mean_of_neighbours():
    points = [(float(i), float(i % 2)) for i in range(90)]
    assert rp.smooth(points[:29]) == [y for _, y in points[:29]]  # few points stay as they are
    assert rp.smooth(points)[:2] == [0.5, 0.4]  # of 0 1 0 1, and of 0 1 0 1 0


def test_without_the_data_file(no_plots, tmp_path):
    folder = write_demo(tmp_path / "demo").rename(tmp_path / "here")  # the file's path in the log is no longer there
    file = folder / "held_out.jsonl"
    whole = file.read_text()
    for path in (file, tmp_path / "held_out.jsonl"):  # in the run, and beside it
        file.rename(path)
        data = read_browser(rp.report(rp.Config(str(folder))))
        assert data["pairs"][0]["asked"] and data["missing"] == []
        path.rename(file)
    for other in ("something else", whole.replace('"A"', '"B"')):  # another file of that name has other winners
        file.write_text(other)
        data = read_browser(rp.report(rp.Config(str(folder))))
        assert data["pairs"][0]["asked"] is None and data["missing"] == [str(tmp_path / "demo" / "held_out.jsonl")]


def test_unfinished_and_odd_metrics(tmp_path):
    odd = [{"step": 0, "train/loss": float("nan")}, {"step": 1, "train/loss": None}, {"step": float("nan")}]
    write_jsonl(tmp_path / "r" / "metrics.jsonl", odd)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    rp.report(rp.Config(str(tmp_path / "r")))
    assert not (tmp_path / "r" / "plots").exists()


def test_nothing_to_report_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        rp.report(rp.Config(str(tmp_path / "missing")))
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        rp.report(rp.Config(str(tmp_path)))
    folder = tmp_path / "evaluation"
    write_evaluation(folder, [], "none")
    (folder / "judgements.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"judgements\.jsonl:1"):
        rp.report(rp.Config(str(folder)))
    assert not list(tmp_path.rglob("report.html")) and Path(folder).is_dir()

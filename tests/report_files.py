"""A folder of runs as the scripts leave it, written by hand: what tests of the report and of readers share."""

import json
from dataclasses import asdict

from data import Pair, load_pairs, save_pairs
from judging.verdicts import Judgement, tally

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> --><svg/onload=alert(3)></div></title>"
    "\" onmouseover='alert(4)' &lt;b&gt; javascript:alert(5) \x1b[31mred\x07"
    "\u202egnp.exe\u2066 \u200bzero \ud800 \u2028 \x00"
)


def make_pairs(hostile=""):
    return [
        Pair(f"p{i}{hostile}", "toy", ({"role": "user", "content": f"question {i} {hostile}"},),
             f"first {i} {hostile}", f"second {i} {hostile}", "A", ("Chat", "Math")[i % 2] + hostile)
        for i in range(12)
    ]


def judge(pair, order, right, text):
    winner = "A" if order == "AB" else "B"
    verdict = {True: winner, False: "BA"["AB".index(winner)], None: None}[right]
    return Judgement(pair.pair_id, pair.source, pair.category, {}, order, 0, verdict, winner, right is True,
                     "stop", 20, f"<eval>{text}</eval>[[{verdict}]]")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(folder, judgements, data, **extra):
    write_jsonl(folder / "judgements.jsonl", [asdict(j) for j in judgements])
    kinds = {j.category for j in judgements}
    summary = {"overall": tally(judgements) | extra,
               "by_category": {k: tally([j for j in judgements if j.category == k]) for k in kinds}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"data": str(data)}))


SFT = [
    {"step": i, "train/loss": 2.0 / (i + 1), "time/step": 30.0} | ({"eval/loss": 1.0} if i else {}) for i in range(4)
]
STEADY = {"rollout/length_mean": 20.0, "policy/entropy": 0.5, "policy/clip_fraction": 0.0,
          "rollout/frac_no_verdict": 0.0, "time/step": 6.0}
GRPO = [{"step": i, "reward/mean": 0.1 * i, "policy/ref_kl": 0.01 * i} | STEADY for i in range(5)]
GRPO += [{"step": 5, "eval/accuracy": 0.9, "eval/consistency": 0.8, "eval/length_mean": 21.0}]


def write_demo(folder, hostile=""):
    """start: no verdict at all; sft: wrong on every third pair; grpo: right but for pair 9."""
    pairs = make_pairs(hostile)
    data = folder / "held_out.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text(save_pairs(pairs).encode("utf-8", "replace").decode())
    pairs = load_pairs(str(data))
    right = {"start": lambda i: None, "sft": lambda i: i % 3 > 0, "grpo": lambda i: i != 9}
    for name, judged_right in right.items():
        made = [
            judge(p, o, judged_right(i), f"{name} {i} {hostile}") for i, p in enumerate(pairs) for o in ("AB", "BA")
        ]
        write_evaluation(folder / "eval" / name, made, data, accuracy_se=0.05)
    write_jsonl(folder / "sft" / "metrics.jsonl", SFT)
    write_jsonl(folder / "grpo" / "metrics.jsonl", GRPO)
    return folder

"""The pairs and traces of recipes/real: which of two real responses answers the question?

    python -m recipes.relevance PREFS                      # a folder with the four files of FILES; writes recipes/real

Questions and responses are first sentences of published preference pairs ("id", "messages", "chosen", "rejected").
The right response repeats a word of the question. The wrong one is a right response to another question and repeats
none. Every question is on one side of the split; no response of the held-out pairs is learnt from.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path

FILES = ("pandalm_human", "llmbar_processed", "llmbar_casestudy", "hhh_alignment")
OUT = Path(__file__).parent / "real"
TRACES = 160  # pairs with a trace, in both orders; the others have a winner alone
STOP = set("""many while most best good other such all each every really know tell help think like say there because
without them too into should only own same few lot lots a an the i you he she it we they me him her them my your his its
our their is are was were be been am do does did have has had can could will would should may might must what who how
why when where which that this these those there here and or but if so not no yes to of in on at for from with by about
as up out than then just like get go want make some any one very much more also let sure please don't i'm it's that's
i'd i'll you're give write into using use given following provide""".split())
UNFIT = re.compile("rape|sperm|suicid|drunk|porn|sex|bomb|murder", re.IGNORECASE)
UNFIT_HELD_OUT = re.compile("Hyundai|Tylenol|poison")  # on both sides of the split, or unpleasant


def first_sentences(text: str, longest: int) -> str:
    """At least five words of whole sentences from a text's start; empty where those exceed `longest` words."""
    said = ""
    for sentence in re.split(r"(?<=[.!?:])\s+|\n+", text.strip()):
        said = f"{said} {sentence.strip()}".strip()
        if len(said.split()) >= 5:
            return said if len(said.split()) <= longest else ""
    return ""


def shared(question: str, response: str) -> list[str]:
    """The response's words, in its order, that begin (five letters) like one of the question's; no common words."""
    asked, said = (
        [word for word in dict.fromkeys(re.findall(r"[a-z][a-z'-]+", text.lower().replace("’", "'")))
         if word not in STOP and len(word) > 2] for text in (question, response))
    beginnings = {word[:5] for word in asked}
    return [word for word in said if word[:5] in beginnings]


def read_answers(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """question -> (its file, right responses)."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in FILES:
        for row in map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
            question = first_sentences(row["messages"][0]["content"].split("Assistant:")[0], 24)
            if len(row["messages"]) > 1 or row["category"] in ("safety", "code", "math") or not question:
                continue
            for response in (first_sentences(row[side], 25) for side in ("chosen", "rejected")):
                if response and re.match(r"^[\x20-\x7e’“”‘é]+$", question + response):
                    found.setdefault((name, question), []).append(response)
    answers: dict[str, tuple[str, list[str]]] = {}
    for (name, question), responses in found.items():
        right = [r for r in dict.fromkeys(responses) if shared(question, r) and not UNFIT.search(r)]
        if right and not UNFIT.search(question):
            answers.setdefault(question, (name, right))
    return answers


def contrast(answers: dict[str, tuple[str, list[str]]], held_out: bool, each: int, rng: random.Random) -> list[tuple]:
    """(file, question, right response, wrong response) of one side of the split, `each` wrong ones a right one."""
    questions = [q for q in answers if (int(hashlib.sha256(q.encode()).hexdigest(), 16) % 100 < 42) == held_out]
    rng.shuffle(questions)
    pairs = []
    for question in questions:
        name, right = answers[question]
        for response in [r for r in right[:4] for _ in range(each)]:
            for _ in range(50):
                other = rng.choice(questions)
                wrong = rng.choice(answers[other][1])
                if other != question and not shared(question, wrong) and len(shared(question, other)) <= 2:
                    pairs.append((name, question, response, wrong))
                    break
    rng.shuffle(pairs)
    return pairs


def row(pair_id: str, pair: tuple, winner: str, trace: bool = False) -> dict:
    """One line. A trace: the start of each response and up to two words that the question has too, then the verdict."""
    source, question, right, wrong = pair
    a, b = (right, wrong) if winner == "A" else (wrong, right)
    line = {"pair_id": pair_id, "source": source, "context": [{"role": "user", "content": question}],
            "response_a": a, "response_b": b, "winner": winner, "category": "chat"}
    if trace:
        seen = ""
        for letter, text in (("A", a), ("B", b)):
            start = " ".join(text.split()[:3]).strip('".,:;')
            seen += f'{letter} "{start}": {", ".join(shared(question, text)[:2]) or "none"}. '
        line["trace"] = f"{seen}<answer>[[{winner}]]</answer>"
    return line


def main(folder: Path) -> None:
    answers, rng = read_answers(folder), random.Random(1)
    learnt = list(dict.fromkeys(contrast(answers, False, 4, rng)))
    judged: list[tuple] = []
    for pair in contrast(answers, True, 2, rng):
        if [question for _, question, _, _ in judged].count(pair[1]) < 2:  # two a question
            judged.append(pair)
    rows = {
        "traces": [row(f"t-{i:04d}", p, w, True) for i, p in enumerate(learnt[:TRACES]) for w in "AB"],
        "pairs": [row(f"t-{i:04d}{w}", p, w) for i, p in enumerate(learnt[TRACES:]) for w in "AB"],
        "traces_held_out": [row(f"h-{i:04d}", p, "AB"[i % 2], True) for i, p in enumerate(judged[:40])],
        "held_out": [row(f"h-{i:04d}", p, "AB"[i % 2]) for i, p in enumerate(judged)
                     if not UNFIT_HELD_OUT.search(str(p[1:]))],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (OUT / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

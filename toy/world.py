"""The tiny world's pairs, its teacher and the forms of a chain.

Half the pairs ask for a sum of two numbers (Reasoning), half for a sentence that keeps three rules (Chat).
The teacher that writes the SFT traces reasons step by step and lets its verdict follow from its written
checks, but it has two systematic blind spots: it forgets the carry, and it takes everybody for polite.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from cor_prompt import parse_trace
from data import Message, Pair
from runtime.errors import UserError

COLOURS = "red green blue gold black white pink grey".split()
NOUNS = "boat car cat dog tree house bird fish".split()
VERBS = "sleeps runs waits shines".split()
POLITE, CURT = ["please", "thanks"], ["here", "now"]
SYSTEM = "judge"  # the whole system message; --prompt-file of every command that prompts this world


# ---- questions -----------------------------------------------------------------------------------------


def is_held_out(i: int, j: int) -> bool:
    """A question's side of the split: one of five pairs of numbers (or of colour and noun) is held out.

    A hash, not (i + j) % 5: that would keep whole digit sums out of training. `37+46` and `46+37` are
    different questions here; what is tested is composition, not new digit facts.
    """
    return random.Random(i * 1009 + j).random() < 0.2


def make_sum(rng: random.Random, held_out: bool = False, pair_id: str = "sum") -> Pair:
    """A Reasoning pair: `what is 37+46?`, one right number and one wrong one, both of two digits."""
    while True:
        a, b = rng.randint(10, 49), rng.randint(10, 49)
        if is_held_out(a, b) == held_out:
            break
    right = wrong = a + b
    while wrong == right or not 10 <= wrong <= 99:
        kind = rng.random()
        if kind < 0.35:
            wrong = right + rng.choice((-10, 10))
        elif kind < 0.70:
            wrong = right + rng.choice((-2, -1, 1, 2))
        else:
            wrong = rng.randint(20, 98)
    winner: Literal["A", "B"] = rng.choice(("A", "B"))
    first, second = (right, wrong) if winner == "A" else (wrong, right)
    carry = "yes" if a % 10 + b % 10 > 9 else "no"
    return Pair(pair_id, "toy", (user(f"what is {a}+{b}?"),), f"it is {first}.", f"it is {second}.",
                winner, "Reasoning", {"carry": carry})


def make_chat(rng: random.Random, held_out: bool = False, pair_id: str = "chat") -> Pair:
    """A Chat pair: `write: about boat; mention red; polite.`; who keeps more rules is better."""
    while True:
        i, j = rng.randrange(len(COLOURS)), rng.randrange(len(NOUNS))
        if is_held_out(i, j) == held_out:
            break
    rules = [f"mention {COLOURS[i]}", f"about {NOUNS[j]}", "polite"]
    rng.shuffle(rules)
    kept = (0, 0)
    while kept[0] == kept[1]:
        first, second = _sentence(rng, COLOURS[i], NOUNS[j]), _sentence(rng, COLOURS[i], NOUNS[j])
        kept = sum(keeps(r, first)[1] for r in rules), sum(keeps(r, second)[1] for r in rules)
    impolite = "no" if keeps("polite", first)[1] and keeps("polite", second)[1] else "yes"
    return Pair(pair_id, "toy", (user(f"write: {'; '.join(rules)}."),), first, second,
                "A" if kept[0] > kept[1] else "B", "Chat", {"impolite": impolite})


def _sentence(rng: random.Random, colour: str, noun: str) -> str:
    """`the gold boat runs thanks.`: each of the three rules is kept with probability one half."""
    said = colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != colour])
    about = noun if rng.random() < 0.5 else rng.choice([n for n in NOUNS if n != noun])
    closing = rng.choice(POLITE if rng.random() < 0.5 else CURT)
    return f"the {said} {about} {rng.choice(VERBS)} {closing}."


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def make_pairs(count: int, rng: random.Random, held_out: bool, name: str) -> list[Pair]:
    makers = (make_sum, make_chat)
    return [rng.choice(makers)(rng, held_out, f"{name}-{i}") for i in range(count)]


# ---- the teacher ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flaws:
    """The teacher's four error probabilities; the first two are systematic, the others slips."""

    carry: float = 0.6  # writes 0 for the carry, where there is one
    blind: float = 0.6  # ticks "polite" for a response that is not
    units: float = 0.05  # sum of the units off by one
    check: float = 0.05  # a yes/no of the Chat checks flipped


CLEAN = Flaws(0.0, 0.0, 0.0, 0.0)


def choose_flaws(flaw: float, clean: bool) -> Flaws:
    """What --flaw and --clean-teacher ask for."""
    if not 0.0 <= flaw <= 1.0:
        raise UserError(f"--flaw {flaw}: a probability, from 0 to 1")
    return CLEAN if clean else Flaws(carry=flaw, blind=flaw)


def teach(pair: Pair, rng: random.Random, flaws: Flaws) -> str:
    """A chain for `pair`, ending in the verdict that its checks ask for (a coin where they tie).

    Never the gold label: a verdict corrected afterwards would teach to judge past one's own reasoning.
    """
    a, b, plan, checks = (_teach_sum if pair.category == "Reasoning" else _teach_chat)(pair, rng, flaws)
    letter = rng.choice("AB") if a == b else "A" if a > b else "B"
    return f"<type> {pair.category} </type> {plan} <eval> {checks} </eval> <answer>[[{letter}]]</answer>"


def _teach_sum(pair: Pair, rng: random.Random, flaws: Flaws) -> tuple[int, int, str, str]:
    """Solve digit by digit, then compare each response's digits with the solution's: `A 8 8 yes 1 3 no wrong`.

    Returns the two scores, the plan and the checks. (Digits side by side are what makes it learnable:
    "A 81 wrong" in one jump stays a coin at this size.)
    """
    a, b = numbers(pair.context[-1]["content"])
    units = a % 10 + b % 10
    if rng.random() < flaws.units:
        units += rng.choice((-1, 1)) if units else 1
    carry = 0 if rng.random() < flaws.carry else units // 10
    result = 10 * (a // 10 + b // 10 + carry) + units % 10
    checks, scores = [], []
    for letter, response in (("A", pair.response_a), ("B", pair.response_b)):
        digits = list(zip(re.findall(r"\d", response), str(result), strict=True))  # (its digit, mine)
        lines = [f"{its} {mine} {'yes' if its == mine else 'no'}" for its, mine in digits]
        scores.append(int(all(its == mine for its, mine in digits)))
        checks.append(f"{letter} {' '.join(lines)} {'right' if scores[-1] else 'wrong'}")
    solution = write_solution(a, b, units, carry, result // 10, result)
    return scores[0], scores[1], f"<solution> {solution} </solution>", " ; ".join(checks)


def _teach_chat(pair: Pair, rng: random.Random, flaws: Flaws) -> tuple[int, int, str, str]:
    """Copy the rules as the rubric, quote the evidence beside each: `mention red A gold no B red yes`."""
    rules = pair.context[-1]["content"].removeprefix("write: ").rstrip(".").split("; ")
    checks, totals = [], {"A": 0, "B": 0}
    for rule in rules:
        line = rule
        for letter, response in (("A", pair.response_a), ("B", pair.response_b)):
            evidence, kept = keeps(rule, response)
            kept = kept or (rule == "polite" and rng.random() < flaws.blind)
            kept = kept != (rng.random() < flaws.check)
            totals[letter] += kept
            line += f" {letter} {evidence} {'yes' if kept else 'no'}"
        checks.append(line)
    checks.append(f"total A {totals['A']} B {totals['B']}")
    return totals["A"], totals["B"], f"<rubric> {' ; '.join(rules)} </rubric>", " ; ".join(checks)


Form = Literal["cor", "untyped", "rubrics", "plain", "answer", "mixed"]
MIXTURE: tuple[Form, ...] = ("cor", "plain", "answer")


def reshape(pair: Pair, trace: str, form: Form, rng: random.Random) -> str:
    """The teacher's chain in another form, for the rows of recipes/miniature.py: same checks, same verdict.

    untyped leaves out the type (its prompt is the plain style's, which asks for no part); rubrics treats a sum
    like a Chat, with the rubric "right" and no solution; plain leaves out that rubric too; answer is the gold
    letter alone; mixed draws one of MIXTURE.
    """
    form = rng.choice(MIXTURE) if form == "mixed" else form
    if form == "cor":
        return trace
    if form == "answer":
        return f"<answer>[[{pair.winner}]]</answer>"
    if form == "untyped":
        return trace.partition(" </type> ")[2]
    parts = parse_trace(trace)
    rubric, checks = ("right", sum_checks(parts.eval or "")) if parts.solution else (parts.rubric, parts.eval)
    plan = f"<rubric> {rubric} </rubric> " if form == "rubrics" else ""
    return f"{plan}<eval> {checks} </eval> <answer>{parts.answer}</answer>"


def sum_checks(checks: str) -> str:
    """The checks of a sum in the form of a Chat's, the judge's own digits left out.

    >>> sum_checks("A 8 8 yes 1 3 no wrong ; B 8 8 yes 3 3 yes right")
    'right A 8 1 no B 8 3 yes ; total A 0 B 1'
    """
    sides = [side.split() for side in checks.split(" ; ")]  # letter, its digit, mine, yes/no, twice, then right/wrong
    right = [words[-1] == "right" for words in sides]
    lines = [f"{w[0]} {w[1]} {w[4]} {'yes' if ok else 'no'}" for w, ok in zip(sides, right, strict=True)]
    return f"right {' '.join(lines)} ; total A {right[0]:d} B {right[1]:d}"


def write_solution(a: int, b: int, units: int, carry: int, tens: int, result: int) -> str:
    """
    >>> write_solution(37, 46, units=13, carry=1, tens=8, result=83)
    '7 + 6 = 1 3 ; 3 + 4 + 1 = 8 ; 8 3'
    """
    return (f"{a % 10} + {b % 10} = {units // 10} {units % 10} ; "
            f"{a // 10} + {b // 10} + {carry} = {tens} ; {result // 10} {result % 10}")


def keeps(rule: str, sentence: str) -> tuple[str, bool]:
    """(evidence, kept): the word of `the COLOUR NOUN VERB CLOSING.` that the rule is about; does it fit?

    >>> keeps("mention red", "the gold boat runs thanks."), keeps("polite", "the gold boat runs thanks.")
    (('gold', False), ('thanks', True))
    """
    kind, _, wanted = rule.partition(" ")
    evidence = sentence.rstrip(".").split()[{"mention": 1, "about": 2, "polite": 4}[kind]]
    return evidence, evidence in (POLITE if kind == "polite" else [wanted])


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]

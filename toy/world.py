"""The tiny world: pairs, teacher, tokenizer and untrained model, small enough for one CPU.

    python toy.py build runs/toy                                                  # writes a folder, seconds
    python toy.py probe --model runs/grpo --world runs/toy --out runs/probe.json  # does reasoning matter?
    python toy.py serve                                                           # the teacher, for distill.py

Half the pairs ask for a sum of two numbers (Reasoning), half for a sentence that keeps three rules (Chat).
The teacher that writes the SFT traces reasons step by step and lets its verdict follow from its written
checks, but it has two systematic blind spots: it forgets the carry, and it takes everybody for polite.
Imitation copies most of both; reinforcement on verdicts can remove them, because the teacher is right often
enough for samples to differ. The head room is built in: how much is won here says nothing about large models.
Told the right verdict, as in pass 2 of distillation, the teacher either redoes its flawed step or keeps its flawed
reasoning and forces the verdict: what the second does to a judge's honesty is what `probe` measures.

Nothing but toy.py, toy_probe.py and toy_oracle.py knows that the world is a toy: it is read like any model folder
and data file.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cor_prompt import parse_trace, render
from data import Message, Pair, save_pairs
from reward import parse_verdict
from run import UserError, derive_seed, start, write_whole

if TYPE_CHECKING:
    pass

COLOURS = "red green blue gold black white pink grey".split()
NOUNS = "boat car cat dog tree house bird fish".split()
VERBS = "sleeps runs waits shines".split()
POLITE, CURT = ["please", "thanks"], ["here", "now"]
WORDS = """system user assistant judge Reasoning Chat what is it write about mention polite the
           A B yes no right wrong total""".split()
SIGNS = list("0123456789+=?.;:")
TAGS = [f"<{slash}{tag}>" for tag in ("type", "rubric", "solution", "eval", "answer") for slash in ("", "/")]
CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY_SIZE = 96
SYSTEM = "judge"  # the whole system message; --prompt-file of every command that prompts this world
FILES = ("start", "prompt.txt", "sft.jsonl", "sft_held_out.jsonl", "rl.jsonl", "held_out.jsonl", "world.json")


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
                winner, "Reasoning", {"carry": carry})  # fmt: skip


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
                "A" if kept[0] > kept[1] else "B", "Chat", {"impolite": impolite})  # fmt: skip


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


def teach(pair: Pair, rng: random.Random, flaws: Flaws) -> str:
    """A chain for `pair`, ending in the verdict that its checks ask for (a coin where they tie).

    Never the gold label: a verdict corrected afterwards would teach to judge past one's own reasoning.
    """
    a, b, plan, checks = (_teach_sum if pair.category == "Reasoning" else _teach_chat)(pair, rng, flaws)
    letter = rng.choice("AB") if a == b else "A" if a > b else "B"
    return f"<type> {pair.category} </type> {plan} <eval> {checks} </eval> <answer>[[{letter}]]</answer>"


def _teach_sum(pair: Pair, rng: random.Random, flaws: Flaws) -> tuple[int, int, str, str]:
    """Solve digit by digit, then lay each response's digits beside one's own: `A 8 8 yes 1 3 no wrong`.

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
            f"{a // 10} + {b // 10} + {carry} = {tens} ; {result // 10} {result % 10}")  # fmt: skip


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


# ---- tokenizer and model -------------------------------------------------------------------------------


def prompt_markers() -> list[str]:
    """The fixed markers of the prompt, read from a rendered one, such as `[Client Question]`."""
    pair = Pair("", "", (user("?"),), "?", "?", "A")
    return re.findall(r"\[[^\[\]]+\]", render(pair, "instruct", SYSTEM)[-1]["content"])


def whole_words() -> list[str]:
    """Texts with signs in them that are one token each."""
    return [*prompt_markers(), *TAGS, "[[A]]", "[[B]]"]


def pieces() -> str:
    """The regular expression of one token's text."""
    return "|".join(map(re.escape, whole_words())) + r"|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"


def build_tokenizer() -> Any:
    """One word, digit, sign, tag or prompt marker a token: 96 entries, as many as the model has rows.

    Markers and tags are words of the vocabulary, not added tokens, because a judge's prompt is encoded
    without any added token. The three control tokens are added tokens only, so no text can reach them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|unk|>", *whole_words(), *WORDS, *SIGNS, *COLOURS, *NOUNS, *VERBS, *POLITE, *CURT]
    words += [f"<|unused_{i}|>" for i in range(VOCABULARY_SIZE - len(CONTROL) - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces()), "removed", invert=True)
    # a blank before every token but the verdict and its closing tag: <answer>[[B]]</answer> stays literal
    blank = decoders.Replace(Regex(r"^(?!\[\[|</answer>)"), " ")
    core.decoder = decoders.Sequence([blank, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[2], padding_side="left",
        additional_special_tokens=[CONTROL[1]], model_max_length=256,
        clean_up_tokenization_spaces=False)  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return tokenizer


def build_model(tokenizer: Any, seed: int, hidden: int = 64, layers: int = 2) -> Any:
    """An untrained Llama of 129,344 parameters, float32. The wide init (0.1) and the short rope period (100)
    are what lets so small a model learn in a minute; head_dim 32 is the least that serving engines take."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=3 * hidden, tie_word_embeddings=True,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


# ---- build ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """Write the tiny world: an untrained model with its tokenizer, a prompt file, four data files."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Folder to write. It must be missing or empty, or hold the world of the same settings."""
    seed: int = 0
    """Seed of the weights, the pairs and the teacher (an integer)."""
    flaw: float = 0.6
    """Probability (0..1) of each of the teacher's two blind spots. At 0.2 imitation alone loses them."""
    clean_teacher: bool = False
    """A teacher without any error, slips included; --flaw is ignored."""
    sft_pairs: int = 8000
    """Training pairs with the teacher's trace, sft.jsonl (pairs)."""
    rl_pairs: int = 1920
    """Training pairs without a trace, rl.jsonl (pairs). 120 rounds of 16 see each once."""
    held_out_pairs: int = 250
    """Pairs about questions that no training file has, held_out.jsonl (pairs)."""
    sft_held_out_pairs: int = 200
    """The same with traces, for the held-out loss, sft_held_out.jsonl (pairs)."""
    traces: Form = "cor"
    """What the traces hold: cor all parts, untyped no type, rubrics neither type nor solution, plain no rubric
    either, answer the right letter alone (rl.jsonl has it too), mixed one of cor, plain and answer."""
    hidden: int = 64
    """Width of the model (even)."""
    layers: int = 2
    """Layers of the model."""

    @property
    def settings(self) -> dict[str, Any]:
        """What world.json holds; the last three only where they are not the default."""
        usual = {"traces": "cor", "hidden": 64, "layers": 2}
        named = {name: value for name, value in asdict(self).items() if name != "folder"}
        return {name: value for name, value in named.items() if usual.get(name) != value}

    @property
    def flaws(self) -> Flaws:
        return CLEAN if self.clean_teacher else Flaws(carry=self.flaw, blind=self.flaw)


def build(cfg: Build) -> None:
    """The whole folder appears at once, by one rename, or not at all."""
    if not 0.0 <= cfg.flaw <= 1.0:
        raise UserError(f"--flaw {cfg.flaw}: a probability, from 0 to 1")
    for name in ("sft_pairs", "rl_pairs", "held_out_pairs", "sft_held_out_pairs", "hidden", "layers"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")
    folder, settings = Path(cfg.folder), cfg.settings
    if already_built(folder, settings):
        print(f"{folder} already holds this world; nothing to do")
        return
    try:
        parent = folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".toy-", dir=parent) as aside:
            part = Path(aside) / "world"
            part.mkdir()
            write_world(part, cfg)
            write_whole(part / "world.json", json.dumps(settings, indent=2) + "\n")
            os.replace(part, folder)  # an empty folder may be there
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    print(f"wrote {folder}: {', '.join(FILES)}")


def already_built(folder: Path, settings: dict[str, Any]) -> bool:
    """True if `folder` holds the world of these settings; UserError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} holds other things (no {missing[0]} is in it); use another DIR")
    try:
        before = json.loads((folder / "world.json").read_text(encoding="utf-8"))
        changed = [f"{k} was {before.get(k, 'the default')}, is {settings.get(k, 'the default')}"
                   for k in sorted({*settings, *before}) if before.get(k) != settings.get(k)]  # fmt: skip
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'world.json'}: not a JSON object ({error}); use another DIR") from None
    if changed:
        raise UserError(f"{folder} holds a world of other settings ({', '.join(changed)}); use another DIR")
    return True


def write_world(part: Path, cfg: Build) -> None:
    """Every file but world.json, each from a random stream of its own: no size changes another file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    build_model(tokenizer, cfg.seed, cfg.hidden, cfg.layers).save_pretrained(part / "start")
    tokenizer.save_pretrained(part / "start")
    write_whole(part / "prompt.txt", SYSTEM + (" {data}" if cfg.traces in ("untyped", "plain") else "") + "\n")

    def stream(name: str) -> random.Random:
        return random.Random(derive_seed(cfg.seed, name))

    for name, count, held_out, taught in (
        ("sft", cfg.sft_pairs, False, True),
        ("sft_held_out", cfg.sft_held_out_pairs, True, True),
        ("rl", cfg.rl_pairs, False, cfg.traces == "answer"),
        ("held_out", cfg.held_out_pairs, True, False),
    ):
        pairs, teacher = make_pairs(count, stream(name), held_out, name), stream(f"{name} teacher")
        if taught:
            pairs = [replace(pair, trace=teach(pair, teacher, cfg.flaws)) for pair in pairs]
            forms = stream(f"{name} forms")
            pairs = [replace(pair, trace=reshape(pair, pair.trace or "", cfg.traces, forms)) for pair in pairs]
        write_whole(part / f"{name}.jsonl", save_pairs(pairs))
        for kind in ("Reasoning", "Chat") if name == "sft" else ():
            right = [parse_verdict(p.trace or "") == p.winner for p in pairs if p.category == kind]
            print(f"teacher, {kind}: {mean(right)} of its verdicts are right (n {len(right)})")


def mean(values: Sequence[bool]) -> float | None:
    """Share of True, to four places; None of nothing."""
    return round(sum(values) / len(values), 4) if values else None


def main() -> None:
    from toy_oracle import Serve, serve
    from toy_probe import Probe, probe

    configs: dict[str, Callable[..., Any]] = {"build": Build, "probe": Probe, "serve": Serve}
    cfg = tyro.extras.subcommand_cli_from_dict(configs, prog="toy.py", description=__doc__)
    if isinstance(cfg, Build):
        build(cfg)
    elif isinstance(cfg, Probe):
        probe(cfg)
    else:
        serve(cfg)


if __name__ == "__main__":
    start(main)

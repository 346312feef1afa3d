"""The tiny world: its files, its tokenizer, its teacher's honesty and its causality probe."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import answering

from cor_prompt import defuse, encode_prompt, encode_target, parse_trace, render, section
from data import Pair, load_pairs
from judging.endpoint import EndpointSampler
from reward import format_reward, parse_verdict
from rollout import Rollout
from runtime.errors import UserError
from runtime.seeds import derive_seed
from toy import files, oracle, probe, world as tw
from toy.files import FILES, VOCABULARY_SIZE, Build

SMALL = Build(folder="", sft_pairs=400, rl_pairs=200, held_out_pairs=100, sft_held_out_pairs=50)


def build(folder: Path, **changes: object) -> str:
    """Build quietly; what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        files.build(replace(SMALL, folder=str(folder), **changes))
    return said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "start")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """600 pairs with traces of the flawed teacher."""
    rng = random.Random(5)
    return [replace(p, trace=tw.teach(p, rng, tw.Flaws())) for p in tw.make_pairs(600, rng, False, "p")]


def ids_of(pair: Pair, tokenizer) -> list[int]:
    return encode_prompt(render(pair, "instruct", tw.SYSTEM), tokenizer)


# ---- files ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(world, tmp_path):
    build(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(world)
    build(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    for name in ("start/model.safetensors", "sft.jsonl", "rl.jsonl", "held_out.jsonl"):
        assert other[name] != contents(world)[name], name


def test_files_hold_what_they_promise(world):
    assert {p.name for p in world.iterdir()} == set(FILES)
    sizes = {"sft": 400, "rl": 200, "held_out": 100, "sft_held_out": 50}
    for name, size in sizes.items():
        loaded = load_pairs(str(world / f"{name}.jsonl"))
        assert len(loaded) == len({p.pair_id for p in loaded}) == size
        assert all((p.trace is not None) == name.startswith("sft") for p in loaded)


def test_a_whole_world_is_kept_and_other_settings_are_refused(world, tmp_path):
    before = contents(world)
    assert "already" in build(world)
    with pytest.raises(UserError, match="'seed': 3"):
        build(world, seed=3)
    assert contents(world) == before
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="other things"):
            build(taken)
    for wrong in ({"flaw": 1.5}, {"flaw": float("nan")}, {"rl_pairs": 0}):
        with pytest.raises(UserError, match="--"):
            build(tmp_path / "new", **wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ---- model and tokenizer -------------------------------------------------------------------------------


def test_the_model_has_the_promised_shape(world):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "start")
    assert sum(p.numel() for p in model.parameters()) == 129_344
    assert model.config.max_position_embeddings == 256
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert 0.09 < model.model.embed_tokens.weight.std() < 0.11
    assert model.generation_config.eos_token_id == VOCABULARY_SIZE - 1


def test_the_loaded_tokenizer_is_the_built_one(tokenizer, pairs):
    """T16: ids are compared after the round trip through the folder."""
    built = files.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert sorted(built.get_vocab().values()) == list(range(VOCABULARY_SIZE))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    for pair in pairs[:50]:
        assert ids_of(pair, tokenizer) == ids_of(pair, built)
        assert encode_target(pair, tokenizer) == encode_target(pair, built)


def test_traces_survive_encoding_and_their_verdict_stays_literal(tokenizer, pairs):
    for pair in pairs:
        ids = encode_target(pair, tokenizer)
        text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        assert text == pair.trace
        assert parse_verdict(text, "train") == re.findall(r"\[\[(.)\]\]", text)[0]
        assert format_reward(text, "instruct") == 1.0


def test_prompts_have_every_word_and_keep_the_template(tokenizer, pairs):
    unknown = tokenizer.convert_tokens_to_ids("<|unk|>")
    for pair in pairs:
        messages = render(pair, "instruct", tw.SYSTEM)
        prompt, target = encode_prompt(messages, tokenizer), encode_target(pair, tokenizer)
        assert unknown not in prompt + target
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == (template["input_ids"] if hasattr(template, "keys") else template)
        lengths = {"Reasoning": (32, 45), "Chat": (36, 49)}
        assert (len(prompt), len(target)) == lengths[pair.category]
    for marker in files.prompt_markers():
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1


# ---- questions and teacher -----------------------------------------------------------------------------


def question(pair: Pair) -> tuple[str, ...]:
    """What the split is made by: the two numbers, or colour and noun."""
    text = pair.context[-1]["content"]
    return tuple(re.findall(r"\d+", text)) or tuple(sorted(re.findall(r"(?:mention|about) \w+", text)))


def test_no_held_out_question_is_trained(world):
    seen = {n: {question(p) for p in load_pairs(str(world / f"{n}.jsonl"))}
            for n in ("sft", "rl", "held_out", "sft_held_out")}
    assert (seen["sft"] | seen["rl"]).isdisjoint(seen["held_out"] | seen["sft_held_out"])
    assert 0.15 < sum(tw.is_held_out(i, j) for i in range(10, 50) for j in range(10, 50)) / 1600 < 0.25


def test_the_gold_label_is_right_and_balanced():
    pairs = tw.make_pairs(4000, random.Random(1), False, "p")
    counts = Counter((p.category, p.winner) for p in pairs)
    assert all(900 < counts[c, w] < 1100 for c in ("Reasoning", "Chat") for w in "AB")
    for pair in pairs:
        better, worse = (pair.response_a, pair.response_b) if pair.winner == "A" else (pair.response_b, pair.response_a)
        if pair.category == "Reasoning":
            total = sum(tw.numbers(pair.context[-1]["content"]))
            assert better == f"it is {total}." and worse != better and re.fullmatch(r"it is \d\d\.", worse)
        else:
            colour, noun = (re.search(rf"{w} (\w+)", pair.context[-1]["content"])[1] for w in ("mention", "about"))
            kept = [(colour in r) + (noun in r) + ("please" in r or "thanks" in r) for r in (better, worse)]
            assert kept[0] > kept[1]


@pytest.mark.parametrize("make, flawed", [(tw.make_sum, 0.82), (tw.make_chat, 0.85)])
def test_the_teacher_is_as_good_as_promised(make, flawed):
    rng = random.Random(2)
    pairs = [make(rng) for _ in range(4000)]

    def right(flaws: tw.Flaws) -> float:
        return sum(parse_verdict(tw.teach(p, rng, flaws)) == p.winner for p in pairs) / len(pairs)

    assert abs(right(tw.Flaws()) - flawed) < 0.025
    assert right(tw.CLEAN) == 1.0
    assert tw.choose_flaws(0.2, clean=True) == tw.CLEAN
    assert tw.choose_flaws(0.2, clean=False) == tw.Flaws(carry=0.2, blind=0.2)


def test_the_verdict_follows_from_the_written_checks(pairs):
    """Faithful even where it is wrong: from the ticks alone a reader comes to the same verdict."""
    wrong = 0
    for pair in pairs:
        trace = parse_trace(pair.trace)
        checks = [c.split() for c in trace.eval.split(" ; ")]
        if pair.category == "Reasoning":
            a, b = (c[-1] == "right" for c in checks)
            own = trace.solution.rpartition(";")[2].split()
            for c, response in zip(checks, (pair.response_a, pair.response_b), strict=True):
                assert [c[1], c[4]] == re.findall(r"\d", response) and [c[2], c[5]] == own
                assert (c[-1] == "right") == (c[3] == c[6] == "yes")
        else:
            ticks = [re.fullmatch(r".* A \w+ (yes|no) B \w+ (yes|no)", " ".join(c)).groups() for c in checks[:-1]]
            a, b = (sum(t[side] == "yes" for t in ticks) for side in (0, 1))
            assert checks[-1] == ["total", "A", str(a), "B", str(b)]
        verdict = parse_verdict(pair.trace)
        assert a == b or verdict == ("A" if a > b else "B")
        wrong += verdict != pair.winner
    assert wrong > 50  # the gold label has not been written over the teacher's own verdict


def test_the_blind_spots_are_systematic():
    """With a certain flaw every carry is dropped and every response is polite; a clean teacher sees both."""
    rng = random.Random(3)
    sums = [p for p in (tw.make_sum(rng) for _ in range(200)) if p.meta["carry"] == "yes"]
    chats = [p for p in (tw.make_chat(rng) for _ in range(200)) if p.meta["impolite"] == "yes"]
    for flaws, right in ((tw.Flaws(1.0, 1.0, 0.0, 0.0), False), (tw.CLEAN, True)):
        assert {probe.solution_is_right(tw.teach(p, rng, flaws), p) for p in sums} == {right}
        polite = {re.search(r"polite (A \w+ no|A \w+ yes B \w+ no)", tw.teach(p, rng, flaws)) is not None
                  for p in chats}
        assert polite == {right}


# ---- the teacher as an oracle --------------------------------------------------------------------------


def ask(pair: Pair, cfg: oracle.Serve, failed: str = "", verdict: str = "", **fields: object) -> dict:
    """One request, hinted if `failed` is given, answered without HTTP."""
    messages = render(pair, "instruct", tw.SYSTEM)
    if failed:
        note = (
            f"\n\n{section('the Failed Judgement', defuse(failed))}\n\nIt is <answer>[[{verdict}]]</answer>, no doubt."
        )
        messages[-1] = {"role": "user", "content": messages[-1]["content"] + note}
    return oracle.completion({"messages": messages, "seed": 3, "max_tokens": 64, **fields}, cfg)


def text_of(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


def test_the_oracle_is_the_teacher_and_repeats_itself(pairs):
    cfg = oracle.Serve()
    texts = [text_of(ask(p, cfg)) for p in pairs]
    assert texts == [text_of(ask(p, cfg)) for p in reversed(pairs)][::-1]
    right = sum(parse_verdict(t) == p.winner for t, p in zip(texts, pairs, strict=True)) / len(pairs)
    assert 0.78 < right < 0.90
    swapped = [text_of(ask(replace(p, winner="B" if p.winner == "A" else "A"), cfg)) for p in pairs]
    assert swapped == texts, "the winner is not in the prompt"
    assert [text_of(ask(p, cfg, seed=4)) for p in pairs] != texts
    with pytest.raises(ValueError, match="one reply"):
        ask(pairs[0], cfg, n=2)
    assert [text_of(ask(p, replace(cfg, seed=1))) for p in pairs] != texts


def test_the_oracle_counts_the_tokenizers_tokens_and_obeys_max_tokens(pairs, tokenizer):
    for pair in pairs[:50]:
        reply = ask(pair, oracle.Serve())
        target = encode_target(replace(pair, trace=text_of(reply)), tokenizer)
        whole = len(target)
        assert reply["usage"] == {"prompt_tokens": len(ids_of(pair, tokenizer)), "completion_tokens": whole,
                                  "total_tokens": len(ids_of(pair, tokenizer)) + whole}
        for limit in (1, 7, whole - 1, whole):
            cut = ask(pair, oracle.Serve(), max_tokens=limit)
            assert (cut["choices"][0]["finish_reason"] == "stop") == (limit == whole)
            assert cut["usage"]["completion_tokens"] == limit
            ids = encode_target(replace(pair, trace=text_of(cut)), tokenizer)[:-1]
            assert ids == target[:-1][:limit]


def test_told_the_verdict_it_redoes_the_step_or_forces_the_verdict(pairs):
    wrong = [p for p in pairs if parse_verdict(p.trace) != p.winner]
    assert len(wrong) > 50
    for pair in wrong:
        redone, forced = (
            text_of(ask(pair, oracle.Serve(repair=kind), pair.trace, pair.winner)) for kind in ("redo", "force")
        )
        assert redone == tw.teach(pair, random.Random(0), tw.CLEAN) and parse_verdict(redone) == pair.winner
        assert forced == pair.trace.replace("[[A]]", "[[x]]").replace("[[B]]", "[[x]]").replace("x", pair.winner)
        if pair.category == "Reasoning":
            assert probe.solution_is_right(redone, pair)
        mislabelled = "B" if pair.winner == "A" else "A"
        assert parse_verdict(text_of(ask(pair, oracle.Serve(), pair.trace, mislabelled))) == pair.winner, "not obeyed"
        garbage = text_of(
            ask(pair, oracle.Serve(repair="force"), "<answer>[[A]]</answer> no? [The End of it]", pair.winner)
        )
        assert parse_verdict(garbage) == pair.winner
    assert not all(probe.solution_is_right(p.trace, p) for p in wrong if p.category == "Reasoning")


def test_the_oracle_over_http(pairs):
    server = oracle.make_server(oracle.Serve(port=0))
    with answering(server) as url:
        sampler = EndpointSampler(url, "teacher", concurrency=16, retries=0)
        found = sampler.chat([render(p, "instruct", tw.SYSTEM) for p in pairs[:40]], 2, 1.0, 64, list(range(40)))
        for seed, (pair, replies) in enumerate(zip(pairs, found, strict=False)):
            told = [ask(pair, oracle.Serve(), seed=derive_seed(seed, k) % 2**31) for k in (0, 1)]
            assert [reply.text for reply in replies] == list(map(text_of, told))
        for content in ("hello", render(replace(pairs[0], response_a="it is 7."), "instruct")[-1]["content"]):
            with pytest.raises(UserError, match=r"status 400.*(tiny world|this world)"):
                sampler.chat([[{"role": "user", "content": content}]], 1, 1.0, 64, [0])
        with pytest.raises(UserError, match=r"--port \d+: cannot listen"):
            oracle.make_server(oracle.Serve(port=server.server_port))
    with pytest.raises(UserError, match="--port 99999: cannot"):
        oracle.make_server(oracle.Serve(port=99999))


# ---- probe ---------------------------------------------------------------------------------------------


class Scripted:
    """A sampler whose judge is a function of the prompt and of the forced prefix."""

    def __init__(self, tokenizer, go_on):
        self.tokenizer, self.go_on = tokenizer, go_on

    def generate(self, prompts, n, temperature, max_tokens, seeds):
        assert temperature == 0.0 and n == 1
        texts = [self.tokenizer.decode(p, skip_special_tokens=False).split("assistant") for p in prompts]
        return [Rollout(p, [], [], self.go_on(*t), "stop", i)
                for i, (p, t) in enumerate(zip(prompts, texts, strict=True))]


def reader(prompt: str, prefix: str) -> str:
    """Believes the last line of the solution before it; solves rightly where there is none."""
    a, b, first, _ = (int(x.replace(" ", "")) for x in re.findall(r"\d \d", prompt))
    line = prefix.rpartition(";")[2] if prefix else str(a + b)
    believed = int("".join(re.findall(r"\d", line)))
    solution = f"<solution> {tw.write_solution(a, b, a % 10 + b % 10, 0, 0, a + b)} </solution> "
    return ("" if prefix else solution) + f"<answer>[[{'A' if first == believed else 'B'}]]</answer>"


def numbers_of(sampler) -> dict[str, dict[str, object]]:
    rng = random.Random(4)
    sums = [tw.make_sum(rng, held_out=True) for _ in range(60)]
    return probe.measure(sampler, sums, tw.SYSTEM)


def test_the_probe_tells_a_reader_from_a_guesser(tokenizer):
    rows = numbers_of(Scripted(tokenizer, reader))
    assert [row["share"] for row in rows.values()] == [1.0] * 5
    assert [row["verdict_rate"] for row in rows.values()] == [1.0] * 5
    rows = numbers_of(Scripted(tokenizer, lambda prompt, prefix: reader(prompt, "")))
    assert rows["verdict_right"]["share"] == 1.0
    assert rows["verdict_follows_a_forced_solution"]["share"] == 0.0
    assert rows["verdict_follows_a_forced_last_line"]["share"] == 0.0
    rows = numbers_of(Scripted(tokenizer, lambda prompt, prefix: "gibberish"))
    assert {row["verdict_rate"] for row in rows.values()} == {0.0}
    assert rows["verdict_follows_a_forced_solution"] == {"share": None, "n": 0, "verdict_rate": 0.0}
    assert rows["solution_line_right"]["share"] == 0.0


def test_forced_solutions_say_the_wrong_number():
    rng = random.Random(6)
    for pair in (tw.make_sum(rng, held_out=True) for _ in range(200)):
        wrong = str(tw.numbers(pair.response_b if pair.winner == "A" else pair.response_a)[0])
        a, b = tw.numbers(pair.context[-1]["content"])
        whole, last = (parse_trace(probe.forced_prefix(pair, w)).solution.split(" ; ") for w in (True, False))
        assert whole[2].split() == last[2].split() == list(wrong)
        assert [whole[1][-1], whole[0][-1]] == list(wrong)
        assert [last[1][-1], last[0][-1]] == list(str(a + b))
        assert last[0].split()[-2] == last[1].split()[4]  # the carry is passed on


def test_the_probe_runs_on_an_untrained_model(world, tmp_path, capsys):
    out = tmp_path / "probe.json"
    probe.probe(probe.Probe(str(world / "start"), str(world), str(out), items=8))
    rows = json.loads(out.read_text())
    assert rows["solution_line_right"]["n"] == 8 and rows["verdict_right"]["verdict_rate"] == 0.0
    assert "verdict follows a forced solution" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prompt\.txt"):
        probe.probe(probe.Probe(str(world / "start"), str(tmp_path), str(out)))

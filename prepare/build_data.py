"""Raw preference data -> the two training sets, cleaned, balanced and split, with a card of what is in them.

    python -m prepare.build_data --preset paper                          the paper's three sources, from the hub
    python -m prepare.build_data --skywork a.parquet --code b.json --math c.parquet --out runs/data
    python -m prepare.build_data --pairs mine.jsonl --held-out 200 --rm-bench total_dataset.json --out runs/my-data
    python -m prepare.build_data --pairs mine.csv --columns prompt=ask,chosen=best,rejected=worst --out runs/my-data

    1. A row becomes (shared turns, chosen, rejected). A row that cannot is dropped and counted with its reason.
    2. Rows of magpie_ultra are dropped: only their rejected responses hold a turn marker, so a judge would learn to
       look for the marker and not to judge. The card counts markers in every source, also in these rows.
    3. One counter over math, code, Skywork and other pairs puts the chosen response first, second, first ...
    4. 12 % of the rows are for distillation, the rest for reinforcement. Rows of one prompt stay together.
    5. --augment adds pairs in which one response answers another prompt to both (prepare/augment.py).

OUT gets to_distil.jsonl, rl.jsonl, held_out.jsonl, to_distil_held_out.jsonl (those that are not empty) and card.json,
which says what is in them. The same command on the same rows writes the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cor_prompt import Style, encode_prompt, render
from data import Pair, save_pairs, swap
from evaluation.benchmarks import Benchmark, load_benchmark, unique
from loading.tokenizer import load_tokenizer
from prepare.augment import augmented
from prepare.card import Drop, Rows, Signs, make_card, overlap, repeats, same_prompts
from prepare.sources import Kind, fixed, read_source
from runtime import cli, errors
from runtime.disk import write_whole
from runtime.errors import UserError
from runtime.run_folder import RunFolder
from runtime.seeds import derive_seed

COUNTED: tuple[Kind, ...] = ("math", "code", "skywork", "pairs")  # the order of the A/B counter
WRITTEN: tuple[Kind, ...] = ("code", "skywork", "math", "pairs")  # the order of the rows in a file
FILES = ("to_distil.jsonl", "rl.jsonl", "held_out.jsonl", "to_distil_held_out.jsonl")
TRAINED = FILES[:2]


@dataclass(frozen=True)
class Config:
    # named set of defaults: local (nothing but the files you name), paper (its three sources from the hub)
    preset: str = "local"
    # Skywork-Reward-Preference rows: files (.parquet, .json, .jsonl, .csv, .tsv, .gz) or hub ids
    skywork: tuple[str, ...] = ()
    code: tuple[str, ...] = ()  # Code-Preference-Pairs rows (same formats)
    math: tuple[str, ...] = ()  # Math-Step-DPO rows (same formats)
    # rows of any layout in docs/data.md: TRL, HelpSteer, Arena, ..., the authors' published sets, our own
    pairs: tuple[str, ...] = ()
    # what columns are called in these files, such as prompt=ask,chosen=best; name= leaves a column out
    columns: str = ""
    out: str = "runs/data"  # folder to write
    # share of the rows for distillation (0 to 1), of what the held-out splits leave; the rest is for RL
    sft_share: float = 0.12
    held_out: int = 0  # rows kept out of both for grpo.py and eval.py (pairs)
    sft_held_out: int = 0  # rows kept out of both for sft.py, to be distilled like the others (pairs)
    code_rows: int = 8000  # code rows taken after the shuffle (rows); 0: all
    drop_sources: tuple[str, ...] = ("magpie_ultra",)  # values of `source` whose rows are dropped
    # folder, run folder or hub id whose tokenizer measures prompts; empty: characters / 3.5 stand for tokens
    tokenizer: str = ""
    style: Style = "instruct"  # which prompt is measured (cor_prompt.py)
    max_prompt_tokens: int = 4096  # a longer prompt counts as over-long (tokens); training leaves it out
    drop_duplicates: bool = False  # drop a row whose turns and two responses came before; the paper kept them
    drop_overlap: bool = False  # drop a row that shares words with a benchmark prompt; the paper kept them
    rewardbench: str = ""  # RewardBench's own file, folder or hub id to compare prompts with; empty: not compared
    rm_bench: str = ""  # the same for RM-Bench
    rmb: str = ""  # the same for RMB
    ngram: int = 13  # a prompt overlaps a benchmark's if they share this many words in a row (words)
    # pairs added per row of both training sets: its chosen response against one chosen for another prompt (pairs)
    augment: float = 0.0
    # write rows in a seeded random order, so that the first rows are a sample; else by source as the paper
    shuffle: bool = False
    seed: int = 0  # seed of the splits and of --shuffle (an integer)


PRESETS = {
    "local": Config(),
    "paper": Config(preset="paper", skywork=("Skywork/Skywork-Reward-Preference-80K-v0.2",),
                    code=("Vezora/Code-Preference-Pairs",), math=("xinlai/Math-Step-DPO-10K",)),
}


# ---- balance and split ---------------------------------------------------------------------------------


def alternate(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the chosen response as A -> A, B, A, B ... Fixed pairs keep their letter and do not count."""
    count, lettered = 0, []
    for pair in pairs:
        lettered.append(pair if fixed(pair) or count % 2 == 0 else swap(pair))
        count += not fixed(pair)
    return lettered


def place(pair: Pair, purpose: str, seed: int) -> int:
    """A random number that depends on this pair alone, not on the other rows."""
    return derive_seed(seed, purpose, pair.source, pair.pair_id)


def assign(pairs: Sequence[Pair], groups: Sequence[int], sizes: Mapping[str, int], seed: int) -> list[str]:
    """The file of each pair. Whole groups go, in seeded random order, into the first file that has room for them, and
    the rest into rl.jsonl. Where no group is small enough, a file stays a few rows short."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    left, files = dict(sizes), ["rl.jsonl"] * len(pairs)
    for rows in sorted(members.values(), key=lambda rows: place(pairs[rows[0]], "split", seed)):
        for name in left:
            if len(rows) <= left[name]:
                left[name] -= len(rows)
                for i in rows:
                    files[i] = name
                break
    return files


def split_sizes(cfg: Config, total: int) -> dict[str, int]:
    rest = total - cfg.held_out - cfg.sft_held_out
    if rest <= 0:
        raise UserError(f"--held-out {cfg.held_out} and --sft-held-out {cfg.sft_held_out} leave nothing of {total} "
                        "pairs to train on")
    return {"held_out.jsonl": cfg.held_out, "to_distil_held_out.jsonl": cfg.sft_held_out,
            "to_distil.jsonl": round(cfg.sft_share * rest)}


# ---- the whole -----------------------------------------------------------------------------------------


def prompt_lengths(pairs: Sequence[Pair], cfg: Config, tokenizer: Any) -> tuple[list[int], str]:
    """(length of each prompt as the judge sees it, the unit in words)."""
    if tokenizer is None:
        counts = [sum(len(m["content"]) for m in render(p, cfg.style)) * 2 // 7 for p in pairs]
        return counts, "tokens estimated as characters / 3.5 (--tokenizer counts them)"
    counts = [len(encode_prompt(render(pair, cfg.style), tokenizer)) for pair in tqdm(pairs, "measure")]
    return counts, f"tokens of {cfg.tokenizer}"


def measure(cfg: Config, tokenizer: Any) -> tuple[Rows, list[Kind]]:
    """Every usable row with all that is known about it, in the order of the A/B counter, and its kind of source."""
    named: dict[Benchmark, str] = {"rewardbench": cfg.rewardbench, "rm-bench": cfg.rm_bench, "rmb": cfg.rmb}
    benchmarks = {name: load_benchmark(name, source) for name, source in named.items() if source}
    pairs, drops, seen, kinds = list[Pair](), list[Drop](), list[Signs](), list[Kind]()
    columns = read_columns(cfg.columns)
    for kind in COUNTED:
        first = cfg.code_rows if kind == "code" else 0
        usable, dropped, marks = read_source(kind, getattr(cfg, kind), cfg.drop_sources, first, columns)
        pairs, drops, seen, kinds = pairs + usable, drops + dropped, seen + marks, kinds + [kind] * len(usable)
    pairs = unique(pairs)
    lengths, unit = prompt_lengths(pairs, cfg, tokenizer)
    shared = {name: overlap(pairs, others, cfg.ngram) for name, others in benchmarks.items()}
    return Rows(pairs, drops, seen, lengths, unit, repeats(pairs), same_prompts(pairs), shared), kinds


def read_columns(given: str) -> dict[str, str]:
    """
    >>> read_columns("prompt=ask, chosen=best,tools=")
    {'prompt': 'ask', 'chosen': 'best', 'tools': ''}
    """
    parts = [part.strip().partition("=") for part in given.split(",") if part.strip()]
    if not all(name and equals for name, equals, _ in parts):
        raise UserError(f"--columns {given}: expected name=column,name=column, such as prompt=ask,chosen=best")
    return {name: column for name, _, column in parts}


def leave_out(rows: Rows, cfg: Config) -> dict[int, str]:
    """{index of a row that a --drop-... flag takes out: reason}."""
    shared = [i for hits in rows.overlap.values() for i in hits]
    flagged = ((cfg.drop_overlap, shared, "shares words with a benchmark (--drop-overlap)"),
               (cfg.drop_duplicates, rows.repeats, "repeats an earlier row (--drop-duplicates)"))
    return {i: reason for asked, found, reason in flagged if asked for i in found}


def build(cfg: Config) -> dict[str, str]:
    """{file name: text} of everything that is written."""
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    rows, kinds = measure(cfg, tokenizer)  # (1) (2)
    out = leave_out(rows, cfg)
    drops = rows.drops + [Drop(out[i], rows.pairs[i].source, rows.pairs[i].pair_id) for i in sorted(out)]
    kept = [i for i in range(len(rows.pairs)) if i not in out]
    if not kept:
        raise UserError("no row is left; leave out --drop-duplicates or --drop-overlap")
    pairs = alternate([rows.pairs[i] for i in kept])  # (3)
    names = assign(pairs, [rows.groups[i] for i in kept], split_sizes(cfg, len(pairs)), cfg.seed)  # (4)
    order = sorted(range(len(pairs)), key=lambda k: WRITTEN.index(kinds[kept[k]]))
    if cfg.shuffle:
        order = sorted(order, key=lambda k: place(pairs[k], "order", cfg.seed))
    places = {name: [k for k in order if names[k] == name] for name in FILES if name in names}
    splits = {name: [pairs[k] for k in those] for name, those in places.items()}
    added: list[Pair] = []
    for name in [name for name in TRAINED if cfg.augment and name in splits]:  # (5)
        groups = [rows.groups[kept[k]] for k in places[name]]
        added += (more := augmented(splits[name], groups, cfg.augment, cfg.seed))
        splits[name] += more
        if cfg.shuffle:
            splits[name].sort(key=lambda pair: place(pair, "order", cfg.seed))
    if cfg.augment and not added:
        raise UserError("--augment: no two different prompts in one file, rows with traces or ready-made prompts apart")
    lengths = [rows.lengths[kept[k]] for k in order] + (prompt_lengths(added, cfg, tokenizer)[0] if added else [])
    written = [*(pairs[k] for k in order), *added]
    settings = json.loads(json.dumps(asdict(replace(cfg, out=""))))
    card = make_card(settings, replace(rows, drops=drops), written, lengths, splits)
    texts = {name: save_pairs(those) for name, those in splits.items()}
    return texts | {"card.json": json.dumps(card, indent=2, ensure_ascii=False) + "\n"}


def open_folder(cfg: Config) -> Path:
    """The folder --out; UserError where it holds another build, or files that no build wrote, such as a toy world."""
    folder = Path(cfg.out)
    if not (folder / "config.json").exists() and (there := [name for name in FILES if (folder / name).exists()]):
        raise UserError(f"{folder} holds {', '.join(there)} without the config.json of a build; use another --out")
    return RunFolder(cfg.out, cfg).path


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Every file appears whole; the card goes first and comes back last, so that where it stands, everything does."""
    for name in ("card.json", *(name for name in FILES if name not in files)):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def next_commands(out: Path, files: Mapping[str, str]) -> list[str]:
    """What the files are for. `one-gpu` is the preset that most people start with."""
    held_out = f" --held-out {out}/held_out.jsonl" if "held_out.jsonl" in files else ""
    commands = {
        "to_distil.jsonl": [f"python -m prepare.distill --data {out}/to_distil.jsonl --out {out}/traces --model ORACLE "
                            "--base-url URL", f"python sft.py --preset one-gpu --data {out}/traces/traces.jsonl"],
        "rl.jsonl": [f"python grpo.py --preset one-gpu --data {out}/rl.jsonl{held_out}"]}
    return [command for name, those in commands.items() if name in files for command in those]


def main(cfg: Config) -> None:
    cli.check_numbers(cfg, "max_prompt_tokens", "ngram")
    if not 0 <= cfg.sft_share <= 1 or min(cfg.held_out, cfg.sft_held_out, cfg.code_rows) < 0:
        raise UserError("--sft-share must be between 0 and 1, --held-out, --sft-held-out, --code-rows at least 0")
    if not 0 <= cfg.augment < math.inf:
        raise UserError(f"--augment {cfg.augment}: pairs to add per row, 0 or more")
    if not any(getattr(cfg, kind) for kind in COUNTED):
        raise UserError("no rows named: give --skywork, --code, --math or --pairs, or --preset paper")
    files = build(cfg)
    write(open_folder(cfg), files)
    card = json.loads(files["card.json"])
    print(f"{card['rows']['read']:,} rows read, {card['rows']['kept']:,} kept; " + ", ".join(
        f"{name} {part['pairs']:,}" for name, part in card["splits"].items()))
    for reason, drop in card["dropped"].items():
        print(f"dropped {drop['rows']:,}: {errors.printable(reason)}")
    for title, lines in (("look at this first", card["warnings"]), ("next", next_commands(Path(cfg.out), files))):
        print("\n".join([f"{title}:", *(f"  {errors.printable(line)}" for line in lines)]))


if __name__ == "__main__":
    cli.start(lambda: main(cli.parse(Config, PRESETS)))

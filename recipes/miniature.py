"""The paper's experiments in the tiny world: every row of its tables as shell commands, three seeds each.

    python -m recipes.miniature run tables                 # the paper's rows: `make tables`
    python -m recipes.miniature run variants               # its neighbours, from their checkpoints: `make variants`
    python -m recipes.miniature run rm-r1 --seeds 0        # one row and the rows it starts from
    python -m recipes.miniature run rm-r1 --print-only     # the commands themselves, to be pasted into a shell
    python -m recipes.miniature table                      # results.json -> results.md and a plot

Rows share checkpoints: a row names another one in braces and so waits for it. A row is done once; it is run again
only if its commands, the rows it starts from, or the code have changed. The code is every Python file outside tests/,
course/, bench/, report/ and recipes/: any change to one of them, of a comment too, makes all rows run again. An
interrupted row starts its commands again, and training goes on where it stopped. Each row leaves a log and a folder
under runs/tables/seed-N; what the tables need goes to recipes/miniature/results.json. Rows run one after the other
with one thread; `--seeds 0` and `--seeds 1 2` in two terminals run side by side.

Shortened against the README's demo: 50 rounds of reinforcement, not 120. Against the full row: rows on answers
alone, on little data and on the mixture take 1,200 distillation steps (600 after a distillation), the weak starts
300; the inference budgets 40 rounds. 1,100 steps of distillation cost what 50 rounds do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import tyro

from recipes import miniature_results
from runtime.cli import start
from runtime.disk import write_whole
from runtime.errors import UserError
from runtime.ranks import program
from runtime.seeds import digest

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "recipes" / "miniature"
ABOVE = ("tests", "course", "bench", "report", "recipes")  # no row runs code of these
ROUNDS, FEW_ROUNDS = 50, 40
WEAK = "--steps 300"
WIDTHS = (16, 32)  # beside the usual 64


# ---- the rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Shell commands, one after the other. {here} is the row's folder, {seed} its seed, {port} a free port of
    its own, {NAME} the folder of another row, which is run first. `patch` is a change to the code under which they
    run (course/patched.py)."""

    name: str
    commands: tuple[str, ...]
    patch: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        found = {name for command in self.commands for _, name, _, _ in Formatter().parse(command) if name}
        return tuple(sorted(found - {"here", "seed", "port"}))


def build(options: str = "") -> str:
    return f"python -m toy build {{here}} --seed {{seed}} {options}".rstrip()


def sft(model: str, data: str, options: str = "", world: str = "{world}") -> str:
    return (f"python sft.py --preset tiny --seed {{seed}} --model {model} --data {data} "
            f"--held-out {world}/sft_held_out.jsonl --prompt-file {world}/prompt.txt --out {{here}} "
            f"{options}").rstrip()


def rl(model: str, options: str = "", world: str = "{world}", script: str = "grpo.py", rounds: int = ROUNDS,
       data: str = "", every: int = ROUNDS) -> str:
    """Its own evaluations, before the first round and after the last, are the table's numbers."""
    return (f"python {script} --preset tiny --seed {{seed}} --model {model} --data {data or world + '/rl.jsonl'} "
            f"--held-out {world}/held_out.jsonl --prompt-file {world}/prompt.txt --out {{here}} --steps {rounds} "
            f"--eval-every {every} {options}").rstrip()


def cold(model: str, style: str, world: str, rounds: int = ROUNDS) -> str:
    return rl(model, f"--style {style}", world, "-m variants.cold_start", rounds, every=25)


JUDGE = ("python eval.py run --model {here} --data {world}/held_out.jsonl --prompt-file {world}/prompt.txt "
         "--both-orders --rule train --max-tokens 60 --out {here}/eval")
PROBE = "python -m toy probe --model {here} --world {world} --out {here}/probe.json"


def repair(how: str) -> str:
    """prepare/distill.py's two passes against the toy's own oracle; it leaves {here}/traces.jsonl."""
    return (f"python -m toy serve --seed {{seed}} --port {{port}} --repair {how} & trap 'kill $!' EXIT; "
            "python -m prepare.distill --preset tiny --seed {seed} --data {world}/sft.jsonl "
            "--prompt-file {world}/prompt.txt --base-url http://127.0.0.1:{port}/v1 --out {here}")


WORLDS = (
    Row("world", (build(),)),
    *(Row(f"world-{form}", (build(f"--traces {form}"),)) for form in "answer plain rubrics untyped mixed".split()),
    Row("world-clean", (build("--clean-teacher"),)),
    *(Row(f"start-{hidden}", (build(f"--hidden {hidden} --sft-pairs 1"),)) for hidden in WIDTHS),
    Row("answers", ("mkdir -p {here}",
                    "cat {world-answer}/sft.jsonl {world-answer}/rl.jsonl > {here}/sft.jsonl")),
    Row("small", ("mkdir -p {here}", "head -n 1000 {world}/sft.jsonl > {here}/sft.jsonl",
                  "head -n 1000 {world-answer}/sft.jsonl > {here}/answers.jsonl")),
)


def weak_and_cold(form: str, style: str) -> tuple[Row, Row]:
    """A start that has seen 4,800 chains in this form, and the cold start's reinforcement from there."""
    world = f"{{world-{form}}}"
    weak = sft(f"{world}/start", f"{world}/sft.jsonl", f"{WEAK} --style {style}", world)
    return Row(f"weak-{form}", (weak,)), Row(f"cold-{form}", (cold(f"{{weak-{form}}}", style, world),))


ABLATION = (  # Table 2, and what every other table shares
    Row("distilled", (sft("{world}/start", "{world}/sft.jsonl"), PROBE)),
    Row("rm-r1", (rl("{distilled}", every=25), PROBE)),
    Row("weak-cor", (sft("{world}/start", "{world}/sft.jsonl", WEAK),)),
    Row("cold-cor", (cold("{weak-cor}", "instruct", "{world}"),)),
    *weak_and_cold("plain", "plain"),
    *weak_and_cold("rubrics", "rubrics"),
    *weak_and_cold("untyped", "plain"),
    Row("cold-nothing", (cold("{world}/start", "instruct", "{world}", rounds=20),)),
    Row("longer-sft", (sft("{distilled}", "{world}/sft.jsonl", "--steps 1100"), JUDGE)),
    Row("clean-teacher", (sft("{world-clean}/start", "{world-clean}/sft.jsonl", world="{world-clean}"), JUDGE)),
)

SFT_OR_REASONING = (  # Table 3
    Row("answer-sft", (sft("{world}/start", "{answers}/sft.jsonl", "--steps 1200", "{world-answer}"), JUDGE)),
    Row("distilled-answer-sft",
        (sft("{distilled}", "{world-answer}/rl.jsonl", "--steps 600", "{world-answer}"), JUDGE)),
    Row("small-answer-sft", (sft("{world}/start", "{small}/answers.jsonl", "--steps 1200", "{world-answer}"), JUDGE)),
    Row("small-distilled", (sft("{world}/start", "{small}/sft.jsonl", "--steps 1200"),)),
    Row("small-rm-r1", (rl("{small-distilled}", data="{small}/sft.jsonl"),)),
)

SIZES = tuple(
    row
    for hidden in WIDTHS
    for row in (
        Row(f"distilled-{hidden}", (sft(f"{{start-{hidden}}}/start", "{world}/sft.jsonl"),)),
        Row(f"rm-r1-{hidden}", (rl(f"{{distilled-{hidden}}}"),)),
    )
)

BUDGETS = (  # mean per token, as the authors' code has it: Eq. 9's mean per response pays short chains more
    Row("mixed", (sft("{world-mixed}/start", "{world-mixed}/sft.jsonl", "--steps 1200", "{world-mixed}"),)),
    *(
        Row(f"cap-{cap}", (rl("{mixed}", f"--agg token --max-response-tokens {cap}", rounds=FEW_ROUNDS),))
        for cap in miniature_results.CAPS
    ),
    Row("cap-40-seq", (rl("{mixed}", "--max-response-tokens 40", rounds=FEW_ROUNDS),)),
)

FAITHFULNESS = (
    *(
        row
        for how in ("redo", "force")
        for row in (
            Row(f"traces-{how}", (repair(how),)),
            Row(f"distilled-{how}", (sft("{world}/start", f"{{traces-{how}}}/traces.jsonl"), JUDGE, PROBE)),
        )
    ),
    Row("distilled-kept",  # what filtering does without any repair
        ("mkdir -p {here}", """grep '"pass": "1"' {traces-redo}/traces.jsonl > {here}/kept.jsonl""",
         sft("{world}/start", "{here}/kept.jsonl"), JUDGE, PROBE)),
)


def variant(name: str, options: str = "", model: str = "{distilled}", world: str = "{world}") -> tuple[str]:
    return (rl(model, options, world, f"-m variants.{name}"),)


def own_traces(options: str = "") -> tuple[str]:
    """prepare/distill.py's first pass by a weak judge itself, four chains a pair."""
    line = ("python -m prepare.distill --preset tiny --seed {seed} --data {world}/rl.jsonl "
            "--prompt-file {world}/prompt.txt --base-url '' --model {cold-cor} --sampler torch "
            "--samples 4 --no-second-pass --out {here}")
    return (f"{line} {options}".rstrip(),)


VARIANTS = (  # `rm-r1` is GRPO from the same checkpoint
    Row("rlpr", variant("rlpr")),
    Row("rlpr-unfiltered", variant("rlpr", "--std-beta 0")),
    Row("dapo", variant("dapo")),
    Row("dapo-unsampled", (rl("{distilled}", "--clip-high 0.28 --agg token --kl-coef 0"),)),
    Row("dr-grpo", variant("dr_grpo")),
    Row("stable-reinforce", variant("stable_reinforce")),
    *(Row(f"world-{form}", (f"python -m variants.toy_forms {{world}} {{here}} --form {form}",))
      for form in ("scores", "boxed")),
    Row("distilled-scores", (sft("{world-scores}/start", "{world-scores}/sft.jsonl", world="{world-scores}"),)),
    Row("grm", variant("grm", model="{distilled-scores}", world="{world-scores}")),
    Row("weak-boxed", (sft("{world-boxed}/start", "{world-boxed}/sft.jsonl", WEAK, "{world-boxed}"),)),
    Row("rrm", variant("rrm", model="{weak-boxed}", world="{world-boxed}")),
    Row("traces-first", own_traces()),
    Row("traces-rstar", own_traces("--rstar {cold-cor}")),
    *(Row(f"distilled-{which}",
          (sft("{world}/start", f"{{traces-{which}}}/traces.jsonl", "--steps 1200"), JUDGE, PROBE))
      for which in ("first", "rstar")),
    Row("pairs-augmented", ("python -m prepare.build_data --pairs {world}/rl.jsonl --sft-share 0 --augment 0.5 "
                            "--shuffle --seed {seed} --out {here}",)),
    Row("augmented", (rl("{distilled}", data="{pairs-augmented}/rl.jsonl"),)),
    Row("scalar",
        ("python -m variants.scalar_rm --preset tiny --seed {seed} --model {world}/start --data {answers}/sft.jsonl "
         "--held-out {world}/sft_held_out.jsonl --out {here} --steps 1200 --lr 1e-3",  # the best of five rates
         "python eval.py run --scalar --model {here} --data {world}/held_out.jsonl --both-orders --out {here}/eval")),
)


def look(name: str) -> Row:
    prompt = "--scalar" if name == "scalar" else "--prompt-file {world}/prompt.txt --rule train --max-tokens 60"
    return Row(f"probes-{name}", (
        "python -m evaluation.probes pairs --data {world}/held_out.jsonl --out {here}/pairs.jsonl",
        f"python eval.py run --model {{{name}}} {prompt} --both-orders --data {{here}}/pairs.jsonl "
        "--out {here}/verdicts",
        "python -m evaluation.probes table --log {here}/verdicts --out {here}/probes.json"))


GROUPS = {
    "tables": (*WORLDS, *ABLATION, *SIZES, *FAITHFULNESS, *SFT_OR_REASONING, *BUDGETS),  # the paper's own
    "variants": (*VARIANTS, *map(look, miniature_results.PROBED)),  # what it is discussed with
}
ROWS = tuple(row for group in GROUPS.values() for row in group)


# ---- what has to be run --------------------------------------------------------------------------------


@dataclass
class Task:
    """A row with a seed: its commands as they are typed, and what its folder depends on."""

    row: str
    seed: int
    folder: Path
    commands: tuple[str, ...]
    needs: tuple[str, ...]
    key: str
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> Path:
        return self.folder.parent

    @property
    def log(self) -> Path:
        return self.side / "logs" / f"{self.row}.log"

    def load(self) -> bool:
        """Read the record of an earlier run of this key; True if it finished."""
        path = self.side / "records" / f"{self.row}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.record = found if found.get("key") == self.key else {}
        return bool(self.record.get("finished"))

    def save(self) -> None:
        write_whole(self.side / "records" / f"{self.row}.json", json.dumps(self.record, indent=1) + "\n")


def plan(rows: Sequence[Row], wanted: Iterable[str], seed: int, root: str, steps: int = 0) -> list[Task]:
    """The tasks of one seed, each after those it needs. `steps` cuts every training run to so many steps."""
    table = {row.name: row for row in rows}
    order: dict[str, Task] = {}
    code = code_digest()

    def visit(name: str) -> None:
        if name in order:
            return
        if name not in table:
            raise UserError(f"no row is called {name}; there are {', '.join(table)}")
        for need in table[name].needs:
            visit(need)
        places = {need: f"{root}/seed-{seed}/{need}" for need in (*table[name].needs, name)}
        fill = places | {"here": places[name], "seed": seed, "port": 8400 + 100 * seed + list(table).index(name)}
        commands = tuple(shorten(command.format_map(fill), steps) for command in table[name].commands)
        key = digest([commands, code, table[name].patch, [order[need].key for need in table[name].needs]])
        order[name] = Task(name, seed, Path(places[name]), commands, table[name].needs, key)

    for name in wanted:
        visit(name)
    return list(order.values())


def shorten(command: str, steps: int) -> str:
    return f"{command} --steps {steps}" if steps and re.search(r"sft\.py|grpo\.py|variants\.", command) else command


def code_digest() -> str:
    """Of all files that training and judging stand on: those at the root and in the rooms below."""
    rooms = {file.parent for file in PROJECT.glob("*/__init__.py")} - {PROJECT / room for room in ABOVE}
    files = sorted(file for folder in (PROJECT, *rooms) for file in folder.glob("*.py"))
    return digest([[str(file.relative_to(PROJECT)), file.read_text(encoding="utf-8")] for file in files])


def finished(rows: Sequence[Row], root: str, steps: int = 0) -> list[Task]:
    """What is done of all seeds under `root`, not only of those just run."""
    seeds = sorted(int(side.name.removeprefix("seed-")) for side in Path(root).glob("seed-*"))
    return [task for seed in seeds for task in plan(rows, [row.name for row in rows], seed, root, steps) if task.load()]


# ---- running -------------------------------------------------------------------------------------------


def run(task: Task) -> None:
    """Run a task's commands and record what they took; Ctrl-C waits until they have saved and ended."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    if not task.record:  # new, or what it depends on has changed
        shutil.rmtree(task.folder, ignore_errors=True)
        task.log.unlink(missing_ok=True)
        task.record = {"key": task.key, "commands": task.commands, "cpu_seconds": 0.0, "wall_seconds": 0.0,
                       "finished": False}
    task.save()
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is the one that runs this
    quiet = {"PATH": here, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # asked to end, bash waits until the command that runs has saved and ended
    commands = "\n".join(("trap 'exit 143' TERM", *task.commands))
    cpu, began = sum(os.times()[2:4]), time.monotonic()  # of all commands that have ended
    with open(task.log, "a", encoding="utf-8") as log:
        process = subprocess.Popen(["bash", "-exc", commands], cwd=PROJECT, env=os.environ | quiet,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        process.wait()
    finally:
        if process.poll() is None:  # a session of its own does not hear Ctrl-C
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        task.record["cpu_seconds"] = round(task.record["cpu_seconds"] + sum(os.times()[2:4]) - cpu, 1)
        task.record["wall_seconds"] = round(task.record["wall_seconds"] + time.monotonic() - began, 1)
        task.record["finished"] = process.returncode == 0
        task.save()


def execute(tasks: Sequence[Task]) -> None:
    """Run what is not done yet, one after the other. What does not depend on a failed task still runs."""
    if not tasks:
        raise UserError("--seeds needs one seed or more")
    waiting = [task for task in tasks if not task.load()]
    failed: list[Task] = []
    missing: set[tuple[int, str]] = set()  # rows that failed, and those that start from them
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number, task in enumerate(waiting, 1):
        if any((task.seed, need) in missing for need in task.needs):
            missing.add((task.seed, task.row))
            continue
        run(task)
        if task.record["finished"]:
            print(f"[{number}/{len(waiting)}] seed {task.seed} {task.row}: {task.record['wall_seconds']:.0f} s "
                  f"({task.record['cpu_seconds']:.0f} CPU)", flush=True)
        else:
            failed.append(task)
            missing.add((task.seed, task.row))
            print(f"seed {task.seed} {task.row}: FAILED, see {task.log}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} rows failed ({', '.join(f'seed {t.seed} {t.row}' for t in failed)}); "
                        f"the last lines of {failed[0].log} say why")


# ---- command line --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Run rows that are not done yet, then collect what is there."""

    rows: tyro.conf.Positional[tuple[str, ...]] = ("tables",)  # Names of rows, or of groups of them: tables, variants.
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds of world, weights, data order and sampling (integers).
    root: str = "runs/tables"  # Folder of the runs.
    # Cut every training run to so many steps, to see whether all commands run (steps; results.json then goes to
    # --root); 0: as the rows say.
    steps: int = 0
    print_only: bool = False  # Print the commands, run nothing.


@dataclass(frozen=True)
class Table:
    """results.json -> results.md and a plot."""


def run_rows(cfg: Run) -> None:
    wanted = [row.name for name in cfg.rows for row in GROUPS.get(name, ())]
    wanted += [name for name in cfg.rows if name not in GROUPS]
    tasks = [task for seed in cfg.seeds for task in plan(ROWS, wanted, seed, cfg.root, cfg.steps)]
    if cfg.print_only:
        print("\n".join(command for task in tasks for command in (f"# {task.row}", *task.commands)))
        return
    execute(tasks)
    done = sorted(finished(ROWS, cfg.root, cfg.steps), key=lambda task: task.row)
    begun = {(path.parts[-3].removeprefix("seed-"), path.stem) for path in Path(cfg.root).glob("seed-*/records/*.json")}
    miniature_results.collect([(str(task.seed), task.folder, task.record) for task in done],
                              Path(cfg.root) if cfg.steps else RESULTS,
                              begun - {(str(task.seed), task.row) for task in done})


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, prog=program(), description=__doc__)
    if isinstance(cfg, Run):
        run_rows(cfg)
    else:
        miniature_results.write_tables(RESULTS)


if __name__ == "__main__":
    start(main)

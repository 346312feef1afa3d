"""Pages of prose: links lead somewhere, and commands ask for flags that exist."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for folder in (".", "docs", "course", "course/assignments", "recipes/miniature", "recipes/real")
         for page in sorted((ROOT / folder).glob("*.md"))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@named
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, heading = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page}: {target}"
        assert not heading or heading in anchors(found), f"{page}: no heading {target}"


def commands(page: Path) -> list[tuple[Path, list[str]]]:
    """(script, its words) of every `python x.py`, `python -m a.b` and `torchrun ... x.py` in code, fenced or not."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in lines:
        if not re.match(r"\$?\s*(python|torchrun) ", line):
            continue
        words = shlex.split(line.lstrip("$ "), comments=True)
        for k, word in enumerate(words):
            script = ROOT / (word.replace(".", "/") + ".py" if words[k - 1] == "-m" else word)
            if words[k - 1] == "-m" and (ROOT / word / "__main__.py").is_file():
                script = ROOT / word / "__main__.py"
            if k and word != words[0] and script.suffix == ".py" and (words[k - 1] == "-m" or word.endswith(".py")):
                found.append((script, words[k + 1 :]))
                break
    return found


@named
def test_commands_name_scripts_and_flags_that_exist(page):
    for script, words in commands(page):
        assert script.is_file(), f"{page}: {script}"
        sources = script.read_text(encoding="utf-8")
        for module in re.findall(r"^\s*from ([\w.]+) import .*", sources, re.MULTILINE):  # a variant's flags are grpo's
            other = ROOT / (module.replace(".", "/") + ".py")
            sources += other.read_text(encoding="utf-8") if other.is_file() else ""
        if re.search(r"^import (grpo|sft)$", sources, re.MULTILINE):
            sources += "".join(
                (ROOT / name).read_text(encoding="utf-8") for name in ("grpo.py", "sft.py", "settings.py")
            )
        for word in words:
            if word.startswith("--") and word != "--help":
                flag = word.lstrip("-").partition("=")[0]
                field = re.search(rf"^    {flag.replace('-', '_')}: |\"--{flag}\"", sources, re.MULTILINE)
                assert field, f"{page}: {script.name} has no {word}"


def test_a_wrong_flag_or_script_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\n$ python sft.py --presett tiny\npython -m variants.nothing --seed 1\n```\n"
                    "and `torchrun -x 2 grpo.py --lr 1`")
    scripts = [(script.name, words) for script, words in commands(page)]
    assert scripts == [("sft.py", ["--presett", "tiny"]), ("nothing.py", ["--seed", "1"]), ("grpo.py", ["--lr", "1"])]
    with pytest.raises(AssertionError, match="presett"):
        test_commands_name_scripts_and_flags_that_exist(page)


def imported(file: Path) -> set[str]:
    """The project's own modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.replace(".", "/") for name in names}
    return {name for name in found if (ROOT / f"{name}.py").is_file()}


def test_the_mutation_run_copies_what_its_files_and_tests_import():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    copied = {*settings["source_paths"], *settings["also_copy"]}
    todo = [*settings["source_paths"], *settings["pytest_add_cli_args_test_selection"]]
    needed: set[str] = set()
    while todo:
        more = {f"{name}.py" for name in imported(ROOT / todo.pop())} - needed
        needed |= more
        todo += more
    missing = {name for name in needed if not copied & {name, name.partition("/")[0]}}
    assert len(needed) > 15 and not missing, sorted(missing)

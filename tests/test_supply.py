"""What comes from outside: nothing without being asked for, no code from a model folder, exact versions.

That a folder of pickled weights is refused is in test_model.py; hostile texts are in the tests of what reads them.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_models import make_folder, make_lm

import model
from loading.folder import model_folder
from loading.tokenizer import load_tokenizer
from runtime import sizes
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
ROOMS = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name != "course"]
MODULES = sorted(
    file.relative_to(ROOT) for top in (ROOT, *ROOMS) for file in top.glob("*.py") if file.stem != "__main__"
)

WATCHED = """
import sys
def no_network(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"network: {event} {args[1:]}")
sys.addaudithook(no_network)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    paths = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", WATCHED + code], cwd=ROOT, capture_output=True, text=True,
                          env=clean | paths | environment)


# ---- the network ---------------------------------------------------------------------------------------


def test_importing_every_module_asks_nothing_of_the_network():
    names = [".".join(file.with_suffix("").parts) for file in MODULES]
    code = f"""
import importlib, os
for name in {names}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "trl", (name, error)  # of the comparison with it, in an environment of its own
assert "HF_HUB_OFFLINE" not in os.environ
print("all")
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr
    assert len(names) > 40


def test_the_watch_sees_a_connection():
    done = python("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')")
    assert done.returncode == 1 and "network: socket." in done.stderr


def test_offline_a_hub_id_is_one_line_and_no_attempt():
    code = """
import data
import model
from runtime import cli
for ask in (lambda: model.load_policy("owner/name"), lambda: data.load_pairs("owner/name")):
    try:
        cli.start(ask)
    except SystemExit as ended:
        print(ended.code)
"""
    done = python(code, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout == "2\n2\n", done
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: owner/name: neither a ") for line in errors), errors


def test_of_a_hub_model_only_tensors_and_texts_are_fetched(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda path, **more: asked.append(more) or 1 / 0)
    with pytest.raises(UserError, match="neither a folder nor a hub model"):
        model_folder("owner/name")
    wanted = asked[0]["allow_patterns"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
    for name in ("pytorch_model.bin", "modeling_x.py", "model.pt", "weights.pkl", "model.ckpt", "x.so"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in wanted)


# ---- code ----------------------------------------------------------------------------------------------


def hostile(folder: Path, **config: object) -> Path:
    """A model folder whose own code, named wherever transformers looks for some, would leave a file behind."""
    ran = folder / "ran"
    make_folder(folder, make_lm("llama"), tokenizer=True)
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"open({str(ran)!r}, 'w')\nclass Evil:\n    pass\ndef generate(*a, **k):\n    pass\n"
        )
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    changes = {
        "config.json": {
            "auto_map": dict.fromkeys(classes, "evil.Evil"),
            "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        }
        | config,
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
        "generation_config.json": {"auto_map": {"GenerationConfig": "evil.Evil"}, "custom_generate": "evil.Evil"},
    }
    for name, change in changes.items():
        file = folder / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | change))
    return ran


def test_code_in_a_model_folder_is_never_run(tmp_path, monkeypatch):
    """Of a known architecture transformers' own code is used; a type that it does not have is refused in one line."""
    monkeypatch.chdir(tmp_path)  # where an import would find it, too
    ran = hostile(tmp_path / "known")
    plain = make_lm("llama").state_dict()
    policy = model.load_policy(str(tmp_path / "known"))
    assert type(policy.lm).__module__.startswith("transformers.models.llama")
    assert policy.lm.lm_head.weight.equal(plain["lm_head.weight"])
    assert load_tokenizer(str(tmp_path / "known")).encode("w1 w2")
    assert sizes.read_shape(str(tmp_path / "known")).hidden == plain["lm_head.weight"].shape[1]
    from judging.scalar import load_scalar

    with pytest.raises(UserError, match="never run"):
        load_scalar(str(tmp_path / "known"))
    own = hostile(tmp_path / "own", model_type="evil")
    for load in (model.load_policy, load_scalar, sizes.read_shape):
        with pytest.raises(UserError) as caught:
            load(str(tmp_path / "own"))
        assert "\n" not in str(caught.value)
    assert not ran.exists() and not own.exists() and "evil" not in sys.modules


def test_a_chat_template_cannot_reach_python(tmp_path):
    make_folder(tmp_path, make_lm("llama"), tokenizer=True)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(escape)
    tokenizer = load_tokenizer(str(tmp_path))
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)


DANGEROUS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec", "yaml.load", "os.system"}
ALLOWED: set[tuple[str, str]] = set()  # (file, what)
BETWEEN_RANKS = {("runtime/ranks.py", "all_gather_object")}  # of one's own processes, over torch.distributed


def found_in(file: Path) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.add((str(file), ast.unparse(node.func)))
        elif isinstance(node, ast.Attribute) and node.attr.endswith(("gather_object", "scatter_object_list")):
            found.add((str(file), node.attr))
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            found |= {(str(file), node.arg)} if getattr(node.value, "value", True) is not False else set()
        found |= {(str(file), name) for name in names if name in DANGEROUS}
    return found


def test_nothing_unpickles_nor_runs_text():
    """The allow-list is exact: an entry that is no longer needed fails too."""
    assert set().union(*map(found_in, MODULES)) == ALLOWED | BETWEEN_RANKS


# ---- versions and licences -----------------------------------------------------------------------------

def pinned(path: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """{name: version} of every line; ValueError for one that is not exact."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {name.strip(): version.strip() for name, version in (line.split("==") for line in lines if line)}



def test_every_package_is_pinned_with_what_it_needs():
    """requirements.txt is the whole set: exact versions, and closed under what the packages ask for here."""
    pins = {canonicalize_name(name): version for name, version in pinned().items()}
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(pins) and all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    for name, version in pins.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # another environment
        assert package.version.split("+")[0] == version, name
        for text in package.requires or []:
            need = Requirement(text)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            if canonicalize_name(need.name).startswith(("nvidia-", "cuda-")) or need.name == "triton":
                continue  # of torch's CUDA build, which pins them itself
            assert canonicalize_name(need.name) in pins, f"{name} needs {need}"
            assert need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True), f"{name}: {need}"


def test_the_ranges_of_pyproject_hold_the_pins():
    import tomllib

    pins = {canonicalize_name(name): version for name, version in pinned().items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        need = Requirement(text)
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), text


def test_the_table_of_licences_lists_every_pinned_package():
    rows = [line.split(" | ") for line in (ROOT / "docs" / "licences.md").read_text().splitlines()[6:]]
    assert {row[0].strip("| "): row[1] for row in rows} == pinned()
    assert all(row[2].strip(" |") not in ("", "not stated") for row in rows)
    shared = [row for row in rows if re.search(r"\bA?GPL|General Public|proprietary", row[2], re.IGNORECASE)]
    assert not shared, "licences that reach further than their package"

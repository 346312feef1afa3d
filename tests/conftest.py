"""What all tests share: no network, repeatable hypothesis runs, three small tokenizers, a small toy world."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub client is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests hold the CPU's way; a card is for bench.gpu
os.environ["NO_PROXY"] = "127.0.0.1"  # a test's own servers are asked directly
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "repeatable", max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("repeatable"), max_examples=3000, derandomize=False)
settings.register_profile(  # make mutants: that a test fails is enough, no smaller example is looked for
    "mutants", settings.get_profile("repeatable"), max_examples=40,
    phases=[Phase.explicit, Phase.generate])
settings.load_profile("repeatable")  # pytest --hypothesis-profile thorough: new cases every time, and many more


@pytest.fixture(scope="session")
def tiny_tokenizers():
    """{name: tokenizer}: chatml (Qwen2.5-like), r1 (DeepSeek-R1-like), trimming (Llama-3-like)."""
    import tiny_tokenizers

    return {name: build() for name, build in tiny_tokenizers.BUILDERS.items()}


@pytest.fixture(scope="session", params=["chatml", "r1", "trimming"])
def any_tokenizer(request, tiny_tokenizers):
    """Each of the three in turn."""
    return tiny_tokenizers[request.param]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small toy world. Nobody writes into it."""
    from toy import files

    folder = tmp_path_factory.mktemp("toy") / "world"
    files.build(files.Build(str(folder), sft_pairs=24, rl_pairs=24, held_out_pairs=6, sft_held_out_pairs=6))
    return folder


@pytest.fixture(scope="session")
def server():
    """Runs the scripts in forks of one process that has imported torch; see survival_worker.py."""
    from survival_worker import Server

    server = Server()
    with server.process as process:  # leaving it closes stdin, which ends the server
        yield server
        process.stdin.close()


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory):
    """The folder of a world of two verdicts, smaller still; see tiny_models.py. Nobody writes into it."""
    from tiny_models import make_world

    return make_world(tmp_path_factory.mktemp("verdicts"))


@pytest.fixture
def fakes():
    """Two servers that answer as a test plans; see fake_server.py."""
    from fake_server import Fake, answering

    one, two = Fake(), Fake()
    with answering(one.server) as one.url, answering(two.server) as two.url:
        yield one, two


@pytest.fixture
def fake(fakes):
    """The first of the two."""
    return fakes[0]


@pytest.fixture
def hears_ctrl_c():
    """A job in the background may ignore it; in this test it does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shared():
    """shared(*parts): the folder of real files beside the repository (RMR1_SHARED names another place), or a skip."""
    def find(*parts):
        beside = os.environ.get("RMR1_SHARED") or Path(__file__).parents[2] / "shared"
        if not (path := Path(beside, "data", *parts)).exists():
            pytest.skip("the real files are not beside this clone")
        return path

    return find

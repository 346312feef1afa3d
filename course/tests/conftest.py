"""How the course's tests ask and report: `ask` calls a probe, a function that is not written yet is `waiting`.

The tests know what to expect and nothing of torch; questions.py calls the functions. When a student runs them, both
are in one process, so that print and pdb work. Under grade.py the questions run in other processes, and only JSON
comes back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

__tracebackhide__ = True  # a failure shows the test's line and the student's, not these
WAITING = "waiting for "


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "points(function, points): what a test of a function is worth")
    config.addinivalue_line("markers", "visible: the test is in the handout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only tests of functions that are set, in the order in which they are set."""
    if "course" not in config.__dict__:  # in a handout; grade.py sets it itself
        config.course = json.loads(Path(__file__).with_name("plan.json").read_text())  # type: ignore[attr-defined]
    known = list(config.__dict__["course"])
    wanted = [item for item in items if points_of(item)[0] in known]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = sorted(wanted, key=lambda item: known.index(points_of(item)[0]))


def points_of(item: pytest.Item) -> tuple[str, float]:
    mark = item.get_closest_marker("points")
    return mark.args if mark else ("", 0.0)


@pytest.fixture
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """ask(probe, *arguments) -> its answer, both as JSON has them; ends the test where a function is to be written."""
    remote = getattr(request.config, "ask", in_process)
    function = points_of(request.node)[0]

    def asked(probe: str, *arguments: Any) -> Any:
        try:
            reply = remote(function, probe, json.loads(json.dumps(arguments)))
        except NotImplementedError as error:
            if type(error).__name__ != "Todo":
                raise
            name = str(error)
        else:
            if isinstance(reply, dict) and set(reply) == {"wrong"}:
                pytest.fail(reply["wrong"], pytrace=False)
            return reply
        pytest.skip(WAITING + name)

    return asked


def in_process(function: str, probe: str, arguments: list[Any]) -> Any:
    import questions

    return questions.answer(probe, arguments)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    message = str(getattr(call.excinfo.value, "msg", "")) if call.excinfo is not None else ""
    if message.startswith(WAITING):
        report.waiting = message.removeprefix(WAITING)
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if hasattr(report, "waiting"):
        return "waiting", "w", f"WAITING for {report.waiting}"
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Points of the tests that ran, by function."""
    full: dict[str, float] = {}
    got: dict[str, float] = {}
    waits = {report.waiting for report in terminalreporter.stats.get("waiting", [])}
    for status in ("passed", "failed", "waiting", "error"):
        for report in terminalreporter.stats.get(status, []):
            name, points = dict(report.user_properties).get("points", ("", 0.0))
            if report.when == "call" or status == "error":
                full[name] = full.get(name, 0.0) + points
                got[name] = got.get(name, 0.0) + points * (status == "passed")
    if full and not hasattr(config, "ask"):
        terminalreporter.section("points of these tests")
        for name in full:
            note = "  still to be written" if name in waits else ""
            terminalreporter.line(f"{got[name]:5g} of {full[name]:<4g} {name}{note}")
        course = config.__dict__["course"]
        more = sum(course[name] for name in full if name) - sum(full.values())
        seen = f"{sum(got.values()):5g} of {sum(full.values()):g} seen here"
        terminalreporter.line(f"{seen}; {more:g} more points are asked by tests that you do not see" if more else seen)


@pytest.fixture(autouse=True)
def _carry_points(request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append(("points", points_of(request.node)))

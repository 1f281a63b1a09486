"""Parametrises the suite over the lists, and writes what came of it as a table."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.contract import gpu_results
from tests.contract.cases import AXES, CALLBACKS, CLASSIFIERS, FITTING, METRICS, MODULES, REPRESENTATIVES
from tests.contract.users import USERS

LISTS = {
    "module_case": MODULES,
    "classifier_case": CLASSIFIERS,
    "callback_case": CALLBACKS,
    "fitting_case": FITTING,
    "metric_case": METRICS,
    "user_case": USERS,
    "asking_case": [case for case in USERS if case.unpack_batch is not None],
}


def pytest_addoption(parser):
    parser.addoption("--grid", type=Path, help="write what passed as a table to this Markdown file")
    parser.addoption(
        "--record-gpu", type=Path, help="write what came of `-m gpu` to this JSON file, with its date and card"
    )
    parser.addoption("--gpu-results", type=Path, help="show such a file in the table's column `gpu`")
    parser.addoption("--record", action="store_true", help="rewrite the records that test_recording.py compares with")


def pytest_configure(config):
    if config.getoption("--record-gpu", None) is not None and not torch.cuda.is_available():
        raise pytest.UsageError("--record-gpu needs a CUDA device, but there is none.")


def pytest_generate_tests(metafunc):
    for argument, cases in LISTS.items():
        if argument in metafunc.fixturenames:
            fast = _fast_names(metafunc.definition)
            metafunc.parametrize(
                argument,
                [
                    pytest.param(case, id=case.name.replace(" ", "_"), marks=[] if fast(case) else pytest.mark.slow)
                    for case in cases
                ],
            )


def _fast_names(test):
    """Which cases of a test run in `make test`: one for each code path and new methods, unless the test asks for all or fewer."""
    if test.get_closest_marker("every_case"):
        return lambda case: True
    fewer = test.get_closest_marker("represented_by")
    if fewer is not None:
        return lambda case: case.name in fewer.args
    return lambda case: case.name in REPRESENTATIVES or getattr(case, "is_discovered", False)


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("axis")
        if marker is None or not hasattr(item, "callspec"):
            continue
        (axis,) = marker.args
        assert axis in AXES, f"{item.nodeid} names an axis that the list lacks: {axis}"
        for case in item.callspec.params.values():
            if not hasattr(case, "unsupported"):  # no case, but an argument
                continue
            item.user_properties.append(("contract", [case.name, axis]))
            if axis in case.unsupported:
                item.add_marker(pytest.mark.skip(reason=f"unsupported: {case.unsupported[axis]}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    # Under several workers this runs in the process that collects their reports too.
    if report.when == "call" or report.outcome != "passed":
        for name, value in report.user_properties:
            if name == "contract":
                reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
                _CELLS[tuple(value)].add((report.outcome, reason))


_CELLS = defaultdict(set)


def pytest_sessionfinish(session):
    option = session.config.getoption
    if hasattr(session.config, "workerinput"):
        return
    if (path := option("--record-gpu", None)) is not None:
        gpu_results.record(path, _CELLS)
    if (path := option("--grid", None)) is not None:
        given = option("--gpu-results", None)
        path.parent.mkdir(exist_ok=True)
        path.write_text(grid(_CELLS, None if given is None else json.loads(given.read_text())))


def grid(cells, recorded_on_gpu=None):
    """The table: a row for each case, a column for each axis."""
    lines, notes, head = [], {}, list(HEAD)
    if recorded_on_gpu is not None:
        cells = gpu_results.merge(cells, recorded_on_gpu)
        head.append(gpu_results.sentence(recorded_on_gpu))

    def cell(case, axis):
        found = cells.get((case.name, axis), set())
        outcomes = {outcome for outcome, _ in found}
        if not found:
            return ""
        if "failed" in outcomes:
            return "**fails**"
        if "passed" in outcomes:
            return "yes"
        reason = "; ".join(sorted({reason for _, reason in found}))
        return f"no [^{notes.setdefault(reason, len(notes) + 1)}]"

    for title, cases in (
        ("Modules", MODULES),
        ("Callbacks", CALLBACKS),
        ("Metrics", METRICS),
        ("Users' modules", USERS),
    ):
        axes = [axis for axis in AXES if any((case.name, axis) in cells for case in cases)]
        lines += [f"## {title}", "", "| | " + " | ".join(axes) + " |", "|---" * (len(axes) + 1) + "|"]
        lines += [f"| {case.name} | " + " | ".join(cell(case, axis) for axis in axes) + " |" for case in cases]
        lines.append("")
    text = ["# What is tested, and how", "", *head, ""]
    text += [f"- **{axis}**: {meaning}" for axis, meaning in AXES.items()]
    text += ["", *lines, *(f"[^{number}]: {reason}" for reason, number in notes.items())]
    return "\n".join(text).rstrip() + "\n"


HEAD = [
    "`make contract` runs every module, callback and metric through every way in which Lightning runs it, and writes this page.",
    "`yes`: all tests of the cell passed. `no`: not supported, or not run where the page was made, with the reason below.",
    "An empty cell: the question does not arise.",
]

"""Compare each case's logged values, predictions and files with its record in recorded/.

`make record` rewrites the records and says for each case whether numbers or only names changed.
"""

import dataclasses
import json
from functools import partial

import pytest
import torch

from lightning_uq import modules as m
from lightning_uq.metrics import BrierScore
from lightning_uq.networks import Factory
from tests.contract import recording as r
from tests.contract.cases import CALLBACKS, MODULES, network
from tests.contract.users import USERS
from tests.metrics import cases as measured

HINT = """
If this change was not intended, it is a bug. Otherwise run `make record`, read the diff of tests/contract/recorded/ and give the reason
for changed numbers in the commit message."""


@pytest.fixture(autouse=True)
def _one_thread():
    """Such small matrices are slower on several threads, and ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def check(request, capsys):
    """Compare a case with its record, or write the record with `--record`."""

    def check(kind, name, found):
        path, found = r.path_of(kind, name), r.plain(found)
        if request.config.getoption("--record", False):
            status = r.write(path, found)
            with capsys.disabled():
                print(f"\n{kind}/{path.stem}: {status}", end="")
            return
        if not path.exists():
            pytest.fail(
                f"{name} has no record. Run `make record`, read the new file and commit it: {path}", pytrace=False
            )
        lines = r.differences(found, json.loads(path.read_text()))
        if lines:
            shown = [*lines[:30], *([f"and {len(lines) - 30} more"] if len(lines) > 30 else [])]
            pytest.fail("\n  ".join([f"{name} differs from its record:", *shown]) + HINT, pytrace=False)

    return check


@pytest.mark.every_case
def test_modules(module_case, make_trainer, tmp_path, check):
    check("modules", module_case.name, r.record_module(module_case, make_trainer, tmp_path))


@pytest.mark.every_case
def test_callbacks(callback_case, make_trainer, tmp_path, check):
    check("callbacks", callback_case.name, r.record_callback(callback_case, make_trainer, tmp_path))


def test_metrics(make_trainer, check):
    check("metrics", "values", {key: r.record_metric(key, make_trainer) for key in measured.CASES})


@pytest.mark.represented_by(*(case.name for case in USERS if case.needs != "timm"))
def test_users_modules(user_case, make_trainer, tmp_path, check):
    pytest.importorskip(user_case.needs)
    check("users", user_case.name, r.record_user(user_case, make_trainer, tmp_path))


def test_every_record_belongs_to_a_case(request):
    lists = {"modules": MODULES, "callbacks": CALLBACKS, "users": USERS}
    expected = {r.path_of(kind, case.name) for kind, cases in lists.items() for case in cases}
    left_over = set(r.FOLDER.rglob("*.json")) - expected - {r.path_of("metrics", "values")}
    if request.config.getoption("--record", False):
        for path in left_over:
            path.unlink()
    elif left_over:
        names = ", ".join(str(path.relative_to(r.FOLDER)) for path in sorted(left_over))
        pytest.fail(f"These records belong to no case: {names}. `make record` removes them.", pytrace=False)


# ---------------------------------------------------------------------- the comparison itself

CASE = MODULES[0]


@pytest.fixture
def recorded(request):
    if request.config.getoption("--record", False):
        pytest.skip("the records are being written")
    return json.loads(r.path_of("modules", CASE.name).read_text())


def found_with(build, make_trainer, folder):
    return r.plain(r.record_module(dataclasses.replace(CASE, build=build), make_trainer, folder))


def test_a_learning_rate_off_by_a_thousandth_is_reported(recorded, make_trainer, tmp_path):
    optimizer = Factory("torch.optim.SGD", {"lr": 0.05 * 1.001, "momentum": 0.9})
    build = partial(m.DeterministicModule, network, optimizer=optimizer)
    lines = r.differences(found_with(build, make_trainer, tmp_path), recorded)
    for field in (
        "logged/fit/train_loss[",
        "logged/test/test_nll:",
        "predicted/probs/first[",
        "members/logits/sum[",
        "weights[0]/sum[",
        "written/confidence/sum:",
        "names/hyper_parameters/optimizer/kwargs/lr:",
    ):
        assert any(line.startswith(field) for line in lines), (field, lines)


def test_a_metric_off_by_a_thousandth_is_reported(recorded, make_trainer, tmp_path, monkeypatch):
    compute = BrierScore.compute
    monkeypatch.setattr(BrierScore, "compute", lambda self: 1.001 * compute(self))
    (line,) = r.differences(found_with(CASE.build, make_trainer, tmp_path), recorded)
    assert line.startswith(f"logged/test/test_brier: recorded {recorded['logged']['test']['test_brier']:.9g}, found ")
    assert line.endswith("(off by 1.0e-03, 1e-06 is allowed)")


def test_rounding_is_not_reported(recorded, make_trainer, tmp_path):
    """The initial weights differ by a million times the rounding of float64."""

    def build():
        module = CASE.build()
        with torch.no_grad():
            for i, weight in enumerate(module.parameters()):
                weight.mul_(1 + (-1) ** i * 2e-10)
        return module

    assert r.differences(found_with(build, make_trainer, tmp_path), recorded) == []


ROWS = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(10, 4)
RECORD = {
    "logged": {"val_nll": [1.5, 1.25], "val_accuracy": [0.5, 0.75]},
    "predicted": {"mean": r._summary(ROWS, first=2)},
    "weights": [r._summary(ROWS), r._summary(torch.tensor(1))],
    "names": {"weights": ["a", "b"], "hyper_parameters": {"task": "classification", "seed": None}},
}


def changed(**parts):
    return {**RECORD, **parts}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (changed(logged={"val_nll": [1.5, 1.25], "val_acc": [0.5, 0.75]}), "logged/val_acc is not in the record"),
        (changed(logged={"val_nll": [1.5, 1.25]}), "logged/val_accuracy is in the record, but is missing now"),
        (
            changed(logged={"val_nll": [1.5, 1.251], "val_accuracy": [0.5, 0.75]}),
            "logged/val_nll[1]: recorded 1.25, found 1.251 (off by 6.7e-04, 1e-06 is allowed)",
        ),
        (
            changed(logged={"val_nll": [1.5], "val_accuracy": [0.5, 0.75]}),
            "logged/val_nll: recorded [1.5, 1.25], found [1.5]",
        ),
        (changed(weights=[r._summary(ROWS)]), "weights: recorded [{"),
        (
            changed(weights=[r._summary(ROWS.float()), RECORD["weights"][1]]),
            'weights[0]/dtype: recorded "float64", found',
        ),
        (changed(weights=[r._summary(ROWS.T), RECORD["weights"][1]]), "weights[0]/shape"),
        (
            changed(names={"weights": ["a", "c"], "hyper_parameters": RECORD["names"]["hyper_parameters"]}),
            'names/weights[1]: recorded "b", found "c"',
        ),
        (
            changed(names={"weights": ["a", "b"], "hyper_parameters": {"task": "classification", "seed": 1}}),
            "names/hyper_parameters/seed: recorded null, found 1",
        ),
    ],
)
def test_a_difference_is_named(found, expected):
    lines = r.differences(found, RECORD)
    assert any(line.startswith(expected) for line in lines), lines


def test_rows_that_are_not_written_out_count():
    """A record holds two of ten rows; the sums cover the others."""
    last, swapped = ROWS.clone(), ROWS.clone()
    last[-1, 0] += 1e-5
    swapped[-1] = ROWS[-1].flip(0)
    for rows in (last, swapped, ROWS * (1 + 1e-5)):
        assert r.differences({"mean": r._summary(rows, first=2)}, RECORD["predicted"])


def test_changed_names_and_changed_numbers_are_distinguished(tmp_path):
    renamed = changed(
        logged={"val/nll": [1.5, 1.25], "val/accuracy": [0.5, 0.75]},
        names={"weights": ["x", "y"], "hyper_parameters": {"kind": "classifier", "num": 3}},
    )
    path = tmp_path / "kind" / "case.json"
    assert [r.write(path, r.plain(found)) for found in (RECORD, RECORD, renamed, renamed)] == [
        "new",
        "unchanged",
        "names changed, numbers did not",
        "unchanged",
    ]
    renamed["logged"]["val/nll"] = [1.5, 1.2501]
    assert r.write(path, r.plain(renamed)) == "NUMBERS CHANGED"


def test_a_new_record_keeps_numbers_that_differ_by_rounding(tmp_path):
    path = tmp_path / "case.json"
    r.write(path, r.plain(RECORD))
    before = path.read_text()
    rounded = changed(
        logged={"val_nll": [1.50000001, 1.25], "val_accuracy": [0.5, 0.75]},
        predicted={"mean": r._summary(ROWS * (1 + 1e-8), first=2)},
    )
    assert r.write(path, r.plain(rounded)) == "unchanged"
    assert path.read_text() == before
    rounded["logged"]["val_accuracy"] = [0.5, 0.8]
    r.write(path, r.plain(rounded))
    lines = zip(before.splitlines(), path.read_text().splitlines(), strict=True)
    assert [new.strip() for old, new in lines if old != new] == ['"val_accuracy": [0.5, 0.8],']
    assert json.loads(path.read_text())["weights"] == r.plain(RECORD)["weights"]

"""Signals end a comparison with what is complete, and a kill at any moment loses no training."""

import json
import random
import signal
import sys
import time
from functools import partial

import pytest

from lightning_uq.cli import main
from lightning_uq.compare import Configuration, Interrupted, Recipe, compare
from lightning_uq.compare.jobs.jobs import run_jobs
from tests.compare.runs import COMMAND, results, start, start_copy

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
METHODS = ("--methods", "gaussian,conformal,ensemble_mean")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main([*COMMAND[:-1], str(folder), *METHODS]) == 0
    return results(folder)


def wait_for(process, is_there):
    for _ in range(2400):
        if is_there() or process.poll() is not None:
            return
        time.sleep(0.05)


def records(folder):
    return sorted(path.name for path in (folder / "run/records").glob("*-*.npz"))


def same(found, expected):
    """Equality of the results of runs in different folders."""
    return {**found, "command": "", "git": None} == {**expected, "command": "", "git": None}


@pytest.mark.parametrize(
    ("number", "jobs"),
    [
        pytest.param(signal.SIGINT, "1", marks=pytest.mark.slow),  # as in the last test
        (signal.SIGTERM, "1"),
        (signal.SIGINT, "2"),
        pytest.param(signal.SIGTERM, "2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_what_is_complete(tmp_path, uninterrupted, number, jobs, preloaded):
    # The third training is long enough to be interrupted in its midst.
    slow = tmp_path / "slow_method.py"
    slow.write_text(SLOW)
    methods = ("--methods", "gaussian,conformal,slow_method.py")
    begin = start if jobs == "2" else partial(start_copy, preloaded)
    with begin(tmp_path, *COMMAND, *methods, "--jobs", jobs) as process:
        wait_for(process, lambda: (tmp_path / "slow").exists() and len(records(tmp_path)) == 4)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "lightning-uq: interrupted after 2 of 4 trainings. Continue with --resume."
    assert "Traceback" not in error
    assert "slow has no row: 2 of 2 seeds are missing." in error
    shown = [line.split()[0] for line in out.splitlines() if line.startswith(("gaussian ", "conformal ", "slow "))]
    assert list(dict.fromkeys(shown)) == ["gaussian", "conformal"]  # a wide table comes in parts
    found = results(tmp_path / "run")
    assert [row["method"] for row in found["rows"]] == ["gaussian", "conformal"]
    assert found["rows"] == uninterrupted["rows"][:2]
    assert found["missing"] == {"slow": 2}
    assert found["verdict"] == ["There is no verdict, because the comparison is incomplete."]
    assert found["verdict"][0] in out
    assert "<html" in (tmp_path / "run/report.html").read_text()


def test_a_training_that_ends_as_the_signal_comes_counts(tmp_path, monkeypatch):
    """A record that another process completed is there for --resume before this process hears of it."""

    def interrupted_after_the_second(*given):
        trainings = run_jobs(*given)
        yield next(trainings)
        next(trainings)
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_uq.compare.run.run_jobs", interrupted_after_the_second)
    configuration = Configuration(methods=("softmax", "energy"), seeds=3, recipe=Recipe(max_epochs=1))
    with pytest.raises(Interrupted, match=r"interrupted after 2 of 3 trainings. Continue with --resume.") as caught:
        compare(configuration, directory=tmp_path)
    assert len(caught.value.comparison.records["softmax"]) == 2


SLOW = """
import time
from pathlib import Path

from lightning.pytorch import Callback
from lightning_uq import DeterministicModule, Method


class Slow(Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.max_epochs == 2:  # not in the trial before the first training
            Path("slow").touch()
            time.sleep(120)


METHOD = Method(
    name="slow",
    build=lambda setting: DeterministicModule(setting.network, **setting.training),
    callbacks=lambda setting: [Slow()],
    ood_score="variance",
    tasks=("regression",),
)
"""


def test_nothing_is_left_of_a_run_that_no_training_has_ended(tmp_path, preloaded):
    (tmp_path / "slow_method.py").write_text(SLOW)
    with start_copy(preloaded, tmp_path, *COMMAND, "--methods", "slow_method.py") as process:
        wait_for(process, (tmp_path / "slow").exists)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), error
    assert error.splitlines()[-1] == "lightning-uq: interrupted after 0 of 2 trainings."
    assert not (tmp_path / "run").exists()


DEAF = SLOW.replace("import time", "import os, signal").replace(
    "time.sleep(120)",
    """try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass""",
)


def test_an_interrupt_that_something_swallows_ends_the_run_after_the_training(tmp_path, preloaded):
    (tmp_path / "deaf_method.py").write_text(DEAF)
    with start_copy(preloaded, tmp_path, *COMMAND, "--methods", "gaussian,deaf_method.py") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "lightning-uq: interrupted after 3 of 4 trainings. Continue with --resume."


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_killed_again_and_again_a_run_ends_as_an_uninterrupted_one(tmp_path, uninterrupted, jobs, preloaded):
    """Each time it is killed a moment after the next record began, so that some kills fall between two records of a training."""
    clock = random.Random(int(jobs))
    trained = []
    for wanted in (1, 4):
        before = records(tmp_path)
        with start_copy(preloaded, tmp_path, *COMMAND, *METHODS, "--resume", "--jobs", jobs) as process:
            wait_for(process, lambda wanted=wanted: len(records(tmp_path)) >= wanted)
            time.sleep(0.1 * clock.random())
            process.kill()
            _, error = process.communicate(timeout=60)
        times = {name: (tmp_path / "run/records" / name).stat().st_mtime_ns for name in before}
        trained.append(times)
        assert len(records(tmp_path)) >= wanted, error
    (tmp_path / "run/records/.ensemble_mean-1.npz.partial").write_bytes(b"half a record")
    written = {name: (tmp_path / "run/records" / name).stat().st_mtime_ns for name in records(tmp_path)}
    with start_copy(preloaded, tmp_path, *COMMAND, *METHODS, "--resume", "--jobs", jobs) as process:
        out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert same(results(tmp_path / "run"), uninterrupted)
    # A record that was there was not written again.
    for times in (*trained, written):
        assert all((tmp_path / "run/records" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert not list(tmp_path.glob("run/**/.*"))
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert list(state["methods"]) == ["gaussian", "conformal", "ensemble_mean"]

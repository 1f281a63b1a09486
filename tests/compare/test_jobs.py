"""Several processes give what one gives, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lightning_uq.compare import Configuration, Progress, Recipe, RunOptions, compare
from lightning_uq.compare.jobs import workers
from lightning_uq.compare.jobs.jobs import Workshop, devices_of
from lightning_uq.compare.jobs.workers import run_in_processes
from lightning_uq.compare.planning.marks import mark_of_test
from lightning_uq.compare.planning.plan import Job
from lightning_uq.compare.training import evaluation, training
from lightning_uq.errors import InputError, UQError
from tests.compare.runs import TIMES
from tests.contract.killing import PRELOADED

METHOD = """
import torch
from lightning_uq import DeterministicModule, Method
METHOD = Method(
    name="own",
    build=lambda setting: DeterministicModule(setting.network, **setting.training),
    ood_score="variance",
    tasks=("regression",),
)
"""


def test_several_processes_give_what_one_gives(tmp_path):
    (tmp_path / "own_method.py").write_text(METHOD)
    names = ("gaussian", "conformal", str(tmp_path / "own_method.py"))
    configuration = Configuration(data="diabetes", methods=names, seeds=2, recipe=Recipe(max_epochs=2))

    class Log(Progress):
        def __init__(self):
            self.calls = []

        def training(self, method, seed):
            self.calls.append(("training", method, seed))

        def epoch(self, method, seed):
            self.calls.append(("epoch", method, seed))

        def trained(self, method, seed, epochs, seconds):
            assert (epochs, seconds > 0) == (2, True)
            self.calls.append(("trained", method, seed))

    one, several = Log(), Log()
    alone = compare(configuration, one)
    together = compare(configuration, several, options=RunOptions(jobs=2))
    for name, records in alone.records.items():
        for a, b in zip(records, together.records[name], strict=True):
            assert a.seed == b.seed
            for mine, others in ((a.rows, b.rows), (a.outside, b.outside)):
                assert mine.keys() == others.keys()
                assert all(torch.equal(mine[key], others[key]) for key in mine)
            assert {k: v for k, v in a.values.items() if k not in TIMES} == {
                k: v for k, v in b.values.items() if k not in TIMES
            }
    assert sorted(one.calls) == sorted(several.calls)


def work(shared, job, devices, progress):
    """What a process does, by the name of the job."""
    progress.training(job.trainee, job.seed)
    if job.trainee == "refuses":
        raise InputError("`x` is wrong.")
    if job.trainee == "unpicklable":
        raise type("Local", (Exception,), {})("cannot travel.")
    if job.trainee == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.trainee == "waits":
        time.sleep(100)
    return shared, devices, os.getpid()


def run(*names, processes=2, progress=None):
    jobs = deque(Job(name, (), seed) for seed, name in enumerate(names))
    return run_in_processes(jobs, work, "shared", list(range(processes)), progress or Progress())


def children():
    """Processes of this one that work; the helper of multiprocessing stays."""
    found = psutil.Process().children(recursive=True)
    return {one for one in found if "resource_tracker" not in " ".join(one.cmdline())}


@pytest.fixture
def none_left_behind(monkeypatch):
    """No process that the test began is alive after it; other tests' helpers may be.

    Its processes are copies of one that has imported everything: new ones, which other tests start, take longer to import it than to run.
    """
    monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda kind: PRELOADED))
    forkserver.ensure_running()
    before = children()
    yield
    assert not children() - before


@pytest.mark.usefixtures("none_left_behind")
def test_each_process_has_its_devices():
    results = dict(run("a", "b", "c", "d"))
    assert [job.seed for job in sorted(results, key=lambda job: job.seed)] == [0, 1, 2, 3]
    assert {(shared, devices) for shared, devices, _ in results.values()} == {("shared", 0), ("shared", 1)}
    assert len({pid for _, _, pid in results.values()}) == 2


@pytest.mark.usefixtures("none_left_behind")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("refuses", InputError, "`x` is wrong."),
        ("unpicklable", RuntimeError, "Local: cannot travel."),
        pytest.param(
            "dies",
            UQError,
            "The process that trained dies with seed 0 was killed. If memory was short, use fewer `jobs`.",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="signals differ there"),
        ),
    ],
)
def test_an_error_ends_all(name, error, message):
    with pytest.raises(error) as raised:
        list(run(name))
    assert str(raised.value) == message


@pytest.mark.usefixtures("none_left_behind")
def test_an_interrupt_ends_all():
    class Interrupt(Progress):
        def training(self, method, seed):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run("waits", "waits", progress=Interrupt()))


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "main.py").write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment, stdout=-1, text=True) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        found = psutil.Process(parent.pid).children()
        parent.kill()
    assert len(found) >= 2
    _, alive = psutil.wait_procs(found, timeout=20)
    assert not alive


WAITING = """
from lightning_uq.compare import Progress
from tests.compare.test_jobs import run


class Print(Progress):
    def training(self, method, seed):
        print("begun", flush=True)


if __name__ == "__main__":
    list(run("waits", "waits", progress=Print()))
"""


def test_gpus_are_given_out_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [devices_of("gpu", number) for number in range(3)] == [[0], [1], [0]]
    assert devices_of("cuda", 1) == devices_of("auto", 1) == [1]
    assert devices_of("cpu", 1) == devices_of("mps", 1) == 1


def test_the_number_of_processes_is_positive():
    with pytest.raises(InputError, match="`jobs` must be at least 1, but it is 0"):
        RunOptions(jobs=0)


def test_trainers_run_on_the_devices_of_their_process(monkeypatch, tmp_path):
    seen = []

    def spying(original):
        def make(**arguments):
            seen.append(arguments.pop("devices"))
            return original(**arguments, devices=1)

        return make

    for module in (evaluation, training):
        monkeypatch.setattr(module, "Trainer", spying(module.Trainer))
    configuration = Configuration(data="diabetes", methods=("gaussian",), seeds=1, recipe=Recipe(max_epochs=1))
    workshop = Workshop(configuration, tmp_path, {}, {0: mark_of_test(configuration.make_data(0))})
    workshop.run(Job("gaussian", ("gaussian",), 0), [3], Progress())
    assert seen
    assert all(devices == [3] for devices in seen)

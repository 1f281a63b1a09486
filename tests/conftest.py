"""What every test may use: a quiet trainer, a seed, and a way to run a script on two processes."""

import gc
import getpass
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import Trainer

import tests.quick_lightning  # noqa: F401
from tests.preloaded import Server
from tests.trainers import quiet_trainer

ROOT = Path(__file__).parents[1]

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# torch keeps compiled graphs on the disk by their code alone: with ATEN_CPU_CAPABILITY=avx2 it would take one that was generated for
# AVX-512, whose outputs then hold uninitialised memory. torch has set its own folder by now, so this replaces it.
_CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    Path(tempfile.gettempdir()) / f"lightning_uq_inductor_{getpass.getuser()}_{_CAPABILITY}"
)


# They are about how Lightning calls jsonargparse. `lightning-uq` sets it too, so a test would depend on those that ran before.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


# A worker holds a million objects after it has imported all tests, and several million later. One search for garbage among them takes
# seconds. Objects that outlive a module of tests are therefore no longer searched.
def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _search_little_for_garbage():
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    # `seed_everything` of an earlier test leaves it, and Lightning seeds each process that it starts by it.
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """A Trainer on the CPU that prints nothing and writes below ``tmp_path``."""
    return partial(quiet_trainer, tmp_path)


# A rank ends at once and destroys nothing. Now and then gloo's threads abort a process whose interpreter ends before they do, and
# in torch 2.6 `destroy_process_group` waits for a thread that waits for the GIL.
_LEAVE = """
import os, sys
import torch.distributed
if torch.distributed.is_available() and torch.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory of a user's own project; modules that a test imports from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
            package, _, own = name.rpartition(".")
            if package in sys.modules:
                delattr(sys.modules[package], own)
    gc.collect()  # or the help would list classes that cannot be imported any more


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory) -> Iterator[Server]:
    """A process that has imported everything, for scripts."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        server = Server(Path(folder), ROOT)
        yield server
        server.close()


@pytest.fixture
def run_script(tmp_path, request) -> Callable[..., Any]:
    """Run Python code in a process of its own (which may start a second rank); what it writes to ``out`` as JSON is returned.

    With ``imported=False`` the process has imported nothing before.
    """

    def run(code: str, *, timeout: int = 400, imported: bool = True) -> Any:
        script, out = tmp_path / "script.py", tmp_path / "out.json"
        script.write_text(f"out = {str(out)!r}\n{code}\n{_LEAVE}")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if imported:
            status, said = request.getfixturevalue("preloaded").run(script, environment, tmp_path, timeout)
        else:
            command, environment = [sys.executable, str(script)], {**os.environ, **environment}
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=tmp_path
            )
            status, said = done.returncode, done.stdout + done.stderr
        assert status == 0, said
        return json.loads(out.read_text())

    return run

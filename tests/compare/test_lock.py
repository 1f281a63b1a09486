"""Two comparisons never write to one directory at the same time."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from lightning_uq.compare.directory.lock import LOCK, locked
from lightning_uq.errors import InputError
from tests.compare.test_run_directory import QUICK, run


def holder(folder, pid, host=None):
    (folder / LOCK).write_text(json.dumps({"pid": pid, "host": host or socket.gethostname()}))


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be asked there")
def test_a_second_comparison_is_refused(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        holder(tmp_path, other.pid)
        with pytest.raises(
            InputError, match=rf"`out`: process {other.pid} on .* is writing a comparison to .*. Wait for it"
        ):
            run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        other.communicate(b"\n")
    # It has ended without removing its lock, as a process that was killed.
    assert run(tmp_path, replace(QUICK, methods=("gaussian",), seeds=1))[1].trained_methods == [("gaussian", 0)]
    assert not (tmp_path / LOCK).exists()


def test_a_process_of_another_machine_cannot_be_asked(tmp_path):
    holder(tmp_path, 1, "elsewhere")
    with pytest.raises(InputError, match=rf"process 1 on elsewhere .* If there is no such process, delete .*{LOCK}"):
        run(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_lock_that_is_being_written_counts(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(InputError, match="another process is writing a comparison"), locked(tmp_path):
        pass


def test_the_number_of_this_process_is_that_of_an_earlier_one(tmp_path):
    holder(tmp_path, os.getpid())
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()

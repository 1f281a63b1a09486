"""Comparisons in processes of their own, which tests interrupt and kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A shell's background processes, and their children, ignore the signal unless they say so.
_MAIN = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    from lightning_uq.cli import main
    sys.exit(main(sys.argv[1:]))
"""

COMMAND = ("compare", "--data", "diabetes", "--max-epochs", "2", "--seeds", "2", "--out", "run")
"""A comparison of seconds, without its methods."""

TIMES = ("train_seconds", "ms_per_1000")


def start(folder, *arguments):
    """A command in a process, in a folder."""
    (folder / "main.py").write_text(_MAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=folder, env=environment, text=True, stdout=-1, stderr=-1
    )


def results(folder):
    """results.json without times, which differ from run to run, and without what says how it was started."""
    found = json.loads((folder / "results.json").read_text())
    found["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in found["rows"]]
    return found

"""The names of the public API, compared with those that the package exports, so that a change is seen."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("api.txt")
ROOMS = [
    "",
    "active_learning",
    "callbacks",
    "compat.haiku",
    "data",
    "functional",
    "loggers",
    "losses",
    "metrics",
    "modules",
    "modules.member_parallel",
    "networks",
    "predictions",
    "tasks",
]


def names():
    """One line per public name; a class is followed by the names of its constructor's arguments."""
    lines = []
    for room in ROOMS:
        module = importlib.import_module(f"lightning_uq.{room}".rstrip("."))
        for name in sorted(module.__all__):
            found = getattr(module, name)
            # A constructor that somebody else wrote differs between versions of Python and of other packages.
            maker = found.__init__ if inspect.isclass(found) else found
            ours = inspect.isfunction(maker) and (maker.__module__ or "").startswith("lightning_uq")
            arguments = f"({', '.join(inspect.signature(found).parameters)})" if ours else ""
            lines.append(f"{module.__name__}.{name}{arguments}")
    return lines


def test_the_public_names_are_those_that_are_written_down():
    written = FILE.read_text().splitlines()
    found = names()
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    assert written == found, f"run `make api` and look at its diff; gone: {gone}, new: {new}"


def test_the_rooms_are_attributes_of_the_package():
    rooms = ["active_learning", "data", "functional", "losses", "metrics", "networks", "tasks"]
    command = f"import lightning_uq; print({', '.join(f'lightning_uq.{r}.__name__' for r in rooms)})"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [f"lightning_uq.{room}" for room in rooms]


if __name__ == "__main__":
    FILE.write_text("\n".join(names()) + "\n")
    sys.stdout.write(f"{FILE}\n")

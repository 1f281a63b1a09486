"""Every notebook runs in full, and ends in time."""

import runpy
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
MINUTES = 4
"""Twice what a notebook may take on two quiet cores."""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_runs_in_full(path, site, monkeypatch):
    monkeypatch.delenv("LIGHTNING_UQ_FAST", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel shows figures by its own backend
    started = time.monotonic()
    runpy.run_path(str(FOLDER / "execute.py"))["execute"](path)
    assert time.monotonic() - started < 60 * MINUTES

"""A run of `pytest -m gpu`, recorded where there is a GPU, so that the page made elsewhere can show it."""

import datetime
import json

import torch

AXIS = "gpu"


def record(path, cells):
    """Write what came of the axis `gpu`, with its date and card.

    Raises:
        ValueError: No test of the axis `gpu` ran.
    """
    found = {case: sorted(map(list, outcomes)) for (case, axis), outcomes in sorted(cells.items()) if axis == AXIS}
    if not found:
        raise ValueError("--record-gpu found no test of the axis `gpu`. Run `pytest -m gpu tests/contract`.")
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**about, "cells": found}, indent=1) + "\n")


def merge(cells, recorded):
    """The cells, with the recorded ones of cases that were not run here; a recorded case that is gone is left out."""
    merged = dict(cells)
    for case, outcomes in recorded["cells"].items():
        here = cells.get((case, AXIS))
        if here is not None and all(outcome == "skipped" for outcome, _ in here):
            merged[case, AXIS] = {tuple(one) for one in outcomes}
    return merged


def sentence(recorded):
    """Where the column comes from."""
    return f"The column `{AXIS}` is that of a run on {recorded['date']} on one {recorded['card']}, with torch {recorded['torch']}."

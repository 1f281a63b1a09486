"""The state of a :class:`~lightning_uq.DriftMonitor` in a file, which each run continues."""

from collections.abc import Collection
from pathlib import Path

import torch

from lightning_uq.callbacks.compose import kind_of
from lightning_uq.callbacks.drift_monitor import DriftMonitor
from lightning_uq.callbacks.ood_alarm import OODAlarm
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.errors import InputError
from lightning_uq.report import writable_directory

ALARM, SCORE = "ood_alarm", "ood_score"


def open_monitor(path: str | Path, model: str | Path) -> DriftMonitor:
    """The monitor in a file or, if the file does not exist, a new one from the alarm in a ``-uq.ckpt``.

    Args:
        path: The file.
        model: The model's file.

    Raises:
        InputError: The checkpoint has no alarm or a different one, the file cannot be read, or it is missing and the model is a graph.
    """
    path, model = Path(path), Path(model)
    new = DriftMonitor(_alarm(model)) if model.suffix == ".ckpt" else None
    writable_directory(path.parent)
    if not path.exists():
        if new is None:
            raise InputError(
                f"`monitor`: {path} does not exist, and a graph cannot create it. Run the command once with the -uq.ckpt, or write "
                "DriftMonitor(alarm).to_json() from the fitted OODAlarm."
            )
        return new
    try:
        found = DriftMonitor.from_json(path.read_text())
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"`monitor`: {path} cannot be read as the state of a DriftMonitor: {error}") from error
    bins = found.bins
    if new is not None and not (torch.equal(bins.edges, new.bins.edges) and torch.equal(bins.sizes, new.bins.sizes)):
        raise InputError(
            f"`monitor`: {path} belongs to another alarm than that in {model}, since they were fitted to different held-out rows. Name a "
            "new file to start a new monitor."
        )
    return found


def check_alarm(model: str | Path, outputs: Collection[str]) -> None:
    """Raise an error for a model whose outputs do not contain an alarm."""
    if not {ALARM, SCORE} <= set(outputs):
        raise InputError(f"{_NEEDED.format(model)} Its outputs are {', '.join(outputs)}.")


def _alarm(model: Path) -> OODAlarm:
    """The alarm in a ``-uq.ckpt``."""
    states = fitted_states(model)
    for key, state in states.items():
        if kind_of(key, state) == OODAlarm.__qualname__:
            return OODAlarm.of_state(state)
    raise InputError(f"{_NEEDED.format(model)} It holds the states {', '.join(states)}.")


_NEEDED = "`monitor` needs a model with an OODAlarm, but {} has none."

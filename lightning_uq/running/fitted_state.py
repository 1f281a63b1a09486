"""The fitted state of a post-training callback: its tensors, their settings, and their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.version import __version__

FORMAT = 1
"""The format of states that this version writes, and the newest one that it reads.

A release that breaks the format for older releases raises this number, and still reads the older formats.
"""

_WRITER = "lightning_uq"
"""The entry that names the release that wrote a state."""

_ADDED = {_WRITER, "task"}
"""Entries that the first states of format 1 lack."""


@dataclass(frozen=True)
class FittedState:
    """The result of a fit as plain data.

    Attributes:
        settings: The arguments that the fit depends on. A callback rejects a state with other settings.
        tensors: The fitted tensors and numbers, by name.
        fingerprint: Fingerprint of the weights; None after a fit of tensors from memory.
        inferred_task: The name of the task inferred from the fitting data, if none was given.
        task: The given task, as :func:`~lightning_uq.tasks.task_to_config` writes it; None if it cannot, or if none was given.
        version: The number of this format.
        lightning_uq: The release of this package that wrote the state.
    """

    settings: dict[str, Any]
    tensors: dict[str, Any]
    fingerprint: Tensor | None
    inferred_task: str | None = None
    version: int = field(default=FORMAT, kw_only=True)
    task: dict[str, Any] | None = field(default=None, kw_only=True)
    lightning_uq: str | None = field(default=__version__, kw_only=True)

    @classmethod
    def read(cls, state: Any, where: str) -> "FittedState | None":
        """The state in a checkpoint, or None if the entry is something else.

        Args:
            state: The entry of the checkpoint.
            where: The owner and the place of the state, for the error.

        Raises:
            InputError: A newer release wrote it in an unknown format.

        Example:
            >>> FittedState.read({"version": 2, "lightning_uq": "0.3.0"}, "The state of FitGMM in a-uq.ckpt")
            Traceback (most recent call last):
            ...
            lightning_uq.errors.InputError: The state of FitGMM in a-uq.ckpt has format 2, which lightning_uq 0.3.0 wrote, ...
        """
        if not holds_fit(state):
            return None
        if state["version"] > FORMAT:
            raise InputError(
                f"{where} has format {state['version']}, which lightning_uq {state[_WRITER]} wrote, but lightning_uq {__version__} "
                f"reads only formats up to {FORMAT}. Install lightning_uq {state[_WRITER]} or newer, or fit again with this version."
            )
        known = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        return cls(**{_WRITER: None, **known}) if _first_entries() <= known.keys() else None

    def to_dict(self) -> dict[str, Any]:
        """The entry of a checkpoint."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def refusal(self, settings: dict[str, Any], key: str) -> str | None:
        """The reason why a callback with these settings cannot use the state, or None."""
        differing = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        if not differing:
            return None
        ours, theirs = (
            ", ".join(f"{name}={one.get(name)!r}" for name in differing) for one in (settings, self.settings)
        )
        return (
            f"Callback {key!r} has {ours}, but its state was fitted with {theirs}. Pass the same arguments to the callback, or give it "
            "another `name`."
        )


def holds_fit(state: Any) -> bool:
    """Whether an entry of a checkpoint's ``callbacks`` is a fitted state, of this format or a newer one."""
    if not isinstance(state, Mapping) or not isinstance(state.get("version"), int) or state["version"] < 1:
        return False
    return _WRITER in state or (set(state) == _first_entries() and state["version"] == 1)


def _first_entries() -> set[str]:
    return {one.name for one in fields(FittedState)} - _ADDED


def to_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors on the CPU."""
    return {name: one.detach().cpu().clone() if isinstance(one, Tensor) else one for name, one in tensors.items()}

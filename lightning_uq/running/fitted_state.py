"""The fitted state of a post-training callback: its tensors, the settings they depend on, and the weights they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.version import __version__

FORMAT = 1
"""The format of states that this version writes, and the newest one that it reads.

A release that changes what older releases can read raises it, and then reads the older formats as well.
"""

_WRITER = "lightning_uq"
"""The entry that names the release which wrote a state."""

_ADDED = {_WRITER, "task"}
"""Entries that the first states of format 1 lack."""


@dataclass(frozen=True)
class FittedState:
    """What a fit gave, as plain data.

    Attributes:
        settings: The arguments that the fit depends on. A state that was fitted with others is not a callback's.
        tensors: The fitted tensors and numbers, by name.
        fingerprint: Fingerprint of the weights; None after a fit of tensors that were in memory.
        inferred_task: The name of the task that the fitting data have shown, where nobody had said it.
        task: The task that was given, as :func:`~lightning_uq.tasks.task_to_config` writes it; None where it cannot, or where there was none.
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
        """The state that a checkpoint holds, or None if it holds something else.

        Args:
            state: What the checkpoint holds.
            where: Whose it is, and where it was found, for the error.

        Raises:
            InputError: A newer release wrote it, in a format that this one does not know.

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
                f"{where} has format {state['version']}, which lightning_uq {state[_WRITER]} wrote, but this is lightning_uq {__version__}, which "
                f"reads formats up to {FORMAT}. Install lightning_uq {state[_WRITER]} or newer, or fit again with this version."
            )
        known = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        return cls(**{_WRITER: None, **known}) if _first_entries() <= known.keys() else None

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def refusal(self, settings: dict[str, Any], key: str) -> str | None:
        """Why the state is not that of a callback with these settings, or None."""
        differing = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        if not differing:
            return None
        ours, theirs = (
            ", ".join(f"{name}={one.get(name)!r}" for name in differing) for one in (settings, self.settings)
        )
        return (
            f"Callback {key!r} has {ours}, but its state was fitted with {theirs}. Give the callback the same arguments, or a "
            "`name` of its own."
        )


def holds_fit(state: Any) -> bool:
    """Whether an entry of a checkpoint's ``callbacks`` is a fitted state, of this format or of a newer one."""
    if not isinstance(state, Mapping) or not isinstance(state.get("version"), int) or state["version"] < 1:
        return False
    return _WRITER in state or (set(state) == _first_entries() and state["version"] == 1)


def _first_entries() -> set[str]:
    return {one.name for one in fields(FittedState)} - _ADDED


def to_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors on the CPU."""
    return {name: one.detach().cpu().clone() if isinstance(one, Tensor) else one for name, one in tensors.items()}

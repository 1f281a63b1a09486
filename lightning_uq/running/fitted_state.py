"""The fitted state of a post-training callback: its tensors, the settings they depend on, and the weights they belong to."""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

VERSION = 1


@dataclass(frozen=True)
class FittedState:
    """What a fit gave, as plain data.

    Attributes:
        settings: The arguments that the fit depends on. A state that was fitted with others is not a callback's.
        tensors: The fitted tensors and numbers, by name.
        fingerprint: Fingerprint of the weights; None after a fit of tensors that were in memory.
        inferred_task: The name of the task that the fitting data have shown, where nobody had said it.
        version: Version of this format.
    """

    settings: dict[str, Any]
    tensors: dict[str, Any]
    fingerprint: Tensor | None
    inferred_task: str | None = None
    version: int = field(default=VERSION)

    @classmethod
    def read(cls, state: Any) -> "FittedState | None":
        """The state that a checkpoint holds, or None if it holds something else."""
        names = {one.name for one in fields(cls)}
        is_state = isinstance(state, dict) and set(state) == names and state["version"] == VERSION
        return cls(**state) if is_state else None

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


def to_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors on the CPU."""
    return {name: one.detach().cpu().clone() if isinstance(one, Tensor) else one for name, one in tensors.items()}

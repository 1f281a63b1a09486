"""The base class of the parts of :class:`~lightning_uq.modules.lightning_ensemble.members.Members`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class Part:
    """A part of :class:`Members`. Its state belongs to one run, so a copy of the ensemble starts with an empty state.

    Args:
        members: The members that the part serves.
    """

    def __init__(self, members: "Members") -> None:
        self.members = members

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # every part takes `members` alone

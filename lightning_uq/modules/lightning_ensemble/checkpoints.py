"""What LightningModules that are members add to the checkpoint of their ensemble."""

from typing import TYPE_CHECKING, Any

from lightning_uq.modules.checkpoints import ENSEMBLE_STATE
from lightning_uq.modules.lightning_ensemble.checks import overrides
from lightning_uq.modules.streams import from_plain, to_plain

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


def save_members(members: "Members", checkpoint: dict[str, Any]) -> None:
    """Add the members' random streams, and what their own ``on_save_checkpoint`` adds."""
    own: list[dict[str, Any]] = [{} for _ in members.modules]
    _call_with_own_checkpoints(members, "on_save_checkpoint", checkpoint, own)
    streams = [None if stream.state is None else to_plain(stream.state) for stream in members.streams]
    checkpoint[ENSEMBLE_STATE].update(members=own, streams=streams)


def load_members(members: "Members", checkpoint: dict[str, Any]) -> None:
    """The inverse of :func:`save_members`; the streams go on only where a training is resumed."""
    saved = checkpoint.get(ENSEMBLE_STATE, {})
    if "members" not in saved:
        return
    _call_with_own_checkpoints(members, "on_load_checkpoint", checkpoint, saved["members"])
    if members.ensemble.is_resuming:
        for stream, state in zip(members.streams, saved["streams"], strict=True):
            stream.state = None if state is None else from_plain(state)


def _call_with_own_checkpoints(
    members: "Members", hook: str, checkpoint: dict[str, Any], own: list[dict[str, Any]]
) -> None:
    """Show each member a checkpoint of its own, which holds its weights under their own names."""
    state = checkpoint["state_dict"]
    for i, member in enumerate(members.modules):
        if overrides(member, hook):
            prefix = f"network.members.{i}."
            names = [name for name in state if name.startswith(prefix)]
            mine = {**own[i], "state_dict": {name.removeprefix(prefix): state.pop(name) for name in names}}
            getattr(member, hook)(mine)
            state.update({prefix + name: value for name, value in mine.pop("state_dict").items()})
            own[i] = mine

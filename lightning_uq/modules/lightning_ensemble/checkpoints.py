"""The entries that LightningModules as members add to the checkpoint of their ensemble."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from lightning_uq.checkpoint_files import hyperparameter_entries
from lightning_uq.modules.lightning_ensemble.checks import overrides
from lightning_uq.modules.member_files import ENSEMBLE_STATE
from lightning_uq.running.streams import from_plain, to_plain

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members

_HPARAMS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
_HPARAMS_NAME = LightningModule.CHECKPOINT_HYPER_PARAMS_NAME
_HPARAMS_TYPE = LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE


def save_members(members: "Members", checkpoint: dict[str, Any]) -> None:
    """Add the members' random streams, and whatever their own ``on_save_checkpoint`` adds or replaces."""
    own: list[dict[str, Any]] = [{} for _ in members.modules]
    for i, member in enumerate(members.modules):
        if overrides(member, "on_save_checkpoint"):
            given = _checkpoint_of(members, i, checkpoint)
            mine = dict(given)
            member.on_save_checkpoint(mine)
            _put_weights(i, checkpoint, mine.pop("state_dict", {}))
            own[i] = {name: value for name, value in mine.items() if name not in given or value is not given[name]}
    streams = [None if stream.state is None else to_plain(stream.state) for stream in members.streams]
    checkpoint[ENSEMBLE_STATE].update(members=own, streams=streams)


def load_members(members: "Members", checkpoint: dict[str, Any]) -> None:
    """Restore the entries of :func:`save_members`; the random streams only when a training resumes."""
    saved = checkpoint.get(ENSEMBLE_STATE, {})
    if "members" not in saved:
        return
    for i, member in enumerate(members.modules):
        if overrides(member, "on_load_checkpoint"):
            mine = {**_checkpoint_of(members, i, checkpoint), **saved["members"][i]}
            member.on_load_checkpoint(mine)
            _put_weights(i, checkpoint, mine["state_dict"])
    if members.ensemble.is_resuming:
        for stream, state in zip(members.streams, saved["streams"], strict=True):
            stream.state = None if state is None else from_plain(state)


def _checkpoint_of(members: "Members", i: int, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that member i would see alone, with its own weights (removed from the ensemble's), hyper-parameters and optimizer."""
    foreign = (ENSEMBLE_STATE, _HPARAMS, _HPARAMS_NAME, _HPARAMS_TYPE)
    mine = {name: value for name, value in checkpoint.items() if name not in foreign}
    member = members.modules[i]
    mine.update(hyperparameter_entries(member))
    prefix, state = _prefix(i), checkpoint["state_dict"]
    names = [name for name in state if name.startswith(prefix)]
    mine["state_dict"] = {name.removeprefix(prefix): state.pop(name) for name in names}
    if "optimizer_states" in mine:
        mine["optimizer_states"] = [state["members"][i] for state in mine["optimizer_states"] if "members" in state]
        each = len(mine["lr_schedulers"]) // len(members.modules)  # all members have the same number
        if each:  # otherwise one scheduler serves all members, as in stochastic weight averaging
            mine["lr_schedulers"] = mine["lr_schedulers"][i * each : (i + 1) * each]
    return mine


def _put_weights(i: int, checkpoint: dict[str, Any], weights: dict[str, Any]) -> None:
    checkpoint["state_dict"].update({_prefix(i) + name: value for name, value in weights.items()})


def _prefix(i: int) -> str:
    return f"network.members.{i}."

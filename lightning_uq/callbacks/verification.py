"""Whether a fitted state belongs to the weights in memory, and what to do if it does not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uq.callbacks.fitted_state import FittedState
from lightning_uq.callbacks.sibling import sibling_path
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError
from lightning_uq.networks.fingerprint import same_weights, weights_fingerprint


@dataclass(frozen=True)
class Decision:
    """What a callback does at the first batch of a validation, test or prediction.

    Attributes:
        action: ``"keep"`` the state in memory, ``"load"`` the one of a file, ``"refit"``, or raise an ``"error"``.
        text: The error, or the path of the file.
        state: The state of the file.
    """

    action: Literal["keep", "load", "refit", "error"]
    text: str = ""
    state: dict[str, Any] | None = None


def decide(
    name: str,
    key: str,
    settings: dict[str, Any],
    fitted: Tensor | None,
    known_path: str | None,
    can_refit: bool,
    trainer: Trainer,
    module: LightningModule,
) -> Decision:
    """State in memory, else a sibling file, else a refit, else an error. Rank 0 decides for all ranks. A collective.

    Args:
        name: Name of the callback, for the error.
        key: Key of its state.
        settings: Its settings.
        fitted: Fingerprint of the weights that the state in memory was fitted on.
        known_path: The file that its fit wrote.
        can_refit: Whether there is a loader for a refit.
        trainer: The running Trainer.
        module: The module that it runs.
    """
    decision: Decision | None = None
    if trainer.is_global_zero:
        current = weights_fingerprint(module)
        if fitted is not None and same_weights(fitted, current, module):
            decision = Decision("keep")
        else:
            decision = _look_up(name, key, settings, known_path, can_refit, trainer, module, current)
    decision = trainer.strategy.broadcast(decision)
    assert decision is not None
    return decision


def _look_up(
    name: str,
    key: str,
    settings: dict[str, Any],
    known_path: str | None,
    can_refit: bool,
    trainer: Trainer,
    module: LightningModule,
    current: Tensor,
) -> Decision:
    tested = trainer.ckpt_path
    siblings = [known_path] if tested is None else [str(sibling_path(tested)), known_path]
    refusal: str | None = None
    for path in siblings:
        if path is None or not Path(path).is_file():
            continue
        try:
            states = read_checkpoint(path, "The -uq.ckpt must be a checkpoint").get("callbacks") or {}
        except InputError as error:  # the caller tells the other ranks, too
            refusal = str(error)
            continue
        state = FittedState.read(states.get(key))
        if state is not None and state.fingerprint is not None and same_weights(state.fingerprint, current, module):
            refusal = state.refusal(settings, key)
            if refusal is None:
                return Decision("load", path, state.to_dict())
    if tested is not None and _holds_raw_weights(str(tested), module):
        return Decision(
            "error",
            f"The weights in memory are not those of {tested} but the raw ones that it keeps beside the average: the "
            "averaging callback of this Trainer put them there. Use a Trainer without the averaging callback.",
        )
    if can_refit:
        return Decision("refit")
    if refusal is not None:
        return Decision("error", refusal)
    return Decision(
        "error",
        f"{name} has no state that was fitted on the weights in memory"
        + (f", and there is none beside {tested}" if tested is not None else "")
        + ". Pass `ckpt_path=` the -uq.ckpt that the fit wrote, or `dataloader=` so that it can be fitted now.",
    )


def _holds_raw_weights(path: str, module: LightningModule) -> bool:
    """Whether the module holds the raw weights of a checkpoint whose ``state_dict`` is an average."""
    if not Path(path).is_file():
        return False
    try:
        raw = read_checkpoint(path).get("current_model_state")
    except InputError:  # it was loaded with `weights_only=False`; this only looks for the reason of a mismatch
        return False
    if raw is None:
        return False
    held = module.state_dict()
    return all(
        name in held and torch.equal(held[name].cpu(), value.to(held[name].dtype)) for name, value in raw.items()
    )

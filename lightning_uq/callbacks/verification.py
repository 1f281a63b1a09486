"""Checks whether a fitted state belongs to the weights in memory, and decides what to do if it does not."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uq.callbacks.sibling import sibling_path
from lightning_uq.checkpoint_files import is_file, read_checkpoint
from lightning_uq.errors import InputError
from lightning_uq.networks.fingerprint import agree, coarsest_dtype, weights_fingerprint
from lightning_uq.networks.sharding import is_sharded
from lightning_uq.running.fitted_state import FittedState


@dataclass(frozen=True)
class Decision:
    """The action of a callback at the first batch of a validation, test or prediction.

    Attributes:
        action: ``"keep"`` the state in memory, ``"load"`` the state of a file, ``"refit"``, or raise an ``"error"``.
        text: The error, or the path of the file.
        state: The state of the file.
    """

    action: Literal["keep", "load", "refit", "error"]
    text: str = ""
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Fit:
    """The properties of a callback's own fit.

    Attributes:
        name: Name of the callback, for the error.
        key: Key of its state.
        settings: Its settings.
        fingerprint: Fingerprint of the weights that the state in memory was fitted on; None without a state.
        path: The file that its fit wrote.
        is_repeatable: Whether there is a loader for a refit.
    """

    name: str
    key: str
    settings: dict[str, Any]
    fingerprint: Tensor | None
    path: str | None
    is_repeatable: bool


def decide(fit: Fit, trainer: Trainer, module: LightningModule) -> Decision:
    """Choose the state in memory, else a sibling file, else a refit, else an error. Rank 0 decides for all ranks. A collective."""
    decision: Decision | None = None
    if trainer.is_global_zero or is_sharded(module):  # no rank reads sharded weights alone
        current, dtype = weights_fingerprint(module), coarsest_dtype(module)
    if trainer.is_global_zero:
        if fit.fingerprint is not None and agree(fit.fingerprint, current, dtype):
            decision = Decision("keep")
        else:
            decision = _look_up(fit, trainer, module, current, dtype)
    decision = trainer.strategy.broadcast(decision)
    assert decision is not None
    return decision


def _look_up(fit: Fit, trainer: Trainer, module: LightningModule, current: Tensor, dtype: torch.dtype) -> Decision:
    tested = trainer.ckpt_path
    siblings = [fit.path] if tested is None else [sibling_path(tested), fit.path]
    refusal: str | None = None
    for path in siblings:
        if path is None or not is_file(path):
            continue
        try:
            states = read_checkpoint(path, "The -uq.ckpt must be a checkpoint").get("callbacks") or {}
            state = FittedState.read(states.get(fit.key), f"The state of {fit.key} in {path}")
        except InputError as error:  # the caller shares the error with the other ranks
            refusal = str(error)
            continue
        if state is not None and state.fingerprint is not None and agree(state.fingerprint, current, dtype):
            refusal = state.refusal(fit.settings, fit.key)
            if refusal is None:
                return Decision("load", path, state.to_dict())
    if tested is not None and not is_sharded(module) and _holds_raw_weights(str(tested), module):
        return Decision(
            "error",
            f"The weights in memory are not those of {tested}, but the raw ones that it stores beside the average: the "
            "averaging callback of this Trainer loaded them. Use a Trainer without the averaging callback.",
        )
    if fit.is_repeatable:
        return Decision("refit")
    if refusal is not None:
        return Decision("error", refusal)
    where = f", and there is no such file beside {tested}" if tested is not None else ""
    if fit.fingerprint is not None and fit.path is None:
        file = "It was fitted on other weights: load those (`save_fitted` writes a file that holds both),"
    else:
        file = "Pass the -uq.ckpt that the fit or `save_fitted` wrote as `ckpt_path`,"
    return Decision(
        "error",
        f"{fit.name} has no state that was fitted on the weights in memory{where}. {file} or pass `dataloader=` to fit it "
        "now.",
    )


def _holds_raw_weights(path: str, module: LightningModule) -> bool:
    """Whether the module holds the raw weights of a checkpoint whose ``state_dict`` is an average."""
    if not is_file(path):
        return False
    try:
        raw = read_checkpoint(path).get("current_model_state")
    except InputError:  # loaded with `weights_only=False`; this only looks for the reason of a mismatch
        return False
    if raw is None:
        return False
    held = module.state_dict()
    return all(
        name in held and torch.equal(held[name].cpu(), value.to(held[name].dtype)) for name, value in raw.items()
    )

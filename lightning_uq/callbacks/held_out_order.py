"""Whether a callback on held-out rows suits those that stand around it in the Trainer's callbacks."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uq.callbacks.post_training import PostTrainingCallback, post_training_callbacks
from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.running.loaders import reads_same_data
from lightning_uq.running.logits import is_uncertainty_module


def check_order(callback: PostTrainingCallback, trainer: Trainer, module: LightningModule, stage: str) -> None:
    """Look for callbacks that would make what ``callback`` fits wrong.

    Those before it are reported where predictions lack their changes, and warned of where they follow the same rows too closely.

    Raises:
        InputError: A callback behind it changes the predictions that it is fitted to.
    """
    ours, name = post_training_callbacks(trainer), type(callback).__name__
    before, behind = ours[: ours.index(callback)], ours[ours.index(callback) + 1 :]
    later = [one for one in behind if one.recalibrates]
    if later and not callback.recalibrates:
        raise InputError(
            f"{name} stands before {type(later[0]).__name__} in the Trainer's callbacks, so it would be fitted to predictions that change "
            "afterwards. Swap them."
        )
    apart = [one for one in before if one.recalibrates and callback.attach and not one.attach]
    if apart and not is_uncertainty_module(module):
        report_guess(
            f"{name} has `attach=True`, but {type(apart[0]).__name__} before it has not, so its changes are left out. Pass it to both.",
            module,
        )
        before = [one for one in before if one not in apart]
    close = [one for one in before if one.is_flexible and reads_same_data(one.dataloader, callback.dataloader)]
    if close and stage == "fit" and not callback.recalibrates:
        rank_zero_warn(
            f"{name} and {type(close[0]).__name__} are fitted to the same rows, on which the latter makes too few errors: later rows will have "
            "more than they should. Pass other held-out rows as `dataloader` to one of them."
        )

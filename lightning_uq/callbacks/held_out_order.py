"""Checks the order of callbacks around one on held-out rows, and finds the results that it reads."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_uq.callbacks.carried import Carried
from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.callbacks.fitting_data import TrainingData
from lightning_uq.callbacks.post_training import PostTrainingCallback, post_training_callbacks
from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.predictions.base import DENSITY_FIELDS
from lightning_uq.running.loaders import reads_same_data
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.running.same_reading import difference_of_readings
from lightning_uq.running.transforms import PredictionTransform, transforms_of


def check_order(callback: PostTrainingCallback, trainer: Trainer, module: LightningModule, stage: str) -> None:
    """Check for callbacks that would make the fit of ``callback`` wrong.

    A message reports earlier callbacks whose changes predictions lack, and a warning those that overfit the same rows.

    Raises:
        InputError: A later callback changes the predictions that this one is fitted to.
    """
    ours, name = post_training_callbacks(trainer), type(callback).__name__
    before, behind = ours[: ours.index(callback)], ours[ours.index(callback) + 1 :]
    foreign = not is_uncertainty_module(module)
    for one in before if foreign else []:
        difference = difference_of_readings(callback.logits, one.logits)
        if difference is not None and one.recalibrates and type(one) is not type(callback):
            report_guess(
                f"{name} does not use the result of {type(one).__name__}, because their `{difference}` differs: they read other outputs, such as "
                f"those of another head. If they read the same, pass both the same `{difference}`.",
                module,
            )
    if foreign:
        before = [one for one in before if reads_alike(callback, one)]
        behind = [one for one in behind if reads_alike(callback, one)]
    later = [one for one in behind if one.recalibrates]
    if later and not callback.recalibrates:
        raise InputError(
            f"{name} stands before {type(later[0]).__name__} in the Trainer's callbacks, so it would be fitted to predictions that change "
            "afterwards. Swap them."
        )
    apart = [one for one in before if one.recalibrates and callback.attach and not one.attach]
    if apart and foreign:
        report_guess(
            f"{name} has `attach=True`, but {type(apart[0]).__name__} before it does not, so its changes are left out. Pass `attach=True` to both.",
            module,
        )
        before = [one for one in before if one not in apart]
    close = [one for one in before if one.is_flexible and reads_same_data(one.dataloader, callback.dataloader)]
    if close and stage == "fit" and not callback.recalibrates and callback.fits_targets(module):
        rank_zero_warn(
            f"{name} and {type(close[0]).__name__} are fitted to the same rows. The latter overfits them, so later rows will have more errors "
            "than they should. Pass other held-out rows as `dataloader` to one of them."
        )


def check_after(after: Sequence[PostTrainingCallback], model: nn.Module) -> None:
    """Reject callbacks whose results cannot be read on a model.

    Raises:
        NotFittedError: A callback is not fitted, or was fitted on other weights.
        InputError: The module carries the results itself, or an element is not a fitted callback.
    """
    if after and is_uncertainty_module(model):
        raise InputError(
            f"`after` is not needed for a {type(model).__name__}, whose predictions carry the earlier fits. Leave it out."
        )
    for one in after:
        if not isinstance(one, PostTrainingCallback):
            raise InputError(f"`after` must hold fitted callbacks, but it holds a {type(one).__name__}.")
        one.check_fitted(model)


def check_read(callbacks: Sequence[object]) -> None:
    """Reject callbacks to be applied together if one was fitted without reading another's result, or with a missing result.

    Raises:
        InputError: A callback on held-out rows was fitted with a calibration or density that is missing here, or without one that is present.
    """
    ours = [one for one in callbacks if isinstance(one, PostTrainingCallback)]
    densities = [one for one in ours if isinstance(one, FeatureCallback)]
    calibrations = [one for one in ours if one.recalibrates]
    for one in ours:
        if one.recalibrates or isinstance(one.fitting_data, TrainingData):
            continue
        state, name = one.state_dict()["tensors"], type(one).__name__
        score, has_read = state.get("score_name"), Carried(name, state).has_calibration
        of_features, by_default = score in DENSITY_FIELDS, score is not None and one.settings.get("score") is None
        if of_features and not densities:
            raise InputError(
                f"{name} was fitted to the score of a density or distance, such as FitGMM's. Pass that callback too."
            )
        if not of_features and has_read and not calibrations:
            raise InputError(
                f"{name} was fitted to calibrated predictions. Pass the callback that calibrates them too."
            )
        unread = [
            *(densities if by_default and not of_features else []),
            *([] if has_read or of_features else calibrations),
        ]
        if unread:
            raise InputError(
                f"{name} was fitted to predictions without the result of {type(unread[0]).__name__}, so they cannot be combined. Fit it "
                f"again with `fit(model, loader, after=[...])` including the {type(unread[0]).__name__}, or leave one of them out."
            )


def earlier_callbacks(callback: PostTrainingCallback, trainer: Trainer | None) -> list[PostTrainingCallback]:
    """The callbacks whose results ``callback`` reads: the earlier ones, except those of its own kind, of which a prediction carries one.

    Callbacks that leave a foreign module's predictions alone count only if ``callback`` leaves them alone too, and those that read other
    outputs of it, such as another head, do not count.
    """
    if trainer is None:
        return list(getattr(callback, "after", ()))
    ours = post_training_callbacks(trainer)
    before = ours[: ours.index(callback)] if callback in ours else []
    before = [one for one in before if type(one) is not type(callback) and (one.attach or not callback.attach)]
    is_own = is_uncertainty_module(trainer.lightning_module)
    return before if is_own else [one for one in before if reads_alike(callback, one)]


def reads_alike(callback: PostTrainingCallback, other: PostTrainingCallback) -> bool:
    """Whether the result of ``other`` belongs to the outputs of a foreign module that ``callback`` reads. A density belongs to all outputs."""
    is_density = isinstance(other, FeatureCallback) and not other.recalibrates
    return is_density or difference_of_readings(callback.logits, other.logits) is None


def transforms_before(
    callback: PostTrainingCallback, model: nn.Module, trainer: Trainer | None
) -> list[PredictionTransform]:
    """The transforms that change predictions before ``callback`` reads them."""
    attached = transforms_of(model)
    if attached is not None:
        ours = [] if trainer is None else post_training_callbacks(trainer)
        later = ours[ours.index(callback) :] if callback in ours else []
        alike = [one for one in ours if type(one) is type(callback)]
        return attached.before(callback.state_key, model, {one.state_key for one in (*later, *alike)})
    found = [one.transform() for one in earlier_callbacks(callback, trainer) if one.fitted]
    return [one for one in found if one is not None and not one.is_last]

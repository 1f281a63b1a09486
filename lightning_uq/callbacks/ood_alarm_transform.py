"""The transform that adds an alarm to predictions: a score, its p-value, and whether it exceeds a threshold."""

from typing import Literal

import torch
from torch import Tensor

from lightning_uq.callbacks.carried import Carried
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.conformal_p_values import p_values_among
from lightning_uq.functional.precision import widen
from lightning_uq.predictions import Prediction
from lightning_uq.predictions.base import DENSITY_FIELDS
from lightning_uq.running.transforms import PredictionTransform

ROUNDING = 1e-6
"""Scores with a smaller relative difference count as equal, because the last digits of float32 vary."""

MapReduction = Literal["mean", "max"]
"""How to reduce a map of scores to one score."""


class OODAlarmTransform(PredictionTransform):
    """Adds score, p-value and alarm to predictions.

    Args:
        score_name: Name of the predictions' score.
        map_reduction: See :class:`OODAlarm`.
        scores: The scores of the held-out rows [n], ascending.
        threshold: The score above which there is an alarm.
        carried: The calibrations that a prediction must carry.
        summary: The summary of the fitted feature score, if that is tested.
    """

    kind = "OOD alarm"
    is_last = True
    reads_scores = True

    def __init__(
        self,
        score_name: str,
        map_reduction: MapReduction,
        scores: Tensor,
        threshold: Tensor,
        carried: Carried,
        summary: Tensor | None = None,
    ) -> None:
        self.score_name = score_name
        self.map_reduction: MapReduction = map_reduction
        self.scores = scores
        self.threshold = threshold
        self.carried = carried
        self.summary = summary

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction with score, p-value and alarm."""
        check_prediction(prediction)
        score = input_scores(prediction, self.score_name, self.map_reduction)
        if self.score_name not in DENSITY_FIELDS:  # calibrations do not change density fields
            self.carried.check(prediction)
        self._check_score(prediction)
        if self.scores.device != score.device:
            self.scores = self.scores.to(score.device)
        lowered, infinite = _lowered(score), score.isposinf()
        summary = prediction._get("score_summary") if self.score_name == "ood_score" else None
        return prediction.replace(
            ood_score=score,
            score_summary=summary,  # None, if another score is tested
            ood_p_value=torch.where(infinite, 0.0, p_values_among(lowered, self.scores)),
            ood_alarm=(lowered > self.threshold.to(lowered)) | infinite,
        )

    def _check_score(self, prediction: Prediction) -> None:
        found = summary_of(prediction, self.score_name)
        if self.summary is None:
            return
        if found is None:
            if self.score_name == "ood_score" and prediction.has("ood_p_value") and prediction.num_indices is not None:
                raise InputError(
                    "This prediction carries the result of another alarm, which replaced the `ood_score` that OODAlarm was fitted to. Pass "
                    "the prediction without that result."
                )
            return
        if found.shape != self.summary.shape or not torch.allclose(found.cpu(), self.summary, rtol=1e-3, atol=1e-6):
            raise InputError(
                f"OODAlarm was fitted to the `{self.score_name}` of another density or distance than this prediction's. Fit the alarm again."
            )


def check_prediction(prediction: object) -> None:
    """Reject anything but a prediction. For scores in an array, the functional API suffices."""
    if not isinstance(prediction, Prediction):
        raise InputError(
            f"`prediction` must be a prediction, such as `model.predict(x)`, but it is a {type(prediction).__name__}. For scores without a model, use "
            "`conformal_p_values`, `alarm_threshold` and `benjamini_hochberg` of `lightning_uq.functional`."
        )


def _lowered(score: Tensor) -> Tensor:
    """Scores lowered by a relative margin, so that differences in the last digits do not count. An ensemble's votes differ that much between precisions, devices and graphs."""
    wide = widen(score)
    return wide * (1 - ROUNDING * wide.sign())


def summary_of(prediction: Prediction, name: str) -> Tensor | None:
    """The summary that identifies the fitted feature score; None if another score is tested."""
    if name not in DENSITY_FIELDS or not prediction.has("score_summary"):
        return None
    return prediction.score_summary


def input_scores(prediction: Prediction, name: str, map_reduction: MapReduction) -> Tensor:
    """One score [B] per input; plus infinity if it is NaN."""
    try:
        score = prediction.score(name)
    except NotFittedError as error:
        raise NotFittedError(
            f"OODAlarm tests `{name}`, which this prediction lacks. {error} Put the callback whose score it was fitted to, such as FitGMM, before it, "
            "with `attach=True` if OODAlarm has it."
        ) from error
    if score.ndim == 1:
        return score
    flat = score.flatten(1)
    return flat.amax(1) if map_reduction == "max" else flat.mean(1)

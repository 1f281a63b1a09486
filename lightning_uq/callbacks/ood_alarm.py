"""An alarm for out-of-distribution inputs with a guaranteed rate of false alarms, for any LightningModule."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import Self

from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.callbacks.ood_alarm_transform import (
    MapReduction,
    OODAlarmTransform,
    check_prediction,
    input_scores,
    summary_of,
)
from lightning_uq.callbacks.post_training import post_training_callbacks
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.errors import InputError, without_period
from lightning_uq.functional.conformal_p_values import alarm_threshold, benjamini_hochberg
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_choice, check_open_unit
from lightning_uq.guessing import report_guess
from lightning_uq.json_text import read_json
from lightning_uq.metrics import OODAlarmRate
from lightning_uq.predictions import Prediction
from lightning_uq.tasks import Task

MAX_SCORES = 2**16
"""Default number of rows to keep. Their scores take 512 kB, and p-values are at least 1 / 65,537."""

_VERSION = 1

_ROWS_TO_SHARE = 1000
"""From this number of held-out rows on, a density may be fitted to the same rows: the alarm rate is then 5.1 % instead of 5 %."""


class OODAlarm(HeldOutCallback):
    """Gives each input a p-value and an alarm, which at most a share ``false_alarm_rate`` of in-distribution inputs raises.

    The alarm is fitted to the scores of held-out in-distribution rows, by default the validation data; it needs no labels. The rows must be exchangeable with later in-distribution rows, and neither
    the network nor the density may be fitted to them. A temperature may be, and so may the tails of :class:`FitGMM` and :class:`FitKNN` with at least 1,000 rows. For an
    in-distribution input, P(p <= alpha) <= alpha for every alpha, over draws of the held-out rows and the input. The share of unknown inputs with an alarm depends on the score.

    Predictions carry ``ood_score`` [B] (the tested score, which replaces any other), ``ood_p_value`` [B], and ``ood_alarm``, bool [B]. An input that is not finite has a p-value of
    0 and raises an alarm. Scores that differ by less than one part in a million count as equal. A test logs ``uq/test_ood_alarm_rate``, which is about ``false_alarm_rate`` if the test set is in distribution.
    Callbacks that fit a density or a calibration must stand before this one.

    Args:
        score: Name of the score of predictions; higher is further out of distribution. None: the ``ood_score`` of the density, if an earlier callback fits one, or else the default score
            of the task. Both were chosen before seeing any data.
        false_alarm_rate: Share of in-distribution inputs that may raise an alarm, in (0, 1).
        delta: None: the rate holds on average over draws of the held-out rows. A number in (0, 1), such as 0.1: the rate holds for these held-out rows with a probability of
            1 - delta over their draw, so the threshold is higher.
        map_reduction: How a map of scores [B, *P] becomes one score per input: ``"mean"`` or ``"max"`` over its positions.
        max_rows: The largest number of rows to keep. If there are more, a random sample is kept.
        fitting: Arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``, ``unpack_batch``, ``output``,
            ``task``, ``attach`` and ``nonfinite``.

    Raises:
        InputError: An argument is invalid, or predictions have no such score.

    Source: Bates, Candes, Lei, Romano & Sesia, "Testing for outliers with conformal p-values", Annals of Statistics 51 (2023); Vovk, ACML 2012, for ``delta``.

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> draw = torch.Generator().manual_seed(0)
        >>> held_out = CategoricalPrediction(3 * torch.randn(1, 999, 5, generator=draw))
        >>> alarm = OODAlarm(score="predictive_entropy", false_alarm_rate=0.05).fit_predictions(held_out)
        >>> unsure = CategoricalPrediction(torch.tensor([[[9.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]]))
        >>> alarm.change(unsure).ood_p_value, alarm.change(unsure).ood_alarm
        (tensor([0.9940, 0.0010], dtype=torch.float64), tensor([False,  True]))
    """

    needs_targets = False
    per_sample = True
    own_arguments = ("score", "false_alarm_rate", "delta", "map_reduction")

    def __init__(
        self,
        *,
        score: str | None = None,
        false_alarm_rate: float = 0.05,
        delta: float | None = None,
        map_reduction: MapReduction = "mean",
        max_rows: int | None = MAX_SCORES,
        **fitting: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, **fitting)
        check_open_unit("false_alarm_rate", false_alarm_rate)
        if delta is not None:
            check_open_unit("delta", delta)
        check_choice("map_reduction", map_reduction, ("mean", "max"))
        if score is not None and not isinstance(score, str):
            raise InputError(f"`score` must be the name of a score or None, but its type is {type(score).__name__}.")
        self.score = score
        self.false_alarm_rate = false_alarm_rate
        self.delta = delta
        self.map_reduction: MapReduction = map_reduction
        self._task_score: str | None = None
        self._score_name: str | None = None
        self._summary: Tensor | None = None  # of the feature score, if that is tested

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, **{name: getattr(self, name) for name in self.own_arguments}}

    can_continue = False  # the name of the score is only known from a batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a later density, whose score would not be tested."""
        super().setup(trainer, pl_module, stage)
        ours = post_training_callbacks(trainer)
        later = [one for one in ours[ours.index(self) :] if isinstance(one, FeatureCallback)]
        if later and self.score in (None, "ood_score"):
            raise InputError(
                f"OODAlarm stands before {type(later[0]).__name__} in the Trainer's callbacks, so it would not test its score. Swap them, or pass the "
                "name of another `score`."
            )

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """The scores of the held-out rows; a message names a score that was chosen by default."""
        found = super().fit_tensors(model, loader, trainer)
        if self.score is None:
            report_guess(
                f"OODAlarm tests the score {found['score_name']!r} of predictions. Pass `score` to test another one.",
                model,
            )
        return found

    def check_task(self, task: Task) -> None:
        """Note the task's default score."""
        self._task_score = task.ood_score

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The score of each input [B]."""
        self._score_name = name = self._name_of(prediction)
        self._summary = summary_of(prediction, name)
        try:
            return (input_scores(prediction, name, self.map_reduction),)
        except InputError as error:
            raise InputError(
                f"OODAlarm finds no score {name!r}: {error} Put a density, such as FitGMM, before OODAlarm, or pass another `score`."
            ) from error

    def _name_of(self, prediction: Prediction) -> str:
        if self.score is not None:
            return self.score
        if prediction.has("ood_score"):
            if prediction.has("ood_p_value") and not prediction.has("score_summary"):
                raise InputError(
                    "`prediction` carries the result of another alarm, which replaced its `ood_score`. Pass the name of a `score`, or predictions "
                    "without that result."
                )
            return "ood_score"
        if self._task_score is None:
            raise InputError(
                f"`score` is needed to fit predictions in memory that have no `ood_score`. The scores of a {type(prediction).__name__} are "
                f"{', '.join(prediction.score_names) or 'none'}."
            )
        return self._task_score

    def fit_predictions(self, prediction: Prediction, target: Tensor | None = None, **values: Tensor) -> Self:
        """Fit predictions of held-out in-distribution rows from memory, and return the callback.

        Args:
            prediction: The predictions, calibrated like later ones.
            target: Ignored, since the alarm needs no targets.
            values: Not used.

        Raises:
            InputError: The predictions have no such score, or there are none.
        """
        check_prediction(prediction)
        self._task_score = None
        return super().fit_predictions(prediction, torch.zeros(len(prediction)) if target is None else target, **values)

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The scores in ascending order, and the threshold."""
        scores = to_float64(rows[0]).sort().values
        num_bad = int((~scores.isfinite()).sum())
        if num_bad:
            raise InputError(
                f"{self._where} must have finite scores, but {num_bad} of {len(scores)} scores {self._score_name!r} are infinite or NaN. Check "
                "the network's outputs for overflow, or pass another `score`."
            )
        threshold = alarm_threshold(scores, self.false_alarm_rate, self.delta)
        if bool(threshold.isposinf()):
            rate, delta = self.false_alarm_rate, self.delta
            needed = math.ceil(round(1 / rate - 1, 9) if delta is None else math.log(delta) / math.log1p(-rate))
            rank_zero_warn(
                f"OODAlarm raises no alarms for finite inputs: {len(scores)} held-out rows are too few for false_alarm_rate={rate:g}"
                f"{'' if delta is None else f' with delta={delta:g}'}, which needs at least {needed}. Fit more rows, or allow more false alarms."
            )
        if self._summary is not None and _fits_tails_of(scores) and len(scores) < _ROWS_TO_SHARE:
            rank_zero_warn(
                f"OODAlarm and the density before it were fitted to the same {len(scores)} held-out rows, so somewhat more in-distribution inputs than "
                f"false_alarm_rate={self.false_alarm_rate:g} will raise an alarm (about 5.8 % instead of 5 % with 100 rows, 5.3 % with 300). Pass other rows as "
                f"`dataloader` of OODAlarm or as `held_out` of the density, or use at least {_ROWS_TO_SHARE:,} rows."
            )
        summary = {} if self._summary is None else {"summary": self._summary}
        return {"scores": scores, "threshold": threshold, "score_name": self._score_name, **summary}

    @property
    def threshold(self) -> Tensor:
        """The score above which an input raises an alarm.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["threshold"]
        return found

    @property
    def scores(self) -> Tensor:
        """The scores of the held-out rows [n], ascending, in float64.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        found: Tensor = self.state["scores"]
        return found

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The threshold."""
        return {"ood_alarm_threshold": float(self.threshold)}

    def transform(self) -> "OODAlarmTransform":
        """The transform that adds score, p-value and alarm to predictions."""
        state = self.state
        return OODAlarmTransform(
            state["score_name"], self.map_reduction, self.scores, self.threshold, self.carried(), state.get("summary")
        )

    def discoveries(self, prediction: Prediction, false_discovery_rate: float = 0.1) -> Tensor:
        """The out-of-distribution inputs of a batch, bool [B]. On average, at most ``false_discovery_rate`` of them are in distribution.

        This is the procedure of Benjamini and Hochberg on the batch's p-values. The number n of held-out rows limits it: the smallest p-value is 1 / (n + 1).

        Args:
            prediction: The predictions of the batch, with or without the alarm's result.
            false_discovery_rate: In (0, 1).

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction has no such score, or other calibrations than the fitted ones.
        """
        check_prediction(prediction)
        changed = prediction if prediction.has("ood_p_value") else self.change(prediction)
        return benjamini_hochberg(changed.ood_p_value, false_discovery_rate)

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The share of inputs with an alarm."""
        return {"ood_alarm_rate": OODAlarmRate(validate_args=False)}

    # ------------------------------------------------------------------ files and JSON

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str | None = None) -> Self:
        """The alarm from a ``-uq.ckpt``, without the model. Its :meth:`change` and :meth:`discoveries` work, and :class:`DriftMonitor` accepts it.

        Args:
            path: The file, loaded with ``weights_only=True``.
            name: The ``name`` of the alarm, if the file holds several.

        Raises:
            InputError: The file cannot be read, or does not hold exactly one such alarm.
        """
        states = {key: one for key, one in fitted_states(path).items() if key.partition("{")[0] == cls.__qualname__}
        found = [key for key in states if name is None or key == cls(name=name).state_key]
        if len(found) != 1:
            raise InputError(
                f"{path} must hold exactly one alarm{'' if name is None else f' with name {name!r}'}, but it holds {list(states) or 'none'}."
            )
        return cls.of_state(states[found[0]])

    def to_json(self) -> str:
        """The fitted alarm as JSON, without the weights, for a service that has scores or predictions but no checkpoint.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        carried = self.carried().tensors
        content = {
            "format": "lightning_uq.OODAlarm",
            "version": _VERSION,
            **{name: getattr(self, name) for name in self.own_arguments},
            "score_name": self.state["score_name"],
            "threshold": float(self.threshold) if bool(self.threshold.isfinite()) else None,
            "carried": {name: tensor.tolist() for name, tensor in carried.items()},
            "summary": self.state["summary"].tolist() if "summary" in self.state else None,
            "scores": self.scores.tolist(),
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The alarm that :meth:`to_json` wrote. Its :meth:`change` and :meth:`discoveries` work for predictions of the same model.

        Raises:
            InputError: The text is not an alarm, or a later version wrote it.

        Example:
            >>> from lightning_uq.predictions import CategoricalPrediction
            >>> prediction = CategoricalPrediction(torch.randn(1, 99, 3))
            >>> alarm = OODAlarm(score="predictive_entropy").fit_predictions(prediction)
            >>> OODAlarm.from_json(alarm.to_json()).threshold == alarm.threshold
            tensor(True)
        """
        content = read_json(text, "lightning_uq.OODAlarm", _VERSION)
        try:
            alarm = cls(**{name: content[name] for name in cls.own_arguments})
            scores = torch.tensor(content["scores"], dtype=torch.float64)
            threshold = math.inf if content["threshold"] is None else content["threshold"]
            carried = {f"carried.{name}": torch.tensor(value) for name, value in content["carried"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"`text` is damaged: {type(error).__name__}: {without_period(error)}.") from error
        tensors = {"scores": scores, "threshold": torch.tensor(threshold, dtype=torch.float64), **carried}
        if content["summary"] is not None:
            tensors["summary"] = torch.tensor(content["summary"], dtype=torch.float64)
        alarm._set({**tensors, "score_name": content["score_name"]}, None)
        return alarm


def _fits_tails_of(scores: Tensor) -> bool:
    """Whether the tails of a density were fitted to the same rows as these ascending scores: the highest then has a tail of 1 / (n + 1)."""
    return bool((scores[-1] - math.log1p(len(scores))).abs() < 1e-4)

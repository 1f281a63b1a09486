"""Sets of classes with a guaranteed coverage, for any LightningModule that classifies."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.callbacks.carried import Carried
from lightning_uq.callbacks.conformal_stream import ConformalStream
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.logged_metrics import When
from lightning_uq.errors import InputError
from lightning_uq.functional.conformal_sets import (
    aps_scores,
    lac_scores,
    prediction_sets,
    raps_scores,
)
from lightning_uq.functional.hashing import rows_to_uniform
from lightning_uq.functional.held_out_scores import HeldOutScores, rows_needed
from lightning_uq.functional.validation import (
    check_at_least,
    check_bool,
    check_choice,
    check_integer,
    check_open_unit,
    one_per_row,
)
from lightning_uq.functional.waiting import is_free
from lightning_uq.metrics import ConformalCoverage, ConformalSize
from lightning_uq.predictions import ClassProbabilities, Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task, describe

SetMethod = Literal["lac", "aps", "raps"]


class ConformalSets(HeldOutCallback):
    """Sets that contain the true class with a probability of at least 1 - alpha, for any LightningModule that classifies.

    Split conformal prediction: the threshold is an exact order statistic of the scores of the validation rows of all ranks. The coverage
    holds for any network, if the validation rows are exchangeable with later rows and the network was not fitted to them. It is an average
    over all rows; with ``by_class`` it also holds within each class.

    Predictions carry ``prediction_set`` [B, C, ...] and ``set_size``. A test logs ``uq/test_coverage`` and ``uq/test_set_size``.
    Callbacks that change probabilities, such as :class:`TemperatureScaling`, must stand before this one. In a map, each position has a set, and
    the coverage is an average over all positions. An input that is not finite gets the set of all classes.

    Args:
        alpha: Share of rows whose set may lack the true class, in (0, 1).
        method: ``"lac"``: all classes whose probability exceeds a threshold, which gives the smallest sets on average. ``"aps"``: the most probable
            classes up to a sum of probabilities, so harder rows get larger sets. ``"raps"``: like "aps", with a penalty on
            large sets.
        by_class: Whether each class has a threshold of its own (Mondrian). A class with fewer than 1 / alpha - 1 fitted rows is in every set.
        randomized: For "aps" and "raps": whether the last class of a set is kept at random. Without it, sets are too large. The
            draw is a function of the row's probabilities, so a row has the same draw, up to rounding, in any batch and on any rank.
        allow_empty: Whether a set may be empty. If not, an empty set gets its most probable class, so the coverage exceeds 1 - alpha if
            the accuracy does.
        penalty: For "raps": the penalty of each class beyond the first ``k_reg``.
        k_reg: For "raps": see ``penalty``.
        density_ratio: For a known covariate shift: ``density_ratio(x) -> [B]`` returns the density of later inputs divided by that of the validation
            inputs, up to a constant factor. Each row then has its own threshold.
        fitting: ``max_rows`` (2^17 by default), and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``,
            ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: An argument is invalid.

    Source: Sadinle et al., JASA 114 (2019), for "lac"; Romano et al., NeurIPS 2020 (arXiv 2006.02544), for "aps"; Angelopoulos et al., ICLR
    2021 (arXiv 2009.14193), for "raps"; Tibshirani et al., NeurIPS 2019 (arXiv 1904.06019), for the weights.

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(1, 2000, 5, generator=generator)
        >>> prediction = CategoricalPrediction(logits)
        >>> target = torch.multinomial(prediction.probs, 1, generator=generator).squeeze(1)
        >>> conformal = ConformalSets(alpha=0.1).fit_predictions(prediction[:1000], target[:1000])
        >>> covered = conformal.sets(prediction[1000:])[torch.arange(1000), target[1000:]]
        >>> round(float(covered.double().mean()), 1)
        0.9
    """

    own_arguments = ("alpha", "method", "by_class", "randomized", "allow_empty", "penalty", "k_reg")

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        method: SetMethod = "lac",
        by_class: bool = False,
        randomized: bool = False,
        allow_empty: bool = True,
        penalty: float = 0.01,
        k_reg: int = 5,
        density_ratio: Callable[[Any], Tensor] | None = None,
        max_rows: int | None = 2**17,
        **fitting: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, **fitting)
        check_open_unit("alpha", alpha)
        check_choice("method", method, ("lac", "aps", "raps"))
        for name, value in (("by_class", by_class), ("randomized", randomized), ("allow_empty", allow_empty)):
            check_bool(name, value)
        if randomized and method == "lac":
            raise InputError("`randomized` needs method='aps' or 'raps', but `method` is 'lac'.")
        if by_class and density_ratio is not None:
            raise InputError("`by_class` and `density_ratio` cannot be combined. Pass one of them.")
        check_at_least("penalty", penalty, 0.0)
        check_integer("k_reg", k_reg, 0)
        self.alpha = alpha
        self.by_class = by_class
        self.allow_empty = allow_empty
        self.density_ratio = density_ratio
        self.scores = SetScores(method, randomized, penalty, k_reg)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on, without ``alpha`` and ``allow_empty``, which only affect how it is used."""
        own = {**self.scores.settings, "by_class": self.by_class, "density_ratio": self.density_ratio is not None}
        return {**super().settings, **own}

    # ------------------------------------------------------------------ fitting

    def check_task(self, task: Task) -> None:
        """Reject a task without classes."""
        if not task.has_classes:
            raise InputError(
                f"ConformalSets makes sets of classes, but {describe(task)} has no classes. Use ConformalIntervals for numbers, or "
                "ConformalRiskControl for several labels."
            )

    def input_functions(self) -> Mapping[str, Callable[[Any], Tensor]]:
        """The function for density ratios."""
        return {} if self.density_ratio is None else {"weights": self.density_ratio}

    value_names = ("weights", "uniforms")

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The score of each row's true class [N], that class, the number of classes, and the weight.

        Args:
            prediction: Predictions of classes [N, C].
            target: Class indices [N].
            values: ``weights``, the density ratios [N]; ``uniforms``, the draws [N] in [0, 1] for ``randomized``, by default computed from the
                rows' probabilities.
        """
        _check_kind(prediction)
        if prediction.map_shape:
            raise InputError(
                "`prediction` must hold one row per label, but it holds maps. Pass `prediction.as_rows()`."
            )
        log_probs = prediction.log_probs
        own = self.scores(log_probs, values.get("uniforms"), target.to(log_probs.device))
        number = torch.full_like(target, log_probs.shape[1])
        weights = [one_per_row("weights", values["weights"], len(own))] if "weights" in values else []
        HeldOutScores(own, target if self.by_class else None, *weights)  # raises if they do not match
        return (own, target.long(), number.long(), *weights)

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The scores of all rows, which determine the threshold for any ``alpha``."""
        scores, labels, number, *weights = rows
        num_classes = int(number.max())
        if self.by_class:
            counts = labels.bincount(minlength=num_classes)
            few = [c for c in range(num_classes) if counts[c] < rows_needed(self.alpha)]
            if few:
                rank_zero_warn(
                    f"ConformalSets puts classes {few} into every set: alpha={self.alpha:g} needs {rows_needed(self.alpha)} rows per class."
                )
        elif len(scores) < rows_needed(self.alpha):
            rank_zero_warn(
                f"ConformalSets gives sets with all classes: alpha={self.alpha:g} needs {rows_needed(self.alpha)} rows, but there are {len(scores)}."
            )
        if weights and not bool(weights[0].any()):
            raise InputError("`density_ratio` must be positive for some of the fitted rows, but it is 0 for all.")
        groups = {"groups": labels} if self.by_class else {}
        used = {"num_classes": num_classes, "alpha": self.alpha, "allow_empty": self.allow_empty}
        return {"scores": scores, **used, **groups, **({"weights": weights[0]} if weights else {})}

    @property
    def held_out(self) -> HeldOutScores:
        """The scores of the fitted rows.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return HeldOutScores(self.state["scores"], self.state.get("groups"), self.state.get("weights"))

    @property
    def threshold(self) -> Tensor:
        """The threshold of scores in float64: a scalar, or [C] with ``by_class``. The scores of "lac" are log((1 - p) / p).

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: With ``density_ratio``, there is no single threshold, since each row has its own.
        """
        return self.transform().threshold(self.alpha, None)

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The threshold, if all rows share it."""
        one = not self.by_class and self.density_ratio is None
        return {"set_threshold": float(self.threshold)} if one else {}

    # ------------------------------------------------------------------ predictions

    def transform(self) -> "SetTransform":
        """The transform that adds sets to predictions."""
        return SetTransform(
            self.scores,
            self.held_out,
            self.state["num_classes"],
            self.alpha,
            self.allow_empty,
            self.density_ratio,
            self.carried(),
        )

    def sets(
        self,
        prediction: Prediction,
        *,
        alpha: float | None = None,
        weights: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> Tensor:
        """The sets of predictions, bool [B, C, ...].

        Args:
            prediction: Predictions of classes, calibrated like those that were fitted.
            alpha: A level other than the callback's.
            weights: Density ratios [B] of the rows, with ``density_ratio``.
            uniforms: The draws [B] in [0, 1] for ``randomized``.

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction is of another kind, or has another calibration.
        """
        return self.transform().sets(prediction, self.alpha if alpha is None else alpha, weights, uniforms)

    def stream(self, step_size: float = 0.005, window: int | None = None) -> ConformalStream:
        """Sets for a stream whose distribution may drift: see :class:`ConformalStream`."""
        return ConformalStream(self, step_size, window)

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The coverage and the mean size of the sets."""
        return {"coverage": ConformalCoverage(validate_args=False), "set_size": ConformalSize(validate_args=False)}


class SetScores:
    """The nonconformity scores of all classes.

    Args:
        method: "lac", "aps" or "raps".
        randomized: Whether "aps" and "raps" keep the last class at random.
        penalty: See :class:`ConformalSets`.
        k_reg: Likewise.
    """

    def __init__(self, method: SetMethod, randomized: bool, penalty: float, k_reg: int) -> None:
        self.method = method
        self.randomized = randomized
        self.penalty = penalty
        self.k_reg = k_reg

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments as plain data."""
        return dict(vars(self)) if self.method == "raps" else {"method": self.method, "randomized": self.randomized}

    def __call__(
        self,
        log_probs: Tensor,
        uniforms: Tensor | None = None,
        target: Tensor | None = None,
        *,
        validate: bool = True,
    ) -> Tensor:
        """The scores [N, C] of log-probabilities [N, C], or those of the labels [N], in float64; ``uniforms`` [N] replaces the draws."""
        if self.method == "lac":
            return lac_scores(log_probs, target, validate=validate)
        if self.randomized and uniforms is None:
            uniforms = rows_to_uniform(log_probs)
        if self.method == "aps":
            return aps_scores(log_probs, uniforms, target, validate=validate)
        return raps_scores(log_probs, self.penalty, self.k_reg, uniforms, target, validate=validate)


class SetTransform(PredictionTransform):
    """Adds prediction sets.

    Args:
        scores: How classes are scored.
        held_out: The scores of the fitted rows.
        num_classes: C.
        alpha: See :class:`ConformalSets`.
        allow_empty: Likewise.
        density_ratio: Likewise.
        carried: The calibrations that a prediction must carry.
    """

    kind = "set"
    is_last = True

    def __init__(
        self,
        scores: SetScores,
        held_out: HeldOutScores,
        num_classes: int,
        alpha: float,
        allow_empty: bool,
        density_ratio: Callable[[Any], Tensor] | None,
        carried: Carried,
    ) -> None:
        self.scores = scores
        self.held_out = held_out
        self.num_classes = num_classes
        self.alpha = alpha
        self.allow_empty = allow_empty
        self.density_ratio = density_ratio
        self.carried = carried
        self.weights: Tensor | None = None  # the density ratios [B] of the current rows
        if density_ratio is None:
            self.threshold(alpha, None)  # cached now: a graph cannot sort the fitted rows

    def of_input(self, x: Any) -> PredictionTransform:
        """The transform with the density ratios of an input."""
        if self.density_ratio is None:
            return self
        own = copy.copy(self)
        own.weights = self.density_ratio(x)
        return own

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction with its sets, or unchanged if the density ratios of its input are unknown."""
        if self.density_ratio is not None and self.weights is None:
            return prediction
        return prediction.replace(**self.at(prediction, self.alpha))

    def at(self, prediction: Prediction, alpha: float) -> dict[str, Tensor]:
        """The tensor that a prediction carries at level ``alpha``."""
        return {"prediction_set": self.sets(prediction, alpha, self.weights, None)}

    def use(self, held_out: HeldOutScores) -> None:
        """Continue with other scores."""
        self.held_out = held_out

    def threshold(self, alpha: float, weights: Tensor | None) -> Tensor:
        """The threshold: a scalar, [C] for classes, or [B, 1] for weighted rows."""
        if weights is not None:
            return self.held_out.threshold(alpha, weights=weights).unsqueeze(1)
        by_class = self.held_out.groups is not None
        return self.held_out.of_groups(alpha, self.num_classes) if by_class else self.held_out.threshold(alpha)

    def sets(self, prediction: Any, alpha: float, weights: Tensor | None, uniforms: Tensor | None) -> Tensor:
        """See :meth:`ConformalSets.sets`."""
        _check_kind(prediction)
        self.carried.check(prediction)
        log_probs: Tensor = prediction.log_probs
        if log_probs.shape[1] != self.num_classes:
            raise InputError(
                f"`prediction` must have {self.num_classes} classes like the fitted rows, but it has {log_probs.shape[1]}."
            )
        rows = log_probs.movedim(1, -1).flatten(0, -2)
        if weights is not None:
            one_per_row("weights", weights, len(rows))
        bad = ~rows.amax(1).isfinite()
        validate = is_free(rows) or uniforms is not None or weights is not None
        scores = self.scores(torch.where(bad[:, None], 0.0, rows), uniforms, validate=validate)
        found = prediction_sets(scores, self.threshold(alpha, weights).to(scores), self.allow_empty, validate=validate)
        sets = found | bad[:, None].to(found.device)
        shape = (*log_probs.shape[:1], *log_probs.shape[2:], log_probs.shape[1])
        return sets.reshape(shape).movedim(-1, 1).to(log_probs.device)


def _check_kind(prediction: Any) -> None:
    if not isinstance(prediction, ClassProbabilities):
        raise InputError(f"`prediction` must predict classes, but it is a {type(prediction).__name__}.")

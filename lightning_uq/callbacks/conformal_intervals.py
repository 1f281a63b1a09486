"""Prediction intervals with a guaranteed coverage, for any LightningModule that predicts numbers."""

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
from lightning_uq.functional.conformal_intervals import conformal_interval, interval_excess
from lightning_uq.functional.held_out_scores import HeldOutScores, rows_needed
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.functional.targets import aligned_target, known_targets
from lightning_uq.functional.validation import check_bool, check_choice, check_open_unit, one_per_row
from lightning_uq.functional.waiting import is_free
from lightning_uq.metrics import ConformalCoverage, ConformalSize
from lightning_uq.predictions import NumberPrediction, Prediction
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task, describe

IntervalMethod = Literal["absolute", "normalized", "cqr"]


class ConformalIntervals(HeldOutCallback):
    """Intervals that contain the target with a probability of at least 1 - alpha, for any LightningModule that predicts numbers.

    Split conformal prediction: the margin is an exact order statistic of the scores of the validation rows of all ranks. The coverage holds
    for any network, if the validation rows are exchangeable with later rows and the network was not fitted to them. It is an average over
    all rows; with ``groups`` it also holds within each group. The fit needs at least 1 / alpha - 1 rows.

    Predictions carry ``conformal_lower`` and ``conformal_upper`` [B, D]. A test logs ``uq/test_coverage`` and ``uq/test_interval_width``.
    Callbacks that change predictions, such as :class:`FitLaplace`, must stand before this one. Each of the D targets, and each step of a horizon
    [B, H, D], has its own margin, unless ``simultaneous`` is set. Missing targets (NaN) are skipped. An input that is not finite gets
    the interval from minus to plus infinity.

    Args:
        alpha: Share of targets that may lie outside the interval, in (0, 1).
        method: ``"absolute"``: |y - mean| (the median, for quantiles), so all intervals have the same width. ``"normalized"``: |y - mean| divided
            by the predicted standard deviation. ``"cqr"``: the distance of y from the predicted interval of level 1 - alpha.
        groups: ``groups(x) -> [B]`` returns the group of each input, an integer from 0. Each group has its own margin; a group without
            fitted rows gets infinite intervals.
        simultaneous: Whether the interval contains all H steps of a horizon at once with that probability. The fit then skips rows with a
            missing step.
        density_ratio: For a known covariate shift: ``density_ratio(x) -> [B]`` returns the density of later inputs divided by that of the
            validation inputs, up to a constant factor. Each row then has its own margin.
        fitting: ``max_rows`` (2^17 by default), and arguments of :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``,
            ``predict_fn``, ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: An argument is invalid.

    Source: Lei et al., JASA 113 (2018) (arXiv 1604.04173); Romano et al., NeurIPS 2019 (arXiv 1905.03222), for "cqr"; Stankeviciute et
    al., NeurIPS 2021, for horizons; Tibshirani et al., NeurIPS 2019 (arXiv 1904.06019), for the weights.

    Example:
        >>> from lightning_uq.predictions import PointPrediction
        >>> prediction = PointPrediction(torch.zeros(1, 19, 1))
        >>> conformal = ConformalIntervals(alpha=0.1).fit_predictions(prediction, torch.arange(1.0, 20.0))
        >>> lower, upper = conformal.intervals(prediction[:1])
        >>> lower.item(), upper.item()
        (-18.0, 18.0)
    """

    own_arguments = ("alpha", "method", "simultaneous")

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        method: IntervalMethod = "absolute",
        groups: Callable[[Any], Tensor] | None = None,
        simultaneous: bool = False,
        density_ratio: Callable[[Any], Tensor] | None = None,
        max_rows: int | None = 2**17,
        **fitting: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, **fitting)
        check_open_unit("alpha", alpha)
        check_choice("method", method, ("absolute", "normalized", "cqr"))
        check_bool("simultaneous", simultaneous)
        if groups is not None and density_ratio is not None:
            raise InputError("`groups` and `density_ratio` cannot be combined. Pass one of them.")
        self.alpha = alpha
        self.method = method
        self.groups = groups
        self.simultaneous = simultaneous
        self.density_ratio = density_ratio

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on; ``alpha`` is one of them only for "cqr", whose scores are distances from the interval of that level."""
        own = {
            "method": self.method,
            "groups": self.groups is not None,
            "simultaneous": self.simultaneous,
            "density_ratio": self.density_ratio is not None,
        }
        return {**super().settings, **own, **({"alpha": self.alpha} if self.method == "cqr" else {})}

    # ------------------------------------------------------------------ fitting

    def check_task(self, task: Task) -> None:
        """Reject a task without numbers."""
        if not task.has_numeric_targets:
            raise InputError(
                f"ConformalIntervals makes intervals of numbers, which {describe(task)} does not predict. Use ConformalSets for classes, or pass "
                "`task`, such as `Regression(head='mean')`, if the targets are numbers."
            )

    def input_functions(self) -> Mapping[str, Callable[[Any], Tensor]]:
        """The functions for groups or density ratios."""
        found = {"groups": self.groups, "weights": self.density_ratio}
        return {name: function for name, function in found.items() if function is not None}

    value_names = ("groups", "weights")

    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """The score of each target [N, ..., D], NaN where missing, and the group or the weight of each row [N].

        Args:
            prediction: Predictions of numbers [N, ..., D].
            target: Targets in that shape.
            values: ``groups`` or ``weights``, the group or the density ratio of each row [N].
        """
        lower, upper, scale = bounds_of(prediction, self.method, self.alpha)
        if prediction.map_shape:
            raise InputError(
                "`prediction` must hold one row per target, but it holds maps. Pass `prediction.as_rows()`."
            )
        value, known = known_targets(aligned_target(target, prediction.target_shape).to(lower.device))
        scores = interval_excess(lower, upper, value, scale)
        scores = torch.where(known.to(scores.device), scores, torch.nan)
        if self.simultaneous:
            if scores.ndim < 3:
                raise InputError(
                    f"`simultaneous` is for the steps of a horizon [B, H, D], but the predictions have shape {list(scores.shape)}."
                )
            scores = scores.flatten(1, -2).amax(1)  # NaN, and therefore skipped, where a step is missing
        given = {name: one_per_row(name, value, len(scores)) for name, value in values.items()}
        if "groups" in given and given["groups"].dtype == torch.bool:
            given["groups"] = given["groups"].long()
        HeldOutScores(scores, given.get("groups"), given.get("weights"))  # raises if they do not match
        return (scores, *given.values())

    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The scores of all rows, which determine the margins."""
        scores, *given = rows
        needed = rows_needed(self.alpha)
        if not bool((~scores.isnan()).any(0).all()):
            raise InputError(
                "`simultaneous` needs rows whose steps are all known, but each row of `target` misses one."
                if self.simultaneous
                else "`target` must hold a known number for each target and step, but one of them is NaN in all rows."
            )
        fewest = int((~scores.isnan()).sum(0).min())
        if fewest < needed:
            rank_zero_warn(
                f"ConformalIntervals gives infinite intervals: alpha={self.alpha:g} needs {needed} rows with a target, but there are {fewest}."
            )
        found: dict[str, Any] = {"scores": scores, "alpha": self.alpha}
        if not given:
            return found
        (values,) = given
        if values.is_floating_point():
            if not bool(values.any()):
                raise InputError("`density_ratio` must be positive for some of the fitted rows, but it is 0 for all.")
            return {**found, "weights": values}
        counts = values.bincount()
        few = ((counts > 0) & (counts < needed)).nonzero().flatten().tolist()
        if few:
            rank_zero_warn(
                f"ConformalIntervals gives groups {few} infinite intervals: alpha={self.alpha:g} needs {needed} rows per group."
            )
        return {**found, "groups": values.long()}

    @property
    def held_out(self) -> HeldOutScores:
        """The scores of the fitted rows.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return HeldOutScores(self.state["scores"], self.state.get("groups"), self.state.get("weights"))

    @property
    def margin(self) -> Tensor:
        """The margin [..., D] of each target in float64; [G, ..., D] with ``groups``.

        Margins are in the target's units, or in standard deviations for "normalized".

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: With ``density_ratio``, there is no single margin, since each row has its own.
        """
        held_out = self.held_out
        return held_out.threshold(self.alpha) if held_out.groups is None else held_out.of_groups(self.alpha)

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The mean margin over targets and steps, if all rows share it."""
        one = self.groups is None and self.density_ratio is None
        return {"interval_margin": float(self.margin.mean())} if one else {}

    # ------------------------------------------------------------------ predictions

    def transform(self) -> "IntervalTransform":
        """The transform that adds intervals to predictions."""
        self._check_level(self.alpha)
        functions = self.input_functions()
        return IntervalTransform(self.method, self.held_out, self.alpha, functions, self.carried())

    def intervals(
        self,
        prediction: Prediction,
        *,
        alpha: float | None = None,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The lower and the upper bound of predictions, each in the shape [B, ..., D] of the targets.

        Args:
            prediction: Predictions of numbers, calibrated like those that were fitted.
            alpha: A level other than the callback's; not available with "cqr".
            groups: The groups [B] of the rows, with ``groups``.
            weights: Their density ratios [B], with ``density_ratio``.

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction is of another kind, or has another calibration.
        """
        alpha = self.alpha if alpha is None else alpha
        self._check_level(alpha)
        return self.transform().intervals(prediction, alpha, groups, weights)

    def _check_level(self, alpha: float) -> None:
        fitted = self.state["alpha"]
        if alpha != fitted and self.method == "cqr":
            raise InputError(
                f"With method='cqr', the fit holds only for alpha={fitted:g}. Fit another callback for alpha={alpha:g}."
            )

    def stream(self, step_size: float = 0.005, window: int | None = None) -> ConformalStream:
        """Intervals for a stream whose distribution may drift: see :class:`ConformalStream`."""
        return ConformalStream(self, step_size, window)

    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The coverage and the mean width of the intervals."""
        covered = ConformalCoverage(self.simultaneous, validate_args=False)
        return {"coverage": covered, "interval_width": ConformalSize(validate_args=False)}


class IntervalTransform(PredictionTransform):
    """Adds conformal intervals.

    Args:
        method: See :class:`ConformalIntervals`.
        held_out: The scores of the fitted rows.
        alpha: See :class:`ConformalIntervals`.
        functions: ``groups`` or ``weights`` of an input, by name.
        carried: The calibrations that a prediction must carry.
    """

    kind = "interval"
    is_last = True

    def __init__(
        self,
        method: IntervalMethod,
        held_out: HeldOutScores,
        alpha: float,
        functions: Mapping[str, Callable[[Any], Tensor]],
        carried: Carried,
    ) -> None:
        self.method = method
        self.held_out = held_out
        self.alpha = alpha
        self.functions = functions
        self.carried = carried
        self.values: Mapping[str, Tensor] | None = None  # values of the functions for the current input
        if held_out.groups is None and held_out.weights is None:
            held_out.threshold(alpha)  # cached now: a graph cannot sort the fitted rows

    def of_input(self, x: Any) -> PredictionTransform:
        """The transform with the groups or density ratios of an input."""
        if not self.functions:
            return self
        own = copy.copy(self)
        own.values = {name: function(x) for name, function in self.functions.items()}
        return own

    def apply(self, prediction: Prediction) -> Prediction:
        """The prediction with its intervals, or unchanged if the groups or density ratios of its input are unknown."""
        if self.functions and self.values is None:
            return prediction
        return prediction.replace(**self.at(prediction, self.alpha, **(self.values or {})))

    def at(self, prediction: Prediction, alpha: float, **values: Tensor) -> dict[str, Tensor]:
        """The tensors that a prediction carries at level ``alpha``."""
        lower, upper = self.intervals(prediction, alpha, **values)
        return {"conformal_lower": lower, "conformal_upper": upper}

    def use(self, held_out: HeldOutScores) -> None:
        """Continue with other scores."""
        self.held_out = held_out

    def intervals(
        self, prediction: Prediction, alpha: float, groups: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`ConformalIntervals.intervals`."""
        lower, upper, scale = bounds_of(prediction, self.method, self.alpha)
        self.carried.check(prediction)
        for name, values in (("groups", groups), ("weights", weights)):
            if values is not None:
                one_per_row(name, values, len(prediction))
        # A row without a valid prediction gets the interval of all numbers.
        bad = ~(lower.isfinite() & upper.isfinite()) if scale is None else ~(lower.isfinite() & scale.isfinite())
        lower, upper = (torch.where(bad, 0.0, bound) for bound in (lower, upper))
        scale = None if scale is None else torch.where(bad, 1.0, scale)
        margin = self._margin(prediction, alpha, groups, weights).to(lower.device, wide_dtype(lower.device))
        low, high = conformal_interval(
            lower, upper, margin, scale, validate=is_free(lower) or groups is not None or weights is not None
        )
        dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
        low, high = torch.where(bad, -torch.inf, low), torch.where(bad, torch.inf, high)
        return _rounded(low, dtype, -torch.inf), _rounded(high, dtype, torch.inf)

    def _margin(self, prediction: Any, alpha: float, groups: Tensor | None, weights: Tensor | None) -> Tensor:
        """The margin in a shape that broadcasts to the targets: [B, ..., D], or [B, D, *P] for maps."""
        margin = self.held_out.threshold(alpha, groups, weights)
        fitted = self.held_out.scores.ndim - 1
        shape = prediction.target_shape
        rows = margin.shape[: margin.ndim - fitted]
        if prediction.map_shape:
            return margin.reshape(*rows, -1, *[1] * len(prediction.map_shape))
        if fitted == 1:  # one margin for all steps
            return margin.reshape(*rows, *[1] * (len(shape) - 2 if rows else 0), -1)
        return margin


def bounds_of(prediction: Any, method: IntervalMethod, alpha: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lower and upper bounds to widen, and the scale of the margin."""
    if not isinstance(prediction, NumberPrediction):
        raise InputError(f"`prediction` must predict numbers, but it is a {type(prediction).__name__}.")
    try:
        if method == "cqr":
            return *prediction.interval(1 - alpha), None
        center = prediction.point
        if method != "normalized":
            return center, center, None
        scale = prediction.variance.sqrt()
        return center, center, scale.clamp_min(torch.finfo(scale.dtype).tiny)  # a variance may be rounded to 0
    except InputError as error:
        raise InputError(f"method={method!r} cannot be used with these predictions. {error}") from error


def _rounded(bound: Tensor, dtype: torch.dtype, outside: float) -> Tensor:
    """A bound in another dtype, rounded outwards, so that it still contains a target that lies on it."""
    rounded = bound.to(dtype)
    if torch.compiler.is_compiling():  # ONNX has no `nextafter`
        return rounded
    moved = (rounded > bound) if outside < 0 else (rounded < bound)
    return torch.where(moved, torch.nextafter(rounded, torch.full_like(rounded, outside)), rounded)

"""The base class of all metrics: its states keep their precision, and it can be plotted."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.functional.precision import move_only, upcast, widen
from lightning_uq.functional.validation import check_bool, check_floating, check_no_nan, classification_rows


class HasProbs(Protocol):
    """A prediction object: any object with pooled probabilities [B, C, ...]."""

    @property
    def probs(self) -> Tensor:
        """Pooled probabilities [B, C, ...]."""


class UncertaintyMetric(Metric):
    """Base class of the metrics, with float64 states that a change of a module's precision does not affect.

    torchmetrics protects a state from ``module.half()``, but not from ``module.to(torch.bfloat16)``, which Lightning calls under
    ``precision="bf16-true"``: a count in bfloat16 stops at 256. Here a state follows only the module's device; ``set_dtype`` still
    converts it. Sums and rows are float64 (float32 on MPS, which has no float64).

    Curves of :meth:`plot` show the state of this process; inside ``with metric.sync_context():`` on every rank, the state of
    all ranks.

    Args:
        validate_args: Whether to check the values of each batch (one pass over the data, and a synchronisation on a GPU). Shapes
            and dtypes are always checked.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    is_differentiable: bool | None = False
    full_state_update: bool | None = False

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_bool("validate_args", validate_args)
        self.validate_args = validate_args
        self._row_dtypes: dict[str, torch.dtype] = {}

    def _add_sum(self, name: str, *shape: int) -> None:
        """Register a state that is summed over batches and ranks.

        Its name must differ by what is summed: a ``MetricCollection`` lets metrics share states that have the same names and, on
        the first batch, the same values.
        """
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_rows(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        """Register a state with one number per row, concatenated over batches and ranks."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._row_dtypes[name] = dtype

    def _append(self, name: str, values: Tensor) -> None:
        dtype = self._row_dtypes[name]
        if not self.is_differentiable:  # stored rows must not keep their graph
            values = values.detach()
        getattr(self, name).append(widen(values) if dtype == torch.float64 else values.to(dtype))

    def _rows(self, name: str) -> Tensor:
        """All rows of a state as one vector, which may be empty."""
        state, dtype = getattr(self, name), self._row_dtypes[name]
        if isinstance(state, Tensor):  # after synchronisation
            state = [state]
        if not state:
            empty = torch.empty(0, device=self.device)
            return widen(empty) if dtype == torch.float64 else empty.to(dtype)
        rows = torch.cat(state)
        return widen(rows) if dtype == torch.float64 else rows.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        convert = self._dtype_convert

        def move(tensor: Tensor) -> Tensor:
            if convert and tensor.is_floating_point():
                return fn(tensor)
            return move_only(fn, tensor)

        return super()._apply(move, exclude_state)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # torchmetrics replaces the rows of a rank without any by float32, which cannot be gathered with another dtype.
        for name in self._row_dtypes:
            setattr(self, name, [self._rows(name)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another metric of the same class, given as the metric or its ``metric_state``."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would keep returning the value computed before

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the metric.

        Args:
            val: One result of ``compute`` or ``forward``, or a list of them, plotted as points. None: the metric's own figure,
                which is a curve if it has one, otherwise its value.
            ax: A matplotlib axis to draw on; None creates a figure.

        Returns:
            The figure and the axis.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise MissingExtraError(
                "Plots need matplotlib, which is not installed: pip install 'lightning-uq[report]'."
            ) from error
        if val is not None:
            return self._plot(val, ax)
        if ax is None:
            _, ax = pyplot.subplots()
        self._draw(ax)
        return ax.get_figure(), ax

    def _draw(self, ax: Any) -> None:
        self._plot(None, ax)

    def _draw_curve(self, ax: Any, x: Tensor, y: Tensor, x_label: str, y_label: str, value: Tensor) -> None:
        ax.plot(x.cpu().numpy(), y.detach().cpu().numpy())
        ax.set(xlabel=x_label, ylabel=y_label, title=f"{type(self).__name__} {float(value):.4f}")


class MeanMetric(UncertaintyMetric):
    """The mean of a value per row, stored as one sum and one count.

    Args:
        name: Name of the sum's state, which says what is summed.
        kwargs: See :class:`UncertaintyMetric`.
    """

    is_differentiable: bool | None = True

    count: Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum_name = name
        self._add_sum(name)
        self._add_sum("count")

    def _add(self, values: Tensor, known: Tensor | None = None) -> None:
        """Add values, or only those that the mask ``known`` selects."""
        counted = values.numel() if known is None else widen(known.sum())
        kept = widen(values) if known is None else torch.where(known, widen(values), 0.0)
        setattr(self, self._sum_name, getattr(self, self._sum_name) + kept.sum())
        self.count = self.count + counted

    def compute(self) -> Tensor:
        """The mean over all rows; NaN without rows."""
        mean: Tensor = getattr(self, self._sum_name) / self.count
        return mean


class MeanLoss(MeanMetric):
    """A mean of batch losses, each weighted by the count that it was divided by.

    torchmetrics' own mean checks every value, and so waits for a GPU twice per batch.

    Example:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor(2.0), torch.tensor(3))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    loss: Tensor

    def __init__(self) -> None:
        super().__init__("loss")

    def update(self, loss: Tensor, count: Tensor) -> None:
        """Add a batch's loss, a scalar, and its count."""
        self.loss = self.loss + widen(loss.detach()) * widen(count)
        self.count = self.count + widen(count)


def prediction_rows(
    prediction: Tensor | HasProbs, target: Tensor, from_logits: bool, validate: bool
) -> tuple[Tensor, Tensor]:
    """Convert a classification metric's ``update`` arguments to probabilities [N, C] and class indices [N].

    Raises:
        InputError: ``prediction`` is not a tensor and has no ``probs``, or the values do not fit.
    """
    if not isinstance(prediction, Tensor):
        return classification_rows(get_probs(prediction), target, validate=validate)
    if not from_logits:
        return classification_rows(prediction, target, validate=validate)
    return classification_rows(logits_to_log_probs(prediction, validate).exp(), target, validate=validate)


def get_probs(prediction: HasProbs) -> Tensor:
    """``prediction.probs``, or an error that says what was expected."""
    probs = getattr(prediction, "probs", None)
    if not isinstance(probs, Tensor):
        raise InputError(
            f"`prediction` must be a tensor [B, C] or a prediction with `probs`, but it is a "
            f"{type(prediction).__name__}."
        )
    return probs


def logits_to_log_probs(logits: Tensor, validate: bool) -> Tensor:
    """Log-probabilities [B, C, ...] of logits, in at least float32."""
    check_floating("logits", logits, 2, "[B, C, ...]")
    log_probs = torch.log_softmax(upcast(logits), 1)
    if validate:
        check_no_nan("logits", log_probs)
    return log_probs

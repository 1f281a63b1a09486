"""Numbers at each position of a map: depth, flow, height."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions import NumberPrediction
from lightning_uq.tasks.base import OutputShapeError, Progress, describe
from lightning_uq.tasks.regression import Regression
from lightning_uq.tasks.row_scores import number_map_scores


@dataclass(frozen=True)
class PixelRegression(Regression):
    """D numbers per position of a map: outputs [Z, B, k D, *P] and targets [B, D, *P], or [B, *P] if D = 1.

    P is one, two or three axes. Heads and losses are those of :class:`Regression`; the k blocks of D channels are side by side in
    the channel axis. Every position is a row: the loss is the mean over all known targets of the batch, and the metrics count each
    position once. NaN marks a missing target, such as a pixel without a depth.

    Args:
        head: What the outputs mean; see :class:`Regression` for this and the other arguments.
        loss: Name of the loss; None takes the head's default.
        levels: Levels in (0, 1) of the quantiles, in increasing order.
        components: K of the mixture.
        beta: Power of the variance in ``"beta_nll"``, in [0, 1].
        target_scale: Mean and standard deviation of the targets, each a number or one number per channel.

    Raises:
        InputError: A field is unknown or out of range, or does not belong to the head.

    Example:
        >>> import torch
        >>> task = PixelRegression()
        >>> prediction = task.predict(torch.zeros(5, 2, 2, 8, 8))  # 5 hypotheses, 2 images, mean and raw variance
        >>> prediction.mean.shape, prediction.score("variance").shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 8, 8]))
    """

    has_positions: ClassVar[bool] = True

    def predict(self, outputs: Tensor) -> NumberPrediction:
        """The head's prediction of maps [B, D, *P], in the units of the targets."""
        return super().predict(outputs.movedim(2, -1)).as_maps()

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Sum and number of the losses of each image's known targets."""
        return super().sample_losses(output.movedim(1, -1), _channels_last(target, output.ndim), progress)

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The positions as rows [N, D], with their targets."""
        maps: NumberPrediction = prediction
        last = _channels_last(target, len(maps.target_shape))
        return super().rows(maps.as_rows(), last.reshape(-1, maps.target_shape[1]))

    def row_scores(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """The row scores of numbers, as means over the positions of each map."""
        return number_map_scores(*self.rows(prediction, target), len(target))

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for outputs [Z, B, k D, *P], k channels per target."""
        k = self.outputs_per_target
        if outputs.ndim < 4 or outputs.shape[2] == 0 or outputs.shape[2] % k:
            raise OutputShapeError(
                f"A network for {describe(self)} must return maps [B, {k} D, ...], {self.layout}, but it returned shape "
                f"{list(outputs.shape[1:])}. "
                + ("Pass `task=Regression()` for one target per input." if outputs.ndim < 4 else self._advice().strip())
            )
        super().check_output(outputs.movedim(2, -1), values=values)

    def check_target(self, target: Tensor, outputs: Tensor, *, values: bool = True) -> None:
        """Check for floating-point maps [B, D, *P], finite or NaN."""
        shape = outputs.shape[1:]
        expected = [shape[0], shape[1] // self.outputs_per_target, *shape[2:]]
        if target.is_floating_point() and list(target.shape) != expected:
            without = [expected[0], *expected[2:]]
            if expected[1] != 1 or list(target.shape) != without:
                also = f" or {without}" if expected[1] == 1 else ""
                raise InputError(
                    f"The targets must have shape {expected}{also}, because the network returns {list(shape)}, but they have "
                    f"{list(target.shape)}; an array of another shape would broadcast."
                )
        super().check_target(_channels_last(target, outputs.ndim - 1), outputs.movedim(2, -1), values=values)

    def _advice(self) -> str:
        """For an error: a sentence with the task for maps that contain only means, and a trailing space."""
        if self.outputs_per_target == 1:
            return ""
        return "If it returns only the D means, pass `task=PixelRegression(head='mean')`. "


def _channels_last(target: Tensor, ndim: int) -> Tensor:
    """A target [B, D, *P] with its channels last; [B, *P] stays unchanged."""
    return target.movedim(1, -1) if target.ndim == ndim else target

"""A fitted calibration of classes as a module of buffers."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

from lightning_uq.functional.class_calibration import calibrate_log_probs
from lightning_uq.functional.precision import move_only


class ClassCalibration(nn.Module):
    """Maps log-probabilities [B, C, ...] to calibrated ones. Its tensors move with the module, but keep their precision in a cast.

    Args:
        fitted: The fitted tensor by its argument name in :func:`~lightning_uq.functional.class_calibration.calibrate_log_probs`.

    Example:
        >>> import torch
        >>> calibration = ClassCalibration(class_scaling=torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
        >>> calibration(torch.tensor([[0.8, 0.2]]).log()).exp()
        tensor([[0.6667, 0.3333]])
    """

    def __init__(self, **fitted: Tensor) -> None:
        super().__init__()
        for name, tensor in fitted.items():
            self.register_buffer(name, tensor)

    def forward(self, log_probs: Tensor) -> Tensor:
        """Calibrated log-probabilities."""
        return calibrate_log_probs(log_probs, dict(self.named_buffers()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClassCalibration":
        super()._apply(functools.partial(move_only, fn), recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

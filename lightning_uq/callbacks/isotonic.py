"""Isotonic calibration after training: a monotone curve per class, fitted on the validation data."""

from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration
from lightning_uq.functional.calibration_rows import pooled_rows
from lightning_uq.functional.isotonic import fit_isotonic


class IsotonicScaling(Calibration):
    """A monotone curve per class from its probability to its frequency, for any LightningModule that classifies.

    Each class is fitted against the rest, and the values of the curves are divided by their sum. The curves can follow any monotone
    miscalibration, but need many rows per class: with 500 rows on CIFAR-10, a
    temperature had the better likelihood for two of three networks. A warning names classes without rows. No probability becomes 0. The calibration acts on the log of the mean probabilities, so the members do not change. It can be exported, also to ONNX.

    :class:`ConformalSets` and :class:`SelectiveThreshold` after it need other rows, passed as ``dataloader`` to one of the two callbacks. On the rows of the curves,
    they see too few errors, and a warning says so (a coverage of 0.67 instead of 0.9 with 300 rows of 50 classes).

    Args:
        fitting: ``max_rows`` (above 2^20 rows, a random sample of so many is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Zadrozny & Elkan, KDD 2002.

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).repeat(50, 1)
        >>> target = torch.tensor([0, 0, 1, 1]).repeat(25)  # the second row is as often class 0 as the first
        >>> scaling = IsotonicScaling().fit_logits(logits, target)
        >>> scaling.calibrate(CategoricalPrediction(logits[None, :2])).probs.round(decimals=2)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    tensor_name = "class_curves"
    needs_classes = True
    is_flexible = True

    @property
    def class_curves(self) -> Tensor:
        """Knots and values [2, C, K] in float64, for :func:`~lightning_uq.functional.isotonic.apply_isotonic`.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The curves of the mean probabilities."""
        return {"class_curves": fit_isotonic(pooled_rows(logits), labels)}

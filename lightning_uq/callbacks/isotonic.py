"""Isotonic calibration after training: a monotone curve per class, fitted on the validation data."""

from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration
from lightning_uq.functional.calibration_rows import pooled_rows
from lightning_uq.functional.isotonic import fit_isotonic


class IsotonicScaling(Calibration):
    """A monotone curve per class from its probability to its frequency, on any LightningModule that classifies.

    Each class is fitted against the rest, and the curves' values are divided by their sum. It follows any monotone
    miscalibration, but needs many rows per class: with 500 on CIFAR-10, a
    temperature had the better likelihood for two of three networks. A warning names classes without a row. No probability becomes 0. Applied to the log of the mean probabilities: members stay as they are. It exports, to ONNX too.

    :class:`ConformalSets` and :class:`SelectiveThreshold` behind it need other rows, in ``dataloader`` of either: on the rows of the curves they
    find too few errors (a coverage of 0.67 in place of 0.9 with 300 rows of 50 classes), which a warning tells.

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
            NotFittedError: Nothing was fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The curves of the mean probabilities."""
        return {"class_curves": fit_isotonic(pooled_rows(logits), labels)}

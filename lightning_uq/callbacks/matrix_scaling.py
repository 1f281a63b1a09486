"""Matrix scaling after training: an affine map of log-probabilities, fitted on the validation data."""

from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration
from lightning_uq.functional.calibration_rows import in_order, pooled_rows
from lightning_uq.functional.matrix_scaling import fit_matrix_scaling


class MatrixScaling(Calibration):
    """An affine map of log-probabilities, with a ridge towards the fitted temperature, for any LightningModule that classifies.

    Unlike a temperature, it can move probability between classes that the network confuses. The ridge on the weights between
    classes, on each class's own scale and on the biases depends on the numbers of rows and classes. Five-fold
    cross-validated likelihood may choose a weaker or stronger ridge, or the temperature alone: see
    :func:`~lightning_uq.functional.matrix_scaling.fit_matrix_scaling`. It acts on the log of the mean probabilities, so the
    members do not change. It can be exported, also to ONNX.

    Args:
        fitting: ``max_rows`` (above 2^20 rows, a random sample of so many is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Berta, Holzmüller, Jordan & Bach, "Structured matrix scaling for multi-class calibration" (arXiv 2511.03685).

    Example:
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).repeat(100, 1)
        >>> target = torch.tensor([0, 1, 2, 0, 2, 2]).repeat(50)  # half of class 1 is class 2
        >>> scaling = MatrixScaling().fit_logits(logits, target)
        >>> probs = scaling.calibrate(CategoricalPrediction(logits[None, :3])).probs
        >>> [0.4 < p < 0.6 for p in probs[1, 1:].tolist()]
        [True, True]
    """

    tensor_name = "class_matrix"
    needs_classes = True

    @property
    def class_matrix(self) -> Tensor:
        """Weights, bias, floor and 1 / T [C + 3, C] in float64, for :func:`~lightning_uq.functional.matrix_scaling.apply_matrix_scaling`.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return self._get()

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The temperature, and the NLL of the fitting rows: see :attr:`Calibration.fitted_numbers`."""
        return {"temperature": float(1 / self.class_matrix[-1, 0]), **super().fitted_numbers}

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scaling of the log of the mean probabilities."""
        rows = pooled_rows(logits)
        return {"class_matrix": fit_matrix_scaling(*in_order(rows, labels)).class_matrix}

"""Vector scaling after training: a scale and a bias per class, fitted on the validation data."""

import torch
from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration
from lightning_uq.functional.calibration_rows import in_order, pooled_rows
from lightning_uq.functional.vector_scaling import fit_vector_scaling


class VectorScaling(Calibration):
    """A scale and a bias per class, with a ridge towards the fitted temperature, for any LightningModule that classifies.

    The strength of the ridge is chosen by five-fold cross-validated likelihood. If no strength beats the temperature alone, the
    result is the temperature. It acts on the log of the mean probabilities, so the members do not change.

    Args:
        fitting: ``max_rows`` (above 2^20 rows, a random sample of so many is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 4.2.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
        >>> target = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 0, 1]).repeat(10)  # class 1 is over-predicted
        >>> scale, bias = VectorScaling().fit_logits(logits, target).class_scaling
        >>> bool(bias[0] > bias[1])
        True
    """

    tensor_name = "class_scaling"
    needs_classes = True

    @property
    def class_scaling(self) -> Tensor:
        """Scale and bias [2, C] in float64.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scaling of the log of the mean probabilities."""
        rows = pooled_rows(logits)
        fit = fit_vector_scaling(*in_order(rows, labels))
        return {"class_scaling": torch.stack([fit.scale, fit.bias])}

"""Losses of binary labels, element by element."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_choice

LabelLoss = Literal["bce", "focal"]


def label_losses(
    logits: Tensor,
    target: Tensor,
    loss: LabelLoss = "bce",
    *,
    pos_weight: float | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 2.0,
) -> Tensor:
    """The loss of each label, in nats and at least in float32. For unknown labels it is 0, without a gradient.

    With p = sigmoid(l) and the target y, possibly smoothed, y' = (1 - s) y + s / 2:

    - ``"bce"``: -w y' log p - (1 - y') log(1 - p), as in ``binary_cross_entropy_with_logits``;
    - ``"focal"``: the same times |y' - p|^gamma.

    Args:
        logits: Raw logits, of any shape.
        target: 0 and 1 of any dtype, or probabilities, of the same shape; NaN marks unknown labels.
        loss: ``"bce"`` or ``"focal"``.
        pos_weight: Weight w of label 1: a number, or one per label (the last axis).
        label_smoothing: s, in [0, 1].
        focal_gamma: gamma, at least 0.

    Raises:
        InputError: ``loss`` is unknown.

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017 (arXiv 1708.02002).

    Example:
        >>> label_losses(torch.zeros(3), torch.tensor([0.0, 1.0, float("nan")]))
        tensor([0.6931, 0.6931, 0.0000])
    """
    check_choice("loss", loss, ("bce", "focal"))
    logits = upcast(logits)
    y = target.to(logits.dtype)
    known = ~y.isnan()
    # Unknown labels are replaced before the loss, so that even a NaN logit there reaches neither the loss nor the gradient.
    logits, y = torch.where(known, logits, 0.0), torch.where(known, y, 0.5)
    y = (1 - label_smoothing) * y + label_smoothing / 2
    weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(logits, y, pos_weight=weight, reduction="none")
    if loss == "focal":
        gap = (y - torch.sigmoid(logits)).abs().clamp_min(torch.finfo(logits.dtype).tiny)
        losses = losses * gap**focal_gamma
    return torch.where(known, losses, 0.0)

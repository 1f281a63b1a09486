"""Checked evidence and its targets as rows, and the weighted reduction of losses computed from them."""

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.validation import check_class_indices, check_floating, check_shape, check_tensor
from lightning_uq.losses.reduction import Reduction, check_reduction, reduce


class EvidenceRows:
    """Checked evidence [N, C, ...] with its target as rows of the same shape."""

    def __init__(self, evidence: Tensor, target: Tensor, ignore_index: int, *, soft: bool, validate: bool) -> None:
        check_floating("evidence", evidence, 2, "[N, C, d1, ..., dk]")
        check_tensor("target", target)
        evidence = upcast(evidence)
        self.keep: Tensor | None = None
        self.soft = False
        if target.shape == evidence.shape:
            self.soft = target.is_floating_point()
            if validate:
                _check_one_hot(target, soft)
            self.hot = target.to(evidence.dtype) if self.soft else target.bool()
        elif target.shape == evidence.shape[:1] + evidence.shape[2:]:
            check_class_indices("target", target)
            keep = target != ignore_index
            if validate:
                _check_indices(target, keep, evidence.shape[1])
            if not validate or not bool(keep.all()):
                # The evidence at an ignored position, even NaN, must reach neither the loss nor the gradient.
                self.keep = keep
                evidence, target = torch.where(keep.unsqueeze(1), evidence, 0.0), torch.where(keep, target, 0)
            self.hot = torch.zeros_like(evidence, dtype=torch.bool).scatter_(1, target.long().unsqueeze(1), True)
        else:
            raise InputError(
                f"`target` must be class indices of shape {list(evidence.shape[:1] + evidence.shape[2:])} or "
                f"one-hot rows of shape {list(evidence.shape)}, but its shape is {list(target.shape)}."
            )
        if validate and not bool((evidence >= 0).all()):
            found = "NaN" if bool(evidence.isnan().any()) else f"{float(evidence.detach().min()):g}"
            raise InputError(
                f"`evidence` must be non-negative, but it holds {found}. Apply `clamped_exp`, softplus or ReLU "
                "to raw outputs first."
            )
        self.evidence = evidence

    def wide(self) -> "EvidenceRows":
        """The same rows in float64."""
        other = object.__new__(EvidenceRows)
        other.__dict__ = {**self.__dict__, "evidence": widen(self.evidence)}
        return other

    def true(self, values: Tensor) -> Tensor:
        """Sum over the classes of y_c v_c: [N, ...]."""
        return (self.hot * values).sum(1)

    def others(self, values: Tensor) -> Tensor:
        """Values of the wrong classes: 0 at the true class, and weighted by 1 - y for soft targets: [N, C, ...]."""
        return values * (1 - self.hot) if self.soft else values.masked_fill(self.hot, 0.0)

    def reduce(self, loss: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        """Weight and reduce the losses [N, ...]; ignored positions count as 0."""
        check_reduction(reduction)
        total: Tensor | None = None if self.keep is None else self.keep.sum()
        if weight is not None:
            check_tensor("weight", weight, f"[C] = [{self.evidence.shape[1]}]")
            check_shape("weight", weight, self.evidence.shape[1:2])
            each = self.true(weight.to(loss).view(-1, *[1] * (loss.ndim - 1)))
            each = each if self.keep is None else each * self.keep
            loss, total = loss * each, each.sum()
        elif self.keep is not None:
            loss = loss * self.keep
        return reduce(loss, reduction, loss.numel() if total is None else total)


def _check_indices(target: Tensor, keep: Tensor, num_classes: int) -> None:
    wrong = keep & ((target < 0) | (target >= num_classes))
    if bool(wrong.any()):
        raise InputError(
            f"`target` must hold class indices in [0, {num_classes}), but it holds {int(target[wrong][0])}."
        )


def _check_one_hot(target: Tensor, soft: bool) -> None:
    rows = target.float()
    if not bool(((rows.sum(1) - 1).abs() < 1e-3).all()) or not bool((rows >= 0).all()):
        raise InputError(
            "The rows of `target` must be non-negative and sum to one over the class axis, but they do not."
        )
    if not soft and not bool(((rows == 0) | (rows == 1)).all()):
        raise InputError(
            "`target` must be class indices or one-hot rows, but its rows are soft. Use a loss that takes soft targets."
        )

"""Held-out logits and targets as checked rows in float64, which calibration maps are fitted to."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_floating, check_target, check_target_values, flatten_classes

_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def calibration_rows(logits: Tensor, target: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Checked logits [Z, N, C] in float64, finite, and class indices [N]; Z = 1 where ``ndim`` is 2."""
    check_floating("logits", logits, ndim, "[Z, N, C, ...]" if ndim == 3 else "[N, C, ...]")
    members = logits[None] if ndim == 2 else logits
    check_target(target, members.shape[1:2] + members.shape[3:])
    rows = torch.stack([flatten_classes(to_float64(member)) for member in members])
    if rows.numel() == 0:
        raise InputError(f"`logits` must hold at least one row, but its shape is {list(logits.shape)}.")
    classes = target.reshape(-1).long().to(rows.device)
    check_target_values(classes, rows.shape[2])
    top = rows.amax(2, keepdim=True)
    if not bool(top.isfinite().all()):
        raise InputError(
            "`logits` must hold no NaN, no positive infinity and no row of minus infinities, but it holds "
            f"{top[~top.isfinite()][0].item()}."
        )
    return torch.where(rows == -math.inf, top + _LOG_TINY, rows), classes


def in_order(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, C] and labels [N] in an order that depends on what they hold alone: only rows that are equal may change places.

    Ranks hand over rows in orders of their own, and folds must not differ.
    """
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        return rows, labels  # an error that the fit will tell
    _, number = torch.unique(
        rows, dim=0, return_inverse=True
    )  # exact, also where a row rules a class out by minus infinity
    order = (number * rows.shape[1] + labels).argsort()
    return rows[order], labels[order]


def warn_of_missing_classes(rows: Tensor, classes: Tensor) -> None:
    """Name the classes that rows [N, C] allow, but that none of them is of, by ``classes`` [N]: a fit by class learns that they never occur."""
    allowed = (rows - rows.amax(1, keepdim=True) > 0.99 * _LOG_TINY).any(0)
    missing = (allowed & (torch.bincount(classes, minlength=len(allowed)) == 0)).nonzero().squeeze(1).tolist()
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        warnings.warn(
            f"No row is of class {', '.join(map(str, missing[:10]))}{more}, so the fit makes their probabilities very small. Fit a "
            "temperature, or rows of all classes.",
            stacklevel=3,
        )

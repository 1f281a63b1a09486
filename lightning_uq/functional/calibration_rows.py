"""Checked held-out logits and targets, to which calibration maps are fitted."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import mean_log_probs
from lightning_uq.functional.hashing import mix
from lightning_uq.functional.precision import to_wide_device, upcast
from lightning_uq.functional.validation import check_floating, check_target, check_target_values

_CHUNK = 1 << 17  # logits converted to float64 at a time, so that they fit in a cache
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def calibration_rows(logits: Tensor, target: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Check logits [Z, N, C], which must be finite, and class indices [N]; Z = 1 if ``ndim`` is 2.

    Logits in float32 stay in float32 and are not copied: fits convert a few rows at a time to float64. Half precision becomes
    float32. Logits with minus infinity become float64, because float32 could not hold it beside huge logits.
    """
    check_floating("logits", logits, ndim, "[Z, N, C, ...]" if ndim == 3 else "[N, C, ...]")
    members = logits[None] if ndim == 2 else logits
    check_target(target, members.shape[1:2] + members.shape[3:])
    if members.ndim > 3:
        members = members.movedim(2, -1)
    rows = upcast(to_wide_device(members)).reshape(len(members), -1, logits.shape[ndim - 1])
    if rows.numel() == 0:
        raise InputError(f"`logits` must hold at least one row, but its shape is {list(logits.shape)}.")
    classes = target.reshape(-1).long().to(rows.device)
    check_target_values(classes, rows.shape[2])
    top = rows.amax(2, keepdim=True)
    if not bool(top.isfinite().all()):
        raise InputError(
            "`logits` must hold no NaN, no positive infinity and no row with only minus infinity, but it holds "
            f"{top[~top.isfinite()][0].item()}."
        )
    if rows.amin() == -math.inf:
        rows = rows.double()
        rows = torch.where(rows == -math.inf, top.double() + _LOG_TINY, rows)
    return rows, classes


def pooled_rows(logits: Tensor) -> Tensor:
    """log mean_z softmax(l_z), [N, C, ...], for the logits [Z, N, C, ...] of members.

    It is computed in float64, a few rows at a time, and stored in float32, or in float64 if the logits are. Converting all Z members
    to float64 would take 2 Z times the memory of the result.
    """
    check_floating("logits", logits, 3, "[Z, N, C, ...]")
    logits = to_wide_device(logits)
    pooled = torch.empty_like(logits[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    size = max(1, _CHUNK // max(1, logits[:, :1].numel()))
    for part, members in zip(torch.split(pooled, size), torch.split(logits, size, 1), strict=True):
        part.copy_(mean_log_probs(members.double()))
    return pooled


def in_order(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows [N, C] and labels [N] in an order that depends only on their values, up to exchanges of equal rows.

    Ranks gather rows in different orders, but the folds must agree.
    """
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        return rows, labels  # the fit will raise the error
    if not rows.numel():
        return rows, labels
    # Integer sums are the same in any order. A search for equal rows would take several times as long.
    weights = mix(torch.arange(rows.shape[1], device=rows.device))
    size = max(1, _CHUNK // rows.shape[1])
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    key, order = torch.cat([(part * weights).sum(1) for part in torch.split(bits, size)]).sort()
    if bool((key[1:] != key[:-1]).all()):
        return rows[order], labels[order]
    # Exact even if a row excludes a class by minus infinity.
    _, number = torch.unique(rows, dim=0, return_inverse=True)
    order = (number * rows.shape[1] + labels).argsort()
    return rows[order], labels[order]


def warn_of_missing_classes(rows: Tensor, classes: Tensor) -> None:
    """Warn of classes without rows in ``classes`` [N] that the rows [N, C] do not exclude: a fit by class learns that they never occur."""
    allowed = (rows - rows.amax(1, keepdim=True) > 0.99 * _LOG_TINY).any(0)
    missing = (allowed & (torch.bincount(classes, minlength=len(allowed)) == 0)).nonzero().squeeze(1).tolist()
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        warnings.warn(
            f"No row is of class {', '.join(map(str, missing[:10]))}{more}, so the fit makes their probabilities very small. Fit a "
            "temperature, or use rows of all classes.",
            stacklevel=3,
        )

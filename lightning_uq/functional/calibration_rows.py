"""Held-out logits and targets as checked rows, which calibration maps are fitted to."""

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

_CHUNK = 1 << 17  # logits converted to float64 at a time: what a cache holds
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def calibration_rows(logits: Tensor, target: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Checked logits [Z, N, C], finite, and class indices [N]; Z = 1 where ``ndim`` is 2.

    Logits in float32 stay in float32 and are not copied: whoever computes with them widens some rows at a time. Half precision
    becomes float32. Logits with minus infinity, which float32 could not hold beside huge ones, become float64.
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
            "`logits` must hold no NaN, no positive infinity and no row of minus infinities, but it holds "
            f"{top[~top.isfinite()][0].item()}."
        )
    if rows.amin() == -math.inf:
        rows = rows.double()
        rows = torch.where(rows == -math.inf, top.double() + _LOG_TINY, rows)
    return rows, classes


def pooled_rows(logits: Tensor) -> Tensor:
    """log mean_z softmax(l_z), [N, C, ...], of the logits [Z, N, C, ...] of members.

    It is computed in float64, a few rows at a time, and kept in float32, or in float64 if the logits are: Z members in float64 would
    take 2 Z times the memory of the result.
    """
    check_floating("logits", logits, 3, "[Z, N, C, ...]")
    logits = to_wide_device(logits)
    pooled = torch.empty_like(logits[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    size = max(1, _CHUNK // max(1, logits[:, :1].numel()))
    for part, members in zip(torch.split(pooled, size), torch.split(logits, size, 1), strict=True):
        part.copy_(mean_log_probs(members.double()))
    return pooled


def in_order(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, C] and labels [N] in an order that depends on what they hold alone: only rows that are equal may change places.

    Ranks hand over rows in orders of their own, and folds must not differ.
    """
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        return rows, labels  # an error that the fit will tell
    if not rows.numel():
        return rows, labels
    # Sums of integers are the same in any order. A search for equal rows takes a multiple of the time.
    weights = mix(torch.arange(rows.shape[1], device=rows.device))
    size = max(1, _CHUNK // rows.shape[1])
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    key, order = torch.cat([(part * weights).sum(1) for part in torch.split(bits, size)]).sort()
    if bool((key[1:] != key[:-1]).all()):
        return rows[order], labels[order]
    # Exact, also where a row rules a class out by minus infinity.
    _, number = torch.unique(rows, dim=0, return_inverse=True)
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

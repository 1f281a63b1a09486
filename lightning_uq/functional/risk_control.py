"""Conformal risk control: the threshold at which the expected loss of a new row is at most alpha.

A set contains all labels, or pixels, with a score of at most the threshold. The loss must not increase with the threshold, which holds for
the share of missed labels. The calibration rows must be exchangeable with the new row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.conformal import exact_fraction
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating, check_no_nan, check_positive, check_shape

_TOLERANCE = 1e-9
"""Amount by which rounding may raise a sum of losses above its bound."""


def false_negative_threshold(scores: Tensor, relevant: Tensor, alpha: float) -> Tensor:
    """The smallest threshold q at which the expected share of a row's relevant elements with a score above q is at most alpha.

    With the loss L_i(q) = |{relevant elements of row i with score > q}| / |{relevant elements of row i}|, this is the smallest q with
    (L_1(q) + ... + L_n(q) + 1) / (n + 1) <= alpha. The search covers all scores rather than a grid. Rows without a relevant element are left
    out, so the guarantee is for rows that have one. If each row has one element, q is
    :func:`~lightning_uq.functional.conformal_quantile`.

    - several labels: scores are -logits [B, L], and the true labels are relevant; the set is ``-logits <= q``
    - masks: scores are -logits [B, H, W], and the true mask is relevant
    - maps of classes: scores are those of the true classes [B, H, W], and pixels that are not ignored are relevant

    Args:
        scores: Scores of the elements [B, ...].
        relevant: Whether each element must be found, bool [B, ...].
        alpha: The expected share that may be missed, in [0, 1].

    Returns:
        A scalar in float64. Plus infinity if fewer than 1 / alpha - 1 rows have a relevant element; minus infinity if ``alpha`` is 1.

    Raises:
        InputError: ``alpha`` is not in [0, 1], ``relevant`` is not bool or has another shape, or a relevant score is NaN.

    Source: Angelopoulos et al., "Conformal risk control", ICLR 2024 (arXiv 2208.02814), theorem 1 and section 3.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0], [3.0, -1.0], [0.5, 4.0]])
        >>> labels = torch.tensor([[True, True], [True, False], [False, True]])
        >>> false_negative_threshold(-logits, labels, 0.4), false_negative_threshold(-logits, labels, 0.2)
        (tensor(-2., dtype=torch.float64), tensor(inf, dtype=torch.float64))
    """
    check_floating("scores", scores, 2, "[B, ...]")
    check_shape("relevant", relevant, scores.shape)
    if relevant.dtype != torch.bool:
        raise InputError(f"`relevant` must be bool, but its dtype is {relevant.dtype}. Pass `target == 1`.")
    chosen = relevant.flatten(1)
    found = widen(scores.detach()).flatten(1)[chosen]
    check_no_nan("scores", found)
    sizes = chosen.sum(1)
    num_rows = int((sizes > 0).sum())
    budget = float(exact_fraction(alpha) * (num_rows + 1) - 1)
    if budget < 0:
        return found.new_tensor(math.inf)
    ordered, order = found.sort(descending=True)
    weights = (1 / widen(sizes))[:, None].expand(chosen.shape)[chosen]
    missed = weights[order].cumsum(0)
    index = torch.searchsorted(missed, missed.new_tensor(budget + _TOLERANCE), right=True)
    return torch.cat([ordered, ordered.new_tensor([-math.inf])])[index]


def risk_threshold(losses: Tensor, thresholds: Tensor, alpha: float, bound: float = 1.0) -> Tensor:
    """The smallest of given thresholds at which the expected loss is at most alpha, for any loss that does not increase with the threshold.

    It is the first threshold with (L_1 + ... + L_n + bound) / (n + 1) <= alpha. The thresholds must not depend on the calibration rows.

    Args:
        losses: The loss of each calibration row at each threshold [N, K], at most ``bound``.
        thresholds: Thresholds [K], ascending.
        alpha: The allowed expected loss, in [0, 1].
        bound: The largest possible loss.

    Returns:
        A scalar in float64. It is plus infinity if no threshold suffices; every set must then contain everything.

    Raises:
        InputError: A loss increases with the threshold, exceeds ``bound`` or is NaN, or the thresholds do not ascend.

    Source: Angelopoulos et al., "Conformal risk control", ICLR 2024 (arXiv 2208.02814), theorem 1.

    Example:
        >>> losses = torch.tensor([[1.0, 0.5, 0.0]]).expand(9, 3)
        >>> risk_threshold(losses, torch.tensor([0.1, 0.2, 0.3]), alpha=0.6)
        tensor(0.2000, dtype=torch.float64)
    """
    check_positive(bound=bound)
    check_floating("losses", losses, 2, "[N, K]")
    check_no_nan("losses", losses)
    check_floating("thresholds", thresholds, 1, "[K]")
    check_shape("thresholds", thresholds, losses.shape[1:])
    if not bool((thresholds[1:] > thresholds[:-1]).all()):
        raise InputError("`thresholds` must ascend, but they do not.")
    if bool((losses > bound).any()):
        raise InputError(f"`losses` must be at most `bound` = {bound:g}, but the largest is {float(losses.amax()):g}.")
    if bool((losses[:, 1:] > losses[:, :-1]).any()):
        raise InputError(
            "`losses` must not increase with the threshold, but a row's do. Replace each loss by its maximum over the higher thresholds."
        )
    budget = float(exact_fraction(alpha) * (len(losses) + 1)) - bound
    allowed = widen(losses.detach()).sum(0) <= budget + _TOLERANCE
    ends = torch.cat([widen(thresholds), widen(thresholds).new_tensor([math.inf])])
    return ends[int((~allowed).sum())]

"""Sets of labels for conformal prediction: the score of each label, and the labels whose score is at most a threshold.

The threshold with coverage 1 - alpha over all rows is :func:`~lightning_uq.functional.conformal_quantile` of the true labels' scores;
:func:`~lightning_uq.functional.group_quantiles` gives thresholds with that coverage for each class or group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.running_maximum import running_maximum
from lightning_uq.functional.validation import (
    all_hold,
    check_at_least,
    check_bool,
    check_floating,
    check_integer,
    check_no_nan,
    check_shape,
    check_target,
    check_target_values,
)


def lac_scores(logits: Tensor, *, validate: bool = True) -> Tensor:
    """Scores of the least ambiguous set-valued classifiers (LAC), as log-odds: log((1 - p_y) / p_y) for each label y.

    They order labels like 1 - p_y, but also separate probabilities that round to 0 or 1; ``scores.sigmoid()`` is 1 - p_y. If the
    probabilities are the true ones, the sets have the smallest mean size among all sets with their coverage.

    Args:
        logits: Logits or log-probabilities [B, C].
        validate: Whether to check the values, which waits for a GPU.

    Returns:
        [B, C] in float64.

    Raises:
        InputError: ``logits`` are not floating point [B, C], hold NaN or plus infinity, or have a row with only minus infinity.

    Source: Sadinle, Lei & Wasserman, JASA 114 (2019) (arXiv 1609.00451).

    Example:
        >>> scores = lac_scores(torch.tensor([[0.0, 0.0], [50.0, 0.0], [60.0, 0.0]]))
        >>> scores
        tensor([[  0.,   0.],
                [-50.,  50.],
                [-60.,  60.]], dtype=torch.float64)
    """
    logits = _checked(logits, validate)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    # For p <= 1/2, 1 - p keeps all its digits; only the top label can have p > 1/2, and its complement is summed.
    top, label = logits.max(1, keepdim=True)
    sure = logits.scatter(1, label, -torch.inf).logsumexp(1, keepdim=True) - top
    return torch.where(logits == top, sure, (-log_prob.exp()).log1p() - log_prob)


def aps_scores(logits: Tensor, uniforms: Tensor | None = None, *, validate: bool = True) -> Tensor:
    """Scores of adaptive prediction sets (APS), minus one: S_y - 1 with S_y = sum of the p_c > p_y, + u p_y.

    They are :func:`raps_scores` without a penalty.

    Args:
        logits: Logits or log-probabilities [B, C].
        uniforms: u, one random number in [0, 1] per row [B], for calibration rows and new rows. None: u = 1, which gives larger sets.
        validate: Whether to check the values, which waits for a GPU.

    Source: Romano, Sesia & Candes, "Classification with valid and adaptive coverage", NeurIPS 2020 (arXiv 2006.02544).

    Example:
        >>> logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
        >>> 1 + aps_scores(logits)
        tensor([[0.5000, 1.0000, 0.8000]], dtype=torch.float64)
        >>> 1 + aps_scores(logits, torch.tensor([0.5]))
        tensor([[0.2500, 0.9000, 0.6500]], dtype=torch.float64)
    """
    return raps_scores(logits, penalty=0.0, uniforms=uniforms, validate=validate)


def raps_scores(
    logits: Tensor, penalty: float = 0.01, k_reg: int = 5, uniforms: Tensor | None = None, *, validate: bool = True
) -> Tensor:
    """Scores of regularised adaptive prediction sets (RAPS), minus one: S_y - 1 with S_y = sum of the p_c > p_y, + u p_y + penalty (rank_y - k_reg)_+.

    rank_y is the number of labels with p_c >= p_y. Labels of equal probability have equal scores. One is subtracted because S_y rounds
    to 1 for confident rows: S_y - 1 is computed as the penalty minus the remaining probability, which keeps its digits.

    Args:
        logits: Logits or log-probabilities [B, C].
        penalty: Lambda, the cost of each label beyond the first ``k_reg``; at least 0.
        k_reg: Number of labels without a penalty.
        uniforms: u, one random number in [0, 1] per row [B], for calibration rows and new rows. None: u = 1, which gives larger sets.
        validate: Whether to check the values, which waits for a GPU.

    Returns:
        [B, C] in float64.

    Raises:
        InputError: ``penalty`` or ``k_reg`` is negative, ``uniforms`` are not [B] in [0, 1], or see :func:`lac_scores` for ``logits``.

    Source: Angelopoulos et al., "Uncertainty sets for image classifiers using conformal prediction", ICLR 2021 (arXiv 2009.14193).

    Example:
        >>> 1 + raps_scores(torch.tensor([[0.5, 0.2, 0.3]]).log(), penalty=0.1, k_reg=1)
        tensor([[0.5000, 1.2000, 0.9000]], dtype=torch.float64)
    """
    check_at_least("penalty", penalty, 0.0)
    check_integer("k_reg", k_reg, 0)
    logits = _checked(logits, validate)
    ordered, order = logits.sort(1)
    probs = ordered.softmax(1)
    first, last = _ties(ordered)
    below = torch.cat([torch.zeros_like(probs[:, :1]), probs.cumsum(1)[:, :-1]], 1)
    left = below.gather(1, last)  # the smaller probabilities, and the equal ones of other labels
    if uniforms is not None:
        left = left + (1 - _checked_uniforms(uniforms, logits, validate))[:, None] * probs
    beyond = (logits.shape[1] - first - k_reg).clamp_min(0).to(probs)  # without `.to`, the product would be in float32
    return torch.empty_like(probs).scatter(1, order, penalty * beyond - left)


def true_label_scores(scores: Tensor, target: Tensor) -> Tensor:
    """The score of each row's true label: [B, C] -> [B].

    Raises:
        InputError: ``target`` does not hold one class index in [0, C) per row.

    Example:
        >>> true_label_scores(torch.tensor([[0.1, 0.9], [0.4, 0.6]]), torch.tensor([1, 0]))
        tensor([0.9000, 0.4000])
    """
    check_floating("scores", scores, 2, "[B, C]")
    check_target(target, scores.shape[:1])
    check_target_values(target, scores.shape[1])
    return scores.gather(1, target.long()[:, None]).squeeze(1)


def prediction_sets(
    scores: Tensor, threshold: Tensor | float, allow_empty: bool = True, *, validate: bool = True
) -> Tensor:
    """Whether each label's score is at most the threshold: [B, C] of bool.

    Args:
        scores: Scores of all labels [B, C].
        threshold: One number; one per class [C], from calibration rows of that class; or one per row [B, 1], such as its group's.
        allow_empty: Whether a set may be empty. If not, an empty set gets the labels with its lowest score. Coverage may then exceed 1 - alpha,
            and does if the accuracy is above 1 - alpha.
        validate: Whether to check the values, which waits for a GPU.

    Returns:
        [B, C] of bool. A NaN score keeps its label.

    Raises:
        InputError: ``threshold`` has another shape or holds NaN.

    Example:
        >>> scores = torch.tensor([[0.1, 0.9], [0.6, 0.7]])
        >>> prediction_sets(scores, 0.5)
        tensor([[ True, False],
                [False, False]])
        >>> prediction_sets(scores, 0.5, allow_empty=False)
        tensor([[ True, False],
                [ True, False]])
    """
    check_bool("allow_empty", allow_empty)
    check_floating("scores", scores, 2, "[B, C]")
    bound = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
    rows, classes = scores.shape
    check_shape("threshold", bound, torch.Size([]), torch.Size([classes]), torch.Size([rows, 1]))
    if validate:
        check_no_nan("threshold", bound)
    sets = ~(scores > bound)
    if allow_empty:
        return sets
    lowest = scores == scores.amin(1, keepdim=True)
    return sets | (lowest & ~sets.any(1, keepdim=True))


def _checked(logits: Tensor, validate: bool) -> Tensor:
    """Logits in float64, each row with a finite maximum."""
    check_floating("logits", logits, 2, "[B, C]")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"`logits` must have shape [B, C] with C > 0, but their shape is {list(logits.shape)}.")
    if validate and not all_hold(logits.amax(1).isfinite()):
        raise InputError(
            "`logits` must hold no NaN, no plus infinity and no row with only minus infinity, but a row has one of these."
        )
    return widen(logits)


def _checked_uniforms(uniforms: Tensor, logits: Tensor, validate: bool) -> Tensor:
    check_floating("uniforms", uniforms, 1, "[B]")
    check_shape("uniforms", uniforms, logits.shape[:1])
    if validate and not all_hold((uniforms >= 0) & (uniforms <= 1)):
        raise InputError("`uniforms` must lie in [0, 1], but some do not.")
    return uniforms.to(logits)


def _ties(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """The first and last position of the values equal to each one, in ascending rows [B, C]."""
    position = torch.arange(ordered.shape[1], device=ordered.device).expand(ordered.shape)
    change = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    first = running_maximum(torch.where(torch.cat([edge, change], 1), position, 0))
    last = running_maximum(torch.where(torch.cat([change, edge], 1), position.flip(1), 0).flip(1)).flip(
        1
    )  # backwards from the end
    return first, ordered.shape[1] - 1 - last

"""Selective prediction: the errors of a classifier that may abstain, as a function of the share that it answers.

All functions take a confidence [N] (higher is answered first) and ``error`` [N] (bool, or 0 and 1). Rows of equal confidence have no
order, so every curve is the expectation over random orders of tied rows: within a tie, the expected number of errors grows
linearly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating, check_no_nan


def certainty(logits: Tensor) -> Tensor:
    """-log(1 - max_c p_c), a confidence that also ranks very confident rows: [B, C, ...] -> [B, ...].

    In float32, the largest probability is exactly 1 if its logit is 17 above the others, so such rows are tied. Here the probabilities
    of the other classes are summed in log space. 1 - exp(-certainty) is the largest probability.

    Args:
        logits: Logits or log-probabilities [B, C, ...].

    Returns:
        [B, ...] in float64; infinite if all other classes are excluded.

    Raises:
        InputError: ``logits`` are not floating point, or have fewer than two axes.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [40.0, 0.0], [50.0, 0.0]])
        >>> logits.softmax(1).amax(1), certainty(logits)
        (tensor([0.5000, 1.0000, 1.0000]), tensor([ 0.6931, 40.0000, 50.0000], dtype=torch.float64))
    """
    check_floating("logits", logits, 2, "[B, C, ...]")
    ordered = widen(logits).sort(1).values  # rows that differ only in the order of their classes stay tied
    return ordered.logsumexp(1) - ordered[:, :-1].logsumexp(1)


def cumulative_errors(confidence: Tensor, error: Tensor) -> Tensor:
    """Expected number of errors among the i most confident rows, i = 1 ... N.

    Args:
        confidence: Confidences [N].
        error: Whether each row is wrong, [N].

    Returns:
        [N] in float64.

    Raises:
        InputError: The shapes differ, or a confidence is not floating point or NaN.

    Example:
        >>> cumulative_errors(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0, 1, 0]))
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_floating("confidence", confidence, 1, "[N]")
    if error.shape != confidence.shape or confidence.ndim != 1:
        raise InputError(
            f"`confidence` and `error` must have one shape [N], but their shapes are {list(confidence.shape)} and "
            f"{list(error.shape)}."
        )
    check_no_nan("confidence", confidence)
    if len(confidence) == 0:
        return widen(confidence)
    ordered, order = confidence.sort(descending=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    tie = first.long().cumsum(0) - 1  # number of the row's group of equal confidences
    start = first.nonzero().squeeze(1)
    size = start.diff(append=start.new_tensor([len(ordered)]))
    # Counts are integers up to here, so they are exact and, on CUDA, deterministic.
    errors = torch.cat([start.new_zeros(1), error[order].long().cumsum(0)])
    before, within = errors[start], errors[start + size] - errors[start]
    position = torch.arange(1, len(ordered) + 1, device=ordered.device) - start[tie]
    expected: Tensor = widen(before[tie]) + widen(position * within[tie]) / size[tie]
    return expected


def risk_coverage_curve(confidence: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage i / N and selective risk, the expected error rate among the i most confident rows.

    Args:
        confidence: Confidences [N].
        error: Whether each row is wrong, [N].

    Returns:
        Two tensors [N] in float64.

    Example:
        >>> risk_coverage_curve(torch.tensor([0.9, 0.5]), torch.tensor([0, 1]))
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([0.0000, 0.5000], dtype=torch.float64))
    """
    errors = cumulative_errors(confidence, error)
    rank = torch.arange(1, len(errors) + 1, dtype=errors.dtype, device=errors.device)
    return rank / len(errors), errors / rank


def aurc(confidence: Tensor, error: Tensor) -> Tensor:
    """Area under the risk-coverage curve: the mean over i of the error rate among the i most confident rows.

    Args:
        confidence: Confidences [N].
        error: Whether each row is wrong, [N].

    Returns:
        A scalar in [0, 1], lower is better; NaN without rows.

    Source: Geifman & El-Yaniv, NeurIPS 2017; Geifman et al., ICLR 2019 (arXiv 1805.08206).

    Example:
        >>> aurc(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]))
        tensor(0.1111, dtype=torch.float64)
    """
    return risk_coverage_curve(confidence, error)[1].mean()


def generalized_risk_curve(confidence: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and generalized risk: the expected share of all rows that are answered and wrong, starting at (0, 0).

    Args:
        confidence: Confidences [N].
        error: Whether each row is wrong, [N].

    Returns:
        Two tensors [N + 1] in float64.
    """
    errors = cumulative_errors(confidence, error)
    total = len(errors)
    coverage = torch.arange(total + 1, dtype=errors.dtype, device=errors.device) / total
    return coverage, torch.cat([errors.new_zeros(1), errors]) / total


def augrc(confidence: Tensor, error: Tensor) -> Tensor:
    """Area under the generalized-risk-coverage curve: the mean share of undetected failures, by the trapezoid rule.

    It equals (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with the accuracy a and the AUROC of confidence as a detector of right rows. Unlike
    the AURC, it does not give the few most confident rows the most weight.

    Args:
        confidence: Confidences [N].
        error: Whether each row is wrong, [N].

    Returns:
        A scalar in [0, 1/2], lower is better; NaN without rows.

    Source: Traub et al., NeurIPS 2024 (arXiv 2407.01032).

    Example:
        >>> augrc(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
        tensor(0.1250, dtype=torch.float64)
    """
    coverage, risk = generalized_risk_curve(confidence, error)
    return torch.trapezoid(risk, coverage) if len(confidence) else risk.sum()

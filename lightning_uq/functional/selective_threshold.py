"""The confidence above which a classifier answers, so that the error rate of its answers meets a target with high probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import (
    check_floating,
    check_integer,
    check_no_nan,
    check_open_unit,
    check_shape,
)


def selective_threshold(
    confidence: Tensor, error: Tensor, risk: float, delta: float = 0.1, num_levels: int = 32
) -> Tensor:
    """The lowest threshold t with P(error rate of new rows with confidence > t is at most ``risk``) >= 1 - ``delta``.

    The method is Learn then Test with exact binomial p-values and Bonferroni's correction. Candidates are minus infinity and the confidences of
    fixed ranks, at coverages of about 1/K, 2/K ... 1. Given the confidence t of a rank, the J rows above it are independent draws of such rows. With
    k errors among them, P(Binomial(J, risk) <= k) is a p-value for "the error rate above t exceeds ``risk``", and a candidate is accepted if it is at
    most ``delta`` / K. The confidence need not be continuous, and the risk need not fall with the confidence. The probability is over draws of the
    calibration rows, which must be independent and have the distribution of the new rows.

    Args:
        confidence: Confidences of the calibration rows [N]; higher is answered first.
        error: Whether each row is wrong, [N], of bool.
        risk: The allowed error rate of the answers, in (0, 1).
        delta: The probability that the error rate exceeds it, in (0, 1).
        num_levels: K, the number of candidates.

    Returns:
        A scalar in float64: answer if ``confidence > threshold``. It is plus infinity if no candidate is accepted: never answer.

    Raises:
        InputError: An argument is out of range, a confidence is NaN, or the shapes differ.

    Source: Angelopoulos et al., "Learn then Test" (arXiv 2110.01052); Geifman & El-Yaniv, NeurIPS 2017 (arXiv 1705.08500), for the risk.

    Example:
        >>> confidence = torch.linspace(0, 1, 1001)
        >>> error = torch.arange(1001) < 300  # wrong below 0.3
        >>> selective_threshold(confidence, error, risk=0.1)
        tensor(0.2490, dtype=torch.float64)
    """
    check_open_unit("risk", risk)
    check_open_unit("delta", delta)
    check_integer("num_levels", num_levels, 1)
    check_floating("confidence", confidence, 1, "[N]")
    check_shape("confidence", confidence, torch.Size([confidence.numel()]))
    check_shape("error", error, confidence.shape)
    check_no_nan("confidence", confidence)
    ordered, order = to_float64(confidence).sort(descending=True)
    errors = error.to(ordered.device).bool()[order]
    ends = torch.cat([ordered, ordered.new_tensor([-math.inf])])
    for level in range(num_levels, 0, -1):
        threshold = ends[math.ceil(level * len(ordered) / num_levels)]
        above = ordered > threshold
        if binomial_cdf(int(errors[above].sum()), int(above.sum()), risk) <= delta / num_levels:
            return threshold
    return ends.new_tensor(math.inf)


def binomial_cdf(count: int, num: int, probability: float) -> float:
    """P(X <= count) for a binomial X with ``num`` draws and a probability in (0, 1), summed in log space.

    Example:
        >>> round(binomial_cdf(1, 3, 0.5), 12)
        0.5
    """
    hits = torch.arange(count + 1, dtype=torch.float64)
    choices = math.lgamma(num + 1) - torch.lgamma(hits + 1) - torch.lgamma(num - hits + 1)
    terms = choices + hits * math.log(probability) + (num - hits) * math.log1p(-probability)
    return min(1.0, math.exp(float(terms.logsumexp(0))))

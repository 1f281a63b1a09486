"""The rarity of a score among rows of the training distribution, which puts scores of different kinds on one scale."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError

_NUM_KNOTS = 256
_TAIL = 0.05


class TailFit(NamedTuple):
    """A piecewise linear function of a score, in float64: minus the log of the share of held-out scores that are at least as high.

    Attributes:
        knots: Scores [K], ascending.
        values: Function values at the knots [K], ascending.
        slopes: Slope after each knot [K]; the last slope continues without end.
    """

    knots: Tensor
    values: Tensor
    slopes: Tensor


def fit_tail(scores: Tensor) -> TailFit:
    """Fit the tail of held-out scores; higher is further out.

    At the i-th of N ascending scores the tail probability is p = (N - i + 1) / (N + 1). -log p is linear between the scores, or between 256 of
    them that are evenly spaced in -log p. Beyond the last score it continues as an exponential tail; the slope is the reciprocal of the mean
    excess of the highest twentieth of the scores, but of at least the ten highest.

    Args:
        scores: Scores [N] of rows to which neither the network nor the score was fitted; non-finite scores are ignored.

    Raises:
        InputError: Fewer than two scores are finite.

    Example:
        >>> fit = fit_tail(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        >>> fit.values.exp().round(decimals=2)  # 1 / p
        tensor([1.2500, 1.6700, 2.5000, 5.0000], dtype=torch.float64)
    """
    ascending = scores[scores.isfinite()].double().cpu().sort().values
    N = len(ascending)
    if N < 2:
        raise InputError(f"A tail needs at least two finite scores, but there are {N} of {len(scores)}.")
    highest = max(2, min(N, max(10, math.ceil(_TAIL * N))))
    excess = float((ascending[-highest:] - ascending[-highest]).mean())
    chosen = torch.arange(N)
    if N > _NUM_KNOTS:
        logs = torch.linspace(math.log((N + 1) / N), math.log(N + 1), _NUM_KNOTS, dtype=torch.float64)
        chosen = (N + 1 - (N + 1) * torch.exp(-logs)).round().long().clamp(1, N) - 1
    knots = torch.unique_consecutive(ascending[chosen])  # for equal scores, p counts all of them
    first = torch.searchsorted(ascending, knots)
    values = math.log(N + 1) - (N - first).double().log()
    slopes = torch.cat([values.diff() / knots.diff(), values.new_tensor([1 / excess if excess else 1.0])])
    slopes = torch.where(slopes.isfinite(), slopes, 0.0)  # for knots that differ only by rounding
    return TailFit(knots, values, slopes)


def tail_score(scores: Tensor, fit: TailFit) -> Tensor:
    """-log p of scores [...] from a fitted tail: 0 far inside, log(N + 1) at the highest held-out score, and linear beyond.

    Below the first knot, it equals the value at that knot. NaN stays NaN.

    Args:
        scores: Scores [...]; higher is further out.
        fit: The result of :func:`fit_tail`, on the scores' device.

    Example:
        >>> fit = fit_tail(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        >>> tail_score(torch.tensor([-9.0, 1.5, 3.0, 9.0]), fit).round(decimals=2)
        tensor([0.2200, 0.7100, 1.6100, 5.6100], dtype=torch.float64)
    """
    scores = scores.to(fit.knots.dtype).clamp_min(fit.knots[0])
    if torch.compiler.is_compiling():  # an exported graph uses comparisons
        place = (scores.unsqueeze(-1) >= fit.knots).sum(-1) - 1
    else:
        place = torch.searchsorted(fit.knots, scores.contiguous(), right=True) - 1
    place = place.clamp(0, len(fit.knots) - 1)
    return fit.values[place] + fit.slopes[place] * (scores - fit.knots[place])

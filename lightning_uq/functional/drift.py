"""A test whether the scores of a stream still have the distribution of calibration rows: valid at any time, in constant memory.

Calibration scores divide the line into n + 1 intervals. If a stream's scores are exchangeable with them, the next score falls into interval i with
probability (1 + c_i) / (n + 1 + t), where c_i of the t earlier scores fell into it: the spacings of order statistics form a Polya urn. So the predictive
distribution over bins of several intervals is known exactly, whatever the distribution of the scores. Bets against it start with a capital of 1, which is
a martingale; P(it ever reaches 1 / alpha) <= alpha (Ville's inequality).

Source: Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005, for ranks among all earlier rows; Vovk, "Testing randomness online", Statistical
Science 36 (2021); Wilks, "Mathematical Statistics", 1962, for the spacings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.hashing import chain, chain_last, mix, to_uniform
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_floating

TAILS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
"""Shares of the calibration rows above the edges of the bins."""

_UPPER, _LOWER = (0.03, 0.1, 0.3, 0.8), (0.1, 0.3, 0.8)
_SHARE_UPPER = 0.8
_CHUNK = 4096
_BITS = 17


@dataclass(frozen=True)
class RankBins:
    """Bins of scores between calibration scores of fixed ranks, the bin of the highest scores first.

    Equal scores are ordered by a random number per row, so that the probabilities hold for any scores. Scores that agree in about five digits count as
    equal, because the last digits differ between precisions, devices and exported graphs. The random numbers of the calibration rows are a function of all
    their scores, and so the same in every process.

    Attributes:
        edges: The calibration scores between the bins [K - 1], descending, in float64.
        ties: The random numbers in (0, 1) of these rows, which order equal scores [K - 1].
        sizes: Number of the n + 1 intervals in each bin [K].
    """

    edges: Tensor
    ties: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, calibration: Tensor) -> RankBins:
        """The bins of calibration scores [n].

        Raises:
            InputError: There is no score, or a score is not finite.

        Example:
            >>> bins = RankBins.of(torch.arange(20.0))
            >>> bins.edges.tolist(), bins.sizes.tolist()
            ([19.0, 18.0, 16.0, 13.0, 10.0, 7.0, 4.0, 2.0, 1.0], [1, 1, 2, 3, 3, 3, 3, 2, 1, 2])
        """
        check_floating("calibration", calibration, 1, "[n]")
        n, num_bad = calibration.numel(), int((~calibration.isfinite()).sum())
        if not n or num_bad:
            what = f"{num_bad} of {n} scores are infinite or NaN" if n else "it is empty"
            raise InputError(f"`calibration` must hold finite scores, at least one, but {what}.")
        cuts = torch.tensor(sorted({max(1, math.floor(tail * (n + 1))) for tail in TAILS}))
        scores = _rounded(calibration).reshape(-1)
        content = int(mix(scores.view(torch.int64)).sum())  # a hash of the calibration rows, which seeds their numbers
        ties = to_uniform(chain_last(chain(1, content), torch.arange(n)))
        by_tie = ties.argsort(descending=True)
        order = by_tie[scores[by_tie].argsort(descending=True, stable=True)]
        edges = order[cuts - 1]
        bounds = torch.tensor([0, *cuts.tolist(), n + 1])
        return cls(scores[edges], ties[edges], bounds.diff())

    def __call__(self, scores: Tensor, ties: Tensor) -> Tensor:
        """The bin [T] of each score [T], with numbers [T] in (0, 1) that order equal scores. NaN counts as the highest score."""
        found = _rounded(scores)[:, None]
        above = (self.edges > found) | ((self.edges == found) & (self.ties > ties[:, None]))
        return above.sum(1)


def _rounded(scores: Tensor) -> Tensor:
    """Scores rounded to 17 significant bits, in float64 on the CPU; plus infinity for NaN."""
    wide = to_float64(scores).cpu()
    mantissa, exponent = torch.frexp(wide.nan_to_num())
    rounded = (
        (mantissa * 2**_BITS).round() / 2**_BITS * torch.exp2(exponent.double())
    )  # `ldexp` would have float32's range
    return torch.where(wide.isfinite(), rounded, torch.where(wide.isnan(), torch.inf, wide))


@dataclass(frozen=True)
class DriftTest:
    """The capital of bets against "the stream's scores are exchangeable with the calibration scores".

    A bet on a tail of share a with strength s gives the tail's scores the probability (1 - s) p + s p / a before normalisation, where p is the
    predictive probability. Most bets are on high scores, some on low ones. Part of the capital waits: a share 1 / log2(t + 1) - 1 / log2(t + 2) starts to bet at
    row t, so that a late drift is detected too. The total capital, a weighted mean over the bets, is a martingale.

    Objects are immutable: ``test, capital = test.advance(bins)``.

    Attributes:
        sizes: Number of intervals in each bin [K], from :class:`RankBins`.
        counts: Number of the stream's scores in each bin [K].
        log_bets: Log of the weighted capital of each bet [E].

    Example:
        >>> bins = RankBins.of(torch.randn(500, generator=torch.Generator().manual_seed(0)))
        >>> test, log_capital = DriftTest.start(bins.sizes).advance(bins(torch.full((30,), 2.0), torch.full((30,), 0.5)))
        >>> int((log_capital < math.log(20)).sum())  # rows until an alarm at a level of 5 %
        2
    """

    sizes: Tensor
    counts: Tensor
    log_bets: Tensor

    @classmethod
    def start(cls, sizes: Tensor) -> DriftTest:
        """The test before the first row."""
        num_bets = len(bets(sizes)[1])
        return cls(sizes, torch.zeros_like(sizes), torch.full((num_bets,), -torch.inf, dtype=torch.float64))

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return int(self.counts.sum())

    @property
    def log_capital(self) -> float:
        """The log of the capital, 0 before the first row."""
        waiting = -math.log(math.log2(self.num_rows + 2))
        return float(torch.logaddexp(self.log_bets.logsumexp(0), torch.tensor(waiting, dtype=torch.float64)))

    def advance(self, bins: Tensor) -> tuple[DriftTest, Tensor]:
        """Add rows in bins [T]; return the test after them, and the log of the capital after each row [T], in float64."""
        test, found = self, []
        for start in range(0, len(bins), _CHUNK):
            test, capital = test._advance(bins[start : start + _CHUNK])
            found.append(capital)
        return test, torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    def _advance(self, bins: Tensor) -> tuple[DriftTest, Tensor]:
        multipliers, weights = bets(self.sizes)
        urn = (self.sizes + self.counts).double()
        gains = multipliers[:, bins]
        # The mean multiplier under the urn's distribution before each row.
        total = urn.sum() + torch.arange(len(bins))
        expected = ((multipliers @ urn)[:, None] + gains.cumsum(1) - gains) / total
        steps = (gains / expected).log().cumsum(1)
        row = self.num_rows + torch.arange(1, len(bins) + 1, dtype=torch.float64)
        before, after = torch.log2(row + 1), torch.log2(row + 2)
        begins = torch.log1p(1 / (row + 1)) / math.log(2) / (before * after)
        began = begins.log() + weights.log()[:, None] - torch.cat([torch.zeros(len(steps), 1), steps[:, :-1]], 1)
        log_bets = steps + torch.logcumsumexp(torch.cat([self.log_bets[:, None], began], 1), 1)[:, 1:]
        capital = torch.logaddexp(log_bets.logsumexp(0), -after.log())
        counts = self.counts + torch.bincount(bins, minlength=len(self.counts))
        return replace(self, counts=counts, log_bets=log_bets[:, -1]), capital


def bets(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers [E, K] of the probability of each bin, and weights [E] of the bets, which sum to 1.

    Args:
        sizes: Number of intervals in each bin [K], starting with the bin of the highest scores.
    """
    shares = sizes.double().cumsum(0)[:-1] / sizes.sum()
    place = torch.arange(len(sizes))
    upper: list[Tensor] = []
    lower: list[Tensor] = []
    for i, share in enumerate(shares.tolist()):
        tail, inside, strengths, kind = (
            (share, place <= i, _UPPER, upper) if share <= 0.5 else (1 - share, place > i, _LOWER, lower)
        )
        kind += [1 - strength + strength / tail * inside.double() for strength in strengths]
    share_upper = 1.0 if not lower else _SHARE_UPPER if upper else 0.0
    weights = [share_upper / max(1, len(upper))] * len(upper) + [(1 - share_upper) / max(1, len(lower))] * len(lower)
    return torch.stack([*upper, *lower]), torch.tensor(weights, dtype=torch.float64)

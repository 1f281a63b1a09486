"""Detects drift in a stream of inputs, with a bounded probability of a false alarm over a stream of any length."""

import json
import math
import uuid
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.callbacks.ood_alarm import OODAlarm
from lightning_uq.errors import InputError, without_period
from lightning_uq.functional.drift import DriftTest, RankBins
from lightning_uq.functional.hashing import chain, chain_last, to_uniform
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_floating, check_integer, check_open_unit, check_shape
from lightning_uq.json_text import read_json
from lightning_uq.predictions import Prediction

_ROWS_AT_ONCE = 2**20

_KIND, _VERSION = "lightning_uq.DriftMonitor", 1
Scores: TypeAlias = Tensor | np.ndarray[Any, Any]


class DriftMonitor:
    """Tests after every row whether a stream's scores still have the distribution of the alarm's held-out rows.

    If they do, the probability that :attr:`drifted` ever becomes true is at most ``false_alarm_probability``, for a stream of any length and any number of looks. This
    guarantee needs exchangeable rows. Consecutive rows that resemble each other, such as the frames of a video, look like a drift: subsample such a stream first. The
    monitor detects any change that affects the scores: unknown inputs, a broken sensor, or another mix of the known classes.

    The monitor ranks each score among the held-out rows and all earlier rows of the stream. It keeps about a hundred numbers, for any number of rows.

    - On one process: call :meth:`update` for each batch.
    - On several processes: each worker updates its own monitor with its own ``seed``, and one process merges them as often as needed (:meth:`merge`).
      The guarantee holds for the merged monitor. Testing a worker's own :attr:`drifted` too is an additional test.
    - After a restart: use :meth:`to_json` and :meth:`from_json`.

    Args:
        alarm: A fitted :class:`OODAlarm`, or scores [n] of held-out in-distribution rows, as a tensor or a numpy array.
        false_alarm_probability: The bound on the probability of a false alarm, in (0, 1).
        seed: Seed of the random numbers that break ties. Merged monitors need different seeds.

    Attributes:
        drift_row: The number of rows after which the drift was detected, or None.

    Raises:
        NotFittedError: The alarm is not fitted.
        InputError: An argument is invalid.

    Source: Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005 (conformal test martingales). The bets, and a simulation of their delays, are in
    :class:`~lightning_uq.functional.drift.DriftTest` and ``benchmarks/drift_study.md``.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> monitor = DriftMonitor(torch.randn(500, generator=draw))
        >>> monitor.update(torch.randn(2000, generator=draw))
        False
        >>> monitor.update(torch.randn(2000, generator=draw) + 0.5)
        True
        >>> monitor.drift_row
        2130
    """

    def __init__(self, alarm: OODAlarm | Scores, *, false_alarm_probability: float = 0.05, seed: int = 0) -> None:
        check_open_unit("false_alarm_probability", false_alarm_probability)
        check_integer("seed", seed, 0)
        self.false_alarm_probability = false_alarm_probability
        self.seed = seed
        scores = alarm.scores if isinstance(alarm, OODAlarm) else alarm
        self.bins = RankBins.of(_as_tensor("alarm", scores, "a fitted OODAlarm"))
        self.reset()

    def reset(self) -> None:
        """Start again without rows, for instance after a drift was handled. A monitor that merged this one must be reset too."""
        self._id = uuid.uuid4().hex
        self._test = DriftTest.start(self.bins.sizes)
        self._merged: dict[str, Tensor] = {}
        self._seeds: dict[int, str] = {}  # of the merged monitors
        self._largest = 0.0
        self.drift_row: int | None = None

    # ------------------------------------------------------------------ results

    @property
    def drifted(self) -> bool:
        """Whether a drift was detected. It stays true until :meth:`reset`."""
        return self.drift_row is not None

    @property
    def num_rows(self) -> int:
        """The number of rows so far, including those of merged monitors."""
        return self._test.num_rows

    @property
    def log10_evidence(self) -> float:
        """The decimal logarithm of the current evidence for a drift. Evidence starts at 1; a drift is detected when it reaches 1 / ``false_alarm_probability``."""
        return self._test.log_capital / math.log(10)

    @property
    def p_value(self) -> float:
        """The p-value of "no drift so far", valid at any time: 1 / the largest evidence so far."""
        return min(1.0, math.exp(-self._largest))

    # ------------------------------------------------------------------ rows

    def update(self, rows: Prediction | Scores) -> bool:
        """Add rows in their order of arrival, and return whether a drift was detected so far.

        Args:
            rows: Predictions with the alarm's result, or their scores [B] as a tensor or a numpy array. The scores must be of the kind that the monitor was made with. NaN and
                plus infinity count as the highest score.

        Raises:
            NotFittedError: The prediction carries no result of an alarm.
            InputError: The scores have another type or shape.
        """
        if isinstance(rows, Prediction):
            p_value = rows.ood_p_value  # read first, since a prediction with only a density has a score too
            self._check_alarm(rows.ood_score, p_value)
            rows = rows.ood_score
        scores = _as_tensor("rows", rows, "a prediction")
        if len(scores):
            self._add_seeds({self.seed: self._id})
        numbers = torch.arange(self.num_rows, self.num_rows + len(scores))
        return self._advance(self.bins(scores.detach(), to_uniform(chain_last(chain(2, self.seed), numbers))))

    def _check_alarm(self, score: Tensor, p_value: Tensor) -> None:
        """Reject the result of another alarm. A p-value gives the number of held-out scores that are at least as high, and so bounds the score."""
        wide, num_higher = (
            to_float64(score).cpu()[:, None],
            (to_float64(p_value).cpu()[:, None] * self.bins.sizes.sum() - 1).round(),
        )
        margin, above = 1e-4 * self.bins.edges.abs() + 1e-12, self.bins.sizes.cumsum(0)[:-1]
        wrong = ((wide > self.bins.edges + margin) & (num_higher >= above)) | (
            (wide < self.bins.edges - margin) & (num_higher < above)
        )
        if bool((wrong.any(1) & wide.isfinite().squeeze(1)).any()):
            raise InputError(
                "`rows` carry the result of an alarm other than the one of this monitor: their p-values do not match its held-out "
                "scores."
            )

    def merge(self, other: "DriftMonitor") -> bool:
        """Add the rows of another monitor that were not merged before, and return whether a drift was detected so far.

        The other monitor does not change, so it can be merged again after more rows. Its new rows are added in a random order, since a monitor does not store their order.
        Merge often, because rare merges delay the detection. Choose the times of merging independently of the scores, and merge all workers: merging only those that look unusual
        invalidates the guarantee. Merge each worker's rows only once. ``drift_row`` counts the merged rows here, and a worker's own rows in the worker.

        Raises:
            InputError: The other monitor was made with other held-out rows, is an earlier state of a merged one, or has the seed of another
                merged monitor.
        """
        if not torch.equal(self.bins.edges, other.bins.edges) or not torch.equal(self.bins.sizes, other.bins.sizes):
            raise InputError(
                "`other` was made with other held-out rows than this monitor, so it cannot be merged. Make both with the same alarm."
            )
        if other._id == self._id:
            raise InputError("`other` must be another monitor, but it is this one or a copy read from its JSON.")
        new = other._test.counts - self._merged.get(other._id, torch.zeros_like(other._test.counts))
        if bool((new < 0).any()):
            raise InputError("`other` is an earlier state of a monitor that was already merged.")
        self._add_seeds(other._seeds)
        self._merged[other._id] = other._test.counts
        draw = np.random.default_rng([self.seed, self.num_rows])
        for part in _shuffled(new, draw):
            self._advance(part)
        return self.drifted

    def _add_seeds(self, seeds: dict[int, str]) -> None:
        used_twice = [seed for seed, owner in seeds.items() if self._seeds.get(seed, owner) != owner]
        if used_twice:
            raise InputError(
                f"Two monitors with seed={used_twice[0]} cannot be merged, because they break ties in the same way. Give each monitor its own "
                "`seed`."
            )
        self._seeds |= seeds

    def _advance(self, bins: Tensor) -> bool:
        start = self.num_rows
        self._test, capital = self._test.advance(bins)
        if len(capital):
            self._largest = max(self._largest, float(capital.max()))
        found = (capital >= -math.log(self.false_alarm_probability)).nonzero()
        if self.drift_row is None and len(found):
            self.drift_row = start + int(found[0]) + 1
        return self.drifted

    # ------------------------------------------------------------------ serialization

    def to_json(self) -> str:
        """The complete state as a few kB of JSON, for :meth:`from_json`."""
        content = {
            "format": _KIND,
            "version": _VERSION,
            "id": self._id,
            "false_alarm_probability": self.false_alarm_probability,
            "seed": self.seed,
            "edges": self.bins.edges.tolist(),
            "ties": self.bins.ties.tolist(),
            "sizes": self.bins.sizes.tolist(),
            "counts": self._test.counts.tolist(),
            "log_bets": [value if math.isfinite(value) else None for value in self._test.log_bets.tolist()],
            "largest": self._largest,
            "drift_row": self.drift_row,
            "merged": {name: counts.tolist() for name, counts in self._merged.items()},
            "seeds": list(self._seeds.items()),
        }
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The monitor that :meth:`to_json` wrote. The alarm is not needed.

        Raises:
            InputError: The text is not a monitor, or a later version wrote it.

        Example:
            >>> monitor = DriftMonitor(torch.randn(500, generator=torch.Generator().manual_seed(0)))
            >>> _ = monitor.update(torch.zeros(10))
            >>> DriftMonitor.from_json(monitor.to_json()).num_rows
            10
        """
        content = read_json(text, _KIND, _VERSION)
        try:
            return cls._of(content)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"`text` is damaged: {type(error).__name__}: {without_period(error)}.") from error

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Self:
        monitor = cls(torch.zeros(1), false_alarm_probability=content["false_alarm_probability"], seed=content["seed"])
        edges, ties = (torch.tensor(content[name], dtype=torch.float64) for name in ("edges", "ties"))
        sizes, counts = (torch.tensor(content[name], dtype=torch.long) for name in ("sizes", "counts"))
        log_bets = torch.tensor([-math.inf if one is None else one for one in content["log_bets"]], dtype=torch.float64)
        monitor.bins = RankBins(edges, ties, sizes)
        if not len(edges) == len(ties) == len(sizes) - 1 == len(counts) - 1 or len(log_bets) != len(
            DriftTest.start(sizes).log_bets
        ):
            raise ValueError("its lists have inconsistent lengths")
        monitor._test = DriftTest(sizes, counts, log_bets)
        monitor._id, monitor._largest, monitor.drift_row = content["id"], content["largest"], content["drift_row"]
        monitor._merged = {name: torch.tensor(one, dtype=torch.long) for name, one in content["merged"].items()}
        monitor._seeds = dict(content["seeds"])
        return monitor


def _as_tensor(name: str, scores: object, other: str) -> Tensor:
    """Scores [n] as a tensor; ``other`` names the alternative to scores, for the error."""
    if isinstance(scores, np.ndarray) and scores.dtype.kind == "f":
        scores = torch.from_numpy(scores.astype(np.float64))
    if not isinstance(scores, Tensor):
        found = f"an array of {scores.dtype}" if isinstance(scores, np.ndarray) else f"a {type(scores).__name__}"
        raise InputError(
            f"`{name}` must be {other}, or scores [n]: a floating-point tensor or numpy array. It is {found}."
        )
    check_floating(name, scores, 1, "[n]")
    check_shape(name, scores, torch.Size([scores.numel()]))
    return scores


def _shuffled(counts: Tensor, draw: np.random.Generator) -> Iterator[Tensor]:
    """The bins of all rows, given the number of rows per bin, in a random order and in parts that fit into memory."""
    left = counts.numpy().copy()
    while left.sum():
        part = draw.multivariate_hypergeometric(left, min(_ROWS_AT_ONCE, int(left.sum())), method="marginals")
        left -= part
        yield torch.from_numpy(draw.permutation(np.repeat(np.arange(len(left)), part)))

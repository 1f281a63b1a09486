"""The nonconformity scores of calibration rows, which give a threshold for any level, group and weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.conformal import (
    conformal_quantile,
    exact_fraction,
    group_quantiles,
    weighted_conformal_quantile,
)
from lightning_uq.functional.validation import check_floating, check_shape

_MAX_GROUP = 2**20


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of calibration rows, with the group or the weight of each row, if there are any.

    Args:
        scores: Scores [N, ...]; NaN marks a missing target, which is left out.
        groups: The group of each row [N]; each group has a separate threshold.
        weights: The weight of each row [N], for a known covariate shift.

    Raises:
        InputError: Both groups and weights are given, groups are not integers from 0 to 2^20, or weights are negative or not finite.

    Example:
        >>> held_out = HeldOutScores(torch.arange(1.0, 20.0))
        >>> held_out.threshold(0.1)
        tensor(18., dtype=torch.float64)
    """

    scores: Tensor
    groups: Tensor | None = None
    weights: Tensor | None = None

    _found: dict[tuple[float, int | None], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.groups is not None and self.weights is not None:
            raise InputError("`groups` and `weights` exclude each other. Pass one of them.")
        if self.groups is not None:
            _check_integers(self.groups)
            check_shape("groups", self.groups, self.scores.shape[:1])
            if bool(((self.groups < 0) | (self.groups > _MAX_GROUP)).any()):
                raise InputError(f"`groups` must be numbered from 0 and at most {_MAX_GROUP}, but some are not.")
        if self.weights is not None:
            check_floating("weights", self.weights, 1, "[N]")
            check_shape("weights", self.weights, self.scores.shape[:1])
            if not bool(((self.weights >= 0) & self.weights.isfinite()).all()):
                raise InputError("`weights` must be finite and non-negative, but they hold other values.")

    @property
    def num_groups(self) -> int:
        """G: the largest group of a calibration row, plus one; 0 without groups."""
        return 0 if self.groups is None or not len(self.groups) else int(self.groups.max()) + 1

    def threshold(self, alpha: float, groups: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The threshold [...] of new rows; [B, ...] if each row has a group or a weight.

        Args:
            alpha: Share of new rows that may exceed it.
            groups: The new rows' groups [B]. A group without calibration rows gets plus infinity.
            weights: The new rows' weights [B]. A non-finite weight gets plus infinity.

        Raises:
            InputError: The groups or weights of the new rows are missing, or the calibration rows have none.
        """
        for name, own, new in (("groups", self.groups, groups), ("weights", self.weights, weights)):
            if (own is None) != (new is None):
                raise InputError(
                    f"`{name}` of the new rows {'are missing' if new is None else 'were given'}, but the calibration rows have "
                    f"{'them. Pass' if new is None else 'none. Leave out'} `{name}`."
                )
        if groups is not None:
            _check_integers(groups)
            table = self.of_groups(alpha)
            known = (groups >= 0) & (groups < len(table))
            index = torch.where(known, groups.long(), len(table)).to(table.device)
            return torch.cat([table, table.new_full((1, *table.shape[1:]), torch.inf)])[index]
        if weights is not None:
            new = weights.to(self.scores.device)
            missing = ~new.isfinite()  # for example for an input with NaN
            new = new.masked_fill(missing, 0.0)
            found = self._each(
                lambda scores, known: weighted_conformal_quantile(scores, self._weights(known), new, alpha)
            )
            return found.masked_fill(missing.reshape(-1, *[1] * (found.ndim - 1)), torch.inf)
        return self._once(alpha, None, lambda scores, known: conformal_quantile(scores, alpha))

    def of_groups(self, alpha: float, num_groups: int | None = None) -> Tensor:
        """The thresholds of all groups [G, ...]."""
        groups = self.groups
        if groups is None:
            raise InputError("The calibration rows have no groups.")
        number = max(1, self.num_groups if num_groups is None else num_groups)
        return self._once(alpha, number, lambda scores, known: group_quantiles(scores, groups[known], number, alpha))

    def _weights(self, known: Tensor) -> Tensor:
        assert self.weights is not None
        return self.weights[known]

    def _once(self, alpha: float, number: int | None, quantile: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """:meth:`_each`, cached after the first call, because every batch needs the same thresholds."""
        if (alpha, number) not in self._found:
            with torch.inference_mode(False):  # the result is also used in predictions with gradients
                self._found[alpha, number] = self._each(quantile)
        return self._found[alpha, number]

    def _each(self, quantile: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The quantile of each column's known scores: [N, ...] -> the quantile's axes, then [...]."""
        columns = self.scores.reshape(len(self.scores), -1)
        found = []
        for column in columns.T:
            known = ~column.isnan()
            found.append(quantile(column[known], known))
        stacked = torch.stack(found, -1)
        return stacked.reshape([*stacked.shape[:-1], *self.scores.shape[1:]])


def _check_integers(groups: Tensor) -> None:
    if groups.is_floating_point() or groups.is_complex():
        raise InputError(f"`groups` must be integers, but their dtype is {groups.dtype}.")


def rows_needed(alpha: float) -> int:
    """The number of calibration rows that a finite threshold needs: 1 / alpha - 1, rounded up.

    Example:
        >>> rows_needed(0.1), rows_needed(0.03)
        (9, 33)
    """
    return math.ceil(1 / exact_fraction(alpha)) - 1

"""The test rows of each seed: one test set for all seeds, or a new split for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer, describe


@dataclass(frozen=True, init=False, eq=False)
class SeedRows:
    """The test rows of each seed, as ids that identify a row across seeds.

    If all seeds have the same rows, in any order, they form one fixed test set. Otherwise each seed has split the data anew, and a row may be tested
    with several networks. Strata are kinds of rows that a resample draws from separately, such as rows in and out of distribution. One stratum may be
    fixed while another is split anew.

    Args:
        ids: Ids [N_s] of the rows of each seed, integers. Within a stratum, a seed contains each row at most once.
        strata: The stratum of each row, [N_s] per seed, bool or integers; None for a single stratum. Equal ids in different strata are different rows.
        num_train: Number of training rows of a split, or its mean over seeds. Intervals over seeds need it if rows are split anew.

    Attributes:
        positions: Position of each seed's rows among all distinct rows, [N_s] per seed.
        rows: Stratum number (from 0) and id of each distinct row, [2, U].
        is_common: Whether all seeds have the same rows in each of K strata, [K].
        sizes: Number of rows per seed and stratum, [S, K].

    Raises:
        InputError: Ids or strata are not integers [N_s], a seed repeats a row, a seed has fewer than two rows of a stratum, or ``num_train`` is not
            a positive integer.

    Example:
        >>> rows = SeedRows([torch.tensor([4, 7, 9]), torch.tensor([7, 4, 5])])
        >>> rows.positions, rows.is_fixed
        ((tensor([0, 2, 3]), tensor([2, 0, 1])), False)
    """

    num_train: int | None
    rows: Tensor
    positions: tuple[Tensor, ...]
    is_common: Tensor
    sizes: Tensor

    def __init__(
        self, ids: Sequence[Tensor], strata: Sequence[Tensor] | None = None, num_train: int | None = None
    ) -> None:
        if num_train is not None:
            check_integer("num_train", num_train, 1)
        if not len(ids):
            raise InputError("`ids` is empty. Pass the numbers of the test rows of at least one seed.")
        for name, values in (("ids", ids), ("strata", strata)):
            for seed, one in enumerate(values or ()):
                if not isinstance(one, Tensor) or one.ndim != 1 or one.is_floating_point() or one.is_complex():
                    raise InputError(f"`{name}[{seed}]` must be a tensor of integers [N], but it is {describe(one)}.")
        if strata is None:
            strata = [torch.zeros_like(one) for one in ids]
        counts, others = [len(one) for one in ids], [len(one) for one in strata]
        if counts != others:
            raise InputError(
                f"`strata` must name the stratum of each row: {counts} rows per seed, but it has {others}."
            )
        kinds, stratum = torch.unique(torch.cat([one.cpu().long() for one in strata]), return_inverse=True)
        keys = torch.stack([stratum, torch.cat([one.cpu().long() for one in ids])])
        found, positions, appearances = torch.unique(keys, dim=1, return_inverse=True, return_counts=True)
        for name, value in (("num_train", num_train), ("rows", found), ("positions", positions.split(counts))):
            object.__setattr__(self, name, value)  # the dataclass is frozen
        for seed, one in enumerate(self.positions):
            distinct = len(set(one.tolist()))
            if distinct < len(one):
                raise InputError(f"`ids[{seed}]` repeats {len(one) - distinct} rows. Give each test row a unique id.")
        object.__setattr__(
            self, "sizes", torch.stack([torch.bincount(one, minlength=len(kinds)) for one in stratum.split(counts)])
        )
        if int(self.sizes.min()) < 2:
            seed = int(self.sizes.amin(1).argmin())
            raise InputError(
                f"Seed {seed} has {int(self.sizes.min())} test row of a stratum. An interval needs at least two rows."
            )
        is_everywhere = appearances == len(ids)
        object.__setattr__(
            self, "is_common", torch.stack([is_everywhere[self.stratum == kind].all() for kind in range(len(kinds))])
        )

    @property
    def num_seeds(self) -> int:
        """S."""
        return len(self.positions)

    @property
    def num_rows(self) -> int:
        """U, the number of distinct rows."""
        return len(self.stratum)

    @property
    def stratum(self) -> Tensor:
        """The stratum of each distinct row, [U]."""
        stratum: Tensor = self.rows[0]
        return stratum

    @property
    def is_fixed(self) -> bool:
        """Whether all seeds have the same rows."""
        return bool(self.is_common.all())

    @property
    def fewest(self) -> int:
        """The smallest number of rows that a seed has in a stratum."""
        return int(self.sizes.min())

    def variance_share(self) -> float:
        """The variance of the mean over seeds relative to one seed's variance: see :func:`~lightning_uq.functional.seed_difference`.

        Raises:
            InputError: Rows are split anew, but ``num_train`` is unknown.

        Example:
            >>> SeedRows([torch.tensor([1, 2]), torch.tensor([2, 3])], num_train=10).variance_share()
            0.7
        """
        if self.is_fixed:
            return 1 / self.num_seeds
        if self.num_train is None:
            raise InputError(
                "Pass `num_train`, the number of training rows of a split: each seed has its own test rows, so the splits share rows."
            )
        num_test = float(self.sizes[:, ~self.is_common].sum(1).double().mean())
        return 1 / self.num_seeds + num_test / self.num_train

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same rows in the same order."""
        return (
            isinstance(other, SeedRows)
            and self.num_train == other.num_train
            and torch.equal(self.rows, other.rows)
            and self.num_seeds == other.num_seeds
            and all(torch.equal(a, b) for a, b in zip(self.positions, other.positions, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

"""Splits of rows into training, validation and test parts by a seed, independent of the global random state."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_uq.errors import InputError

SPLIT = (0.6, 0.2, 0.2)
"""Shares of training, validation and test samples."""


def stratified_split(
    labels: Tensor, seed: int, shares: Sequence[float] = SPLIT, names: Mapping[int, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a split that keeps the share of every class, each part in random order.

    Args:
        labels: Class labels [N].
        seed: Seed of the split; the global random state does not change.
        shares: Shares of training, validation and test samples, which sum to 1. A part with share 0 is empty.
        names: Names of the labels, for the error. None: the labels themselves.

    Returns:
        Indices of the training, validation and test samples.

    Raises:
        InputError: A class has fewer samples than there are parts.

    Example:
        >>> train, val, test = stratified_split(torch.tensor([0, 1]).repeat(10), seed=0)
        >>> len(train), len(val), len(test)
        (12, 4, 4)
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    least = sum(share > 0 for share in shares)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) < least:
            name = names[label] if names else label
            # A class named by a number may be a count.
            hint = " If the targets are numbers rather than classes, pass task='regression'." if name == label else ""
            raise InputError(
                f"Every class in distribution needs at least {least} samples, one for each part of the split, but "
                f"class {name} has {len(rows)}. Merge it, remove it, or hold it out.{hint}"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, chunk in zip(parts, rows.split(_sizes(len(rows), shares)), strict=True):
            part.append(chunk)
    # Metrics over pairs of consecutive rows need an order in which a row does not predict the next one's class.
    joined = [torch.cat(part) for part in parts]
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in joined)  # type: ignore[return-value]


def random_split(num: int, seed: int, shares: Sequence[float] = SPLIT) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a split of ``num`` rows, each part in random order; the arguments are those of :func:`stratified_split`.

    Raises:
        InputError: There are fewer rows than parts.

    Example:
        >>> [len(part) for part in random_split(10, seed=0)]
        [6, 2, 2]
    """
    least = sum(share > 0 for share in shares)
    if num < least:
        raise InputError(f"The split needs at least {least} rows, one for each part, but there are {num}.")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return order.split(_sizes(num, shares))  # type: ignore[no-any-return, no-untyped-call]


def _sizes(num: int, shares: Sequence[float]) -> list[int]:
    held = [max(1, round(share * num)) if share else 0 for share in shares[1:]]
    return [num - sum(held), *held]

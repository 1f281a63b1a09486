"""Counts, means and scatter matrices of classes, streamed in float64, from which a Gaussian density is fitted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import COVARIANCES, Covariance
from lightning_uq.functional.validation import check_choice, check_integer


class ClassStatistics:
    """Counts, means and scatter matrices of each class, streamed in float64.

    Batches are merged with Chan's update, which never subtracts large sums. Features far from the origin therefore keep
    their precision, and the size and order of batches matter only up to rounding. The statistics are:

    - ``count`` [C] and ``mean`` [C, D];
    - ``scatter``, the sums of squares about the class means: [C, D, D] with ``covariance="full"``, their sum over
      classes [D, D] with ``"tied"``, the diagonals [C, D] with ``"diagonal"``.

    The scatter of all rows about their common mean (the background) follows from these. Small batches are first collected into
    blocks, since a rank-one update of [D, D] costs as much as one of rank 60.

    Args:
        num_classes: C.
        num_features: D.
        covariance: "full", "tied" or "diagonal"; "full" statistics also allow fitting the other two.
        memory_budget: The largest memory of ``scatter`` of all copies, in bytes; a fit needs the same amount in addition.
        device: The device of the sums, which must support float64.
        copies: The number of such statistics that share the budget.

    Raises:
        InputError: ``scatter`` would exceed ``memory_budget``; nothing is allocated then.

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983).

    Example:
        >>> statistics = ClassStatistics(num_classes=2, num_features=1)
        >>> statistics.update(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> statistics.update(torch.tensor([[4.0], [7.0]]), torch.tensor([0, 1]))
        >>> statistics.mean, statistics.scatter[0]
        (tensor([[2.],
                [6.]], dtype=torch.float64), tensor([[8.]], dtype=torch.float64))
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        covariance: Covariance = "full",
        memory_budget: int = 4 * 2**30,
        device: torch.device | str = "cpu",
        copies: int = 1,
    ) -> None:
        check_integer("num_classes", num_classes, 1)
        check_integer("num_features", num_features, 1)
        check_choice("covariance", covariance, COVARIANCES)
        C, D = num_classes, num_features
        shape = {"full": (C, D, D), "tied": (D, D), "diagonal": (C, D)}[covariance]
        size = 8 * math.prod(shape) * copies
        if size > memory_budget:
            smaller = {"full": 'covariance="tied"', "tied": 'covariance="diagonal"'}.get(covariance, "fewer features")
            raise InputError(
                f"The scatter matrices must fit into `memory_budget` ({memory_budget / 2**30:.3g} GiB), "
                f'but {C} classes of {D} features with covariance="{covariance}" take {size / 2**30:.3g} GiB'
                f"{f', in {copies} copies (members and coordinates)' if copies > 1 else ''}. Use "
                f"{smaller}, or raise the budget."
            )
        self.covariance: Covariance = covariance
        with torch.inference_mode(False):  # tensors of inference mode could not be updated outside of it
            self._count = torch.zeros(C, dtype=torch.float64, device=device)
            self._mean = torch.zeros(C, D, dtype=torch.float64, device=device)
            self._scatter = torch.zeros(shape, dtype=torch.float64, device=device)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_rows = 0
        self._block = max(1024, 64 * C) if covariance == "full" else 1024

    @property
    def num_classes(self) -> int:
        """C."""
        return self._mean.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self._mean.shape[1]

    @property
    def count(self) -> Tensor:
        """The number of rows of each class so far, [C]."""
        self._flush()
        return self._count

    @property
    def mean(self) -> Tensor:
        """Mean of each class, [C, D]; zero for a class without rows."""
        self._flush()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """Sums of squares about the class means, in the shape of ``covariance``."""
        self._flush()
        return self._scatter

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: [N, D], of any floating dtype and on any device.
            labels: Class indices [N].

        Raises:
            InputError: Shapes do not match, a label is out of range, or a feature is NaN or infinite. The message names the class.
        """
        self._check(features, labels)
        device = self._mean.device
        for rows, classes in zip(
            torch.split(features.detach(), self._block), torch.split(labels, self._block), strict=True
        ):
            # A copy: the caller may reuse its buffer before the block is full.
            pair = rows.to(device, torch.float64, copy=True), classes.to(device, torch.long, copy=True)
            self._pending.append(pair)
            self._pending_rows += len(rows)
            if self._pending_rows >= self._block:
                self._flush()

    def merge(self, other: ClassStatistics, classes: Tensor | None = None) -> None:
        """Add the rows of ``other``, which does not change.

        Args:
            other: The other statistics.
            classes: The classes here to which its classes correspond; by default the same. With this argument, the covariance must not be tied.

        Raises:
            InputError: The two differ in classes, features or covariance.
        """
        num_classes = self.num_classes if classes is None else len(classes)
        mine, theirs = (self.covariance, num_classes, self.num_features), (other.covariance, *other._mean.shape)
        if mine != theirs:
            raise InputError(
                f"`other` must hold the same covariance, classes and features {mine}, but it holds {theirs}."
            )
        self._flush()
        device = self._mean.device
        count, mean, scatter = (part.to(device) for part in (other.count, other.mean, other.scatter))
        if classes is None or num_classes == self.num_classes:
            self._scatter += scatter
        else:
            count = torch.zeros_like(self._count).index_copy_(0, classes, count)
            mean = torch.zeros_like(self._mean).index_copy_(0, classes, mean)
            for c, part in zip(classes.tolist(), scatter, strict=True):
                self._scatter[c] += part
        self._add_outer(self._merge_means(count, mean))

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Turn this into the statistics of all ranks, by two rounds of sums and without gathering all ranks' matrices.

        The means are summed first. Each rank then shifts its scatter to the common means, after which scatters can be added. The result
        equals :meth:`merge` over all ranks, and is the same on each of them. A rank without rows must also call this method.

        Args:
            all_sum: Returns the sum of a float64 tensor over ranks, in place or not.

        Example:
            >>> statistics = ClassStatistics(1, 1)
            >>> statistics.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
            >>> statistics.reduce(lambda tensor: 2 * tensor)  # as if two ranks had seen the same rows
            >>> statistics.count, statistics.mean, statistics.scatter
            (tensor([4.], dtype=torch.float64), tensor([[2.]], dtype=torch.float64), tensor([[[4.]]], dtype=torch.float64))
        """
        self._flush()
        own_count, own_mean = self._count, self._mean
        self._count = all_sum(own_count.clone())
        self._mean = all_sum(own_count[:, None] * own_mean) / self._count.clamp_min(1)[:, None]
        self._add_outer((own_mean - self._mean) * own_count.sqrt()[:, None])
        self._scatter = all_sum(self._scatter)

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if not features.is_floating_point() or features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(
                f"`features` must be a floating-point tensor [N, {self.num_features}], but it is "
                f"{features.dtype} of shape {list(features.shape)}."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != features.shape[:1]:
            raise InputError(
                f"`labels` must be class indices of shape [{len(features)}], but it is {labels.dtype} of "
                f"shape {list(labels.shape)}."
            )
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise InputError(
                f"`labels` must hold class indices in [0, {self.num_classes}), but it holds {int(wrong[0])}."
            )
        if not bool(features.detach().sum().isfinite()):
            finite = features.isfinite()
            if bool(finite.all()):
                return  # the sum of large numbers overflowed
            row = int((~finite.all(1)).nonzero()[0])
            value = features[row][~finite[row]][0].item()
            raise InputError(f"`features` must be finite, but it holds {value} in a row of class {int(labels[row])}.")

    def _flush(self) -> None:
        if not self._pending:
            return
        x, y = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._pending_rows = [], 0
        order = y.argsort(stable=True)
        x, y = x[order], y[order]
        rows = torch.bincount(y, minlength=self.num_classes)
        count = rows.to(self._count.dtype)
        mean = torch.zeros_like(self._mean).index_add_(0, y, x) / count.clamp_min(1)[:, None]
        x -= mean[y]
        bridge = self._merge_means(count, mean)
        if self.covariance == "full":
            for scatter, part, step in zip(self._scatter, torch.split(x, rows.tolist()), bridge, strict=True):
                if len(part):
                    part = torch.cat([part, step[None]])
                    scatter.addmm_(part.T, part)
        elif self.covariance == "tied":
            self._scatter.addmm_(x.T, x)
            self._add_outer(bridge)
        else:
            self._scatter.index_add_(0, y, x.square())
            self._add_outer(bridge)

    def _merge_means(self, count: Tensor, mean: Tensor) -> Tensor:
        """Merge rows with these counts and means; return [C, D] whose squares are the gain of the scatter by the shift."""
        total = (self._count + count).clamp_min(1)
        step = mean - self._mean
        bridge = step * (self._count * count / total).sqrt()[:, None]
        self._mean += step * (count / total)[:, None]
        self._count += count
        return bridge

    def _add_outer(self, vectors: Tensor) -> None:
        """Add each class's outer product v v^T of [C, D], in the shape of the scatter."""
        if self.covariance == "full":
            for scatter, vector in zip(self._scatter, vectors, strict=True):
                scatter.addr_(vector, vector)
        elif self.covariance == "tied":
            self._scatter.addmm_(vectors.T, vectors)
        else:
            self._scatter += vectors.square()

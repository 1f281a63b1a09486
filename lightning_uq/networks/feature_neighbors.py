"""The training features of all members, in one or two kinds of coordinates, with the distance to the nearest ones as a score."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_uq.functional.feature_transforms import FeatureTransform, transform_features
from lightning_uq.functional.ood_features import NeighborBank, neighbor_bank, neighbor_distance
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.networks.feature_score import FeatureScore, Tail, Tails, tails_from_tensors


class FeatureNeighbors(FeatureScore):
    """The distance [B] of features [M, B, D] to the ``k``-th nearest stored row: everything that :class:`~lightning_uq.FitKNN` fits.

    The score is the mean of the members' distances in the last kind of coordinates. With tails, it is the largest of all scores' -log p,
    where p is the tail probability among held-out rows. A graph computes the distances to all rows, [B, N], at once.

    Args:
        neighbors: The rows of each member [M, N, D]. They are stored in float64, once per kind of coordinates.
        coordinates: The kinds of coordinates.
        k: The rank of the neighbor; the farthest row if there are fewer.
        tails: The tail of the distances for each kind of coordinates.

    Example:
        >>> rows = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> FeatureNeighbors(rows, ["direction"], k=1)(torch.tensor([[[5.0, 0.0], [-1.0, 0.0]]]))
        tensor([0.0000, 1.4142], dtype=torch.float64)
    """

    needs_float64 = True

    def __init__(
        self, neighbors: Tensor, coordinates: Sequence[FeatureTransform], k: int, tails: Tails | None = None
    ) -> None:
        super().__init__()
        self.k = k
        self.num_members = len(neighbors)
        self.banks = nn.ModuleDict(
            {name: nn.ModuleList(_Bank(transform_features(rows, name)) for rows in neighbors) for name in coordinates}
        )
        self.tails = nn.ModuleDict({name: Tail(fit) for name, fit in (tails or {}).items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The score from the tensors of a :class:`~lightning_uq.FitKNN`."""
        return cls(tensors["neighbors"], tensors["coordinates"], tensors["k"], tails_from_tensors(tensors))

    def distance(self, features: Tensor, coordinates: FeatureTransform) -> Tensor:
        """The mean over members of the distance [B] in one kind of coordinates, on the device of the stored rows."""
        rows = transform_features(features, coordinates)
        members: Any = self.banks[coordinates]
        return torch.stack([bank(one, self.k) for bank, one in zip(members, rows, strict=True)]).mean(0)

    def forward(self, features: Tensor) -> Tensor:
        """The out-of-distribution score [B] of features [M, B, D]."""
        if self.tails:
            scores = [tail(self.distance(features, name)) for name, tail in self.tails.items()]  # type: ignore[arg-type]
            score = torch.stack(scores).amax(0)
        else:
            score = self.distance(features, list(self.banks)[-1])  # type: ignore[arg-type]  # the keys are coordinates
        return score.to(wide_dtype(features.device)).to(features.device)


class _Bank(nn.Module):
    """The rows [N, D] of one member."""

    rows: Tensor
    squares: Tensor
    center: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        bank = neighbor_bank(features, normalize=False)
        for name in ("rows", "squares", "center"):
            self.register_buffer(name, getattr(bank, name))

    def forward(self, features: Tensor, k: int) -> Tensor:
        bank = NeighborBank(self.rows, self.squares, self.center, normalize=False)
        return neighbor_distance(features, bank, min(k, len(self.rows)))

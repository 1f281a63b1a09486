"""The densities of all members' features, in one or two kinds of coordinates, and the score from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_uq.functional.feature_transforms import FeatureTransform, transform_features
from lightning_uq.networks.density import DensityScore, GaussianDensity
from lightning_uq.networks.feature_score import FeatureScore, Tail, Tails, tails_from_tensors
from lightning_uq.networks.positions import score_positions


class FeatureDensity(FeatureScore):
    """Scores [B] of features [M, B, D], pooled over members: everything that :class:`~lightning_uq.FitGMM` fits, as one module of buffers.

    The score is that of the density in the last kind of coordinates. With tails, it is the largest of all scores' -log p, where p is the tail
    probability among held-out rows, so features with a rare length or a rare direction have a high score.

    Args:
        parts: The density of each member, by the coordinates of its features.
        tails: The tail of each part's score.
        score: The score: "log_density" (its negative), "mahalanobis" or "relative_mahalanobis".

    Example:
        >>> x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
        >>> density = FeatureDensity({"polar": [GaussianDensity.fit_features(transform_features(x, "polar"), y)]})
        >>> density(x.unsqueeze(0)).shape
        torch.Size([40])
    """

    names = ("log_density", "ood_score")

    def __init__(
        self,
        parts: Mapping[FeatureTransform, Sequence[GaussianDensity]],
        tails: Tails | None = None,
        score: DensityScore = "log_density",
    ) -> None:
        super().__init__()
        self.score = score
        self.parts = nn.ModuleDict({name: nn.ModuleList(members) for name, members in parts.items()})
        self.tails = nn.ModuleDict({name: Tail(fit) for name, fit in (tails or {}).items()})
        self.num_members = len(self.densities)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> Self:
        """Rebuild from the result of :meth:`tensors`; ``dtype`` is that of the scores' products."""
        parts: dict[FeatureTransform, list[GaussianDensity]] = {}
        for name in tensors["coordinates"]:
            parts[name] = []
            for i in range(tensors["num_members"]):
                prefix = f"{name}.{i}."
                parts[name].append(GaussianDensity(dtype=dtype))
                parts[name][-1].load_state_dict(
                    {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                )
        return cls(parts, tails_from_tensors(tensors), tensors["score"])

    def tensors(self) -> dict[str, Any]:
        """Everything as plain data, for a checkpoint."""
        found: dict[str, Any] = {
            "coordinates": list(self.parts),
            "num_members": self.num_members,
            "score": self.score,
        }
        for name in self.parts:
            for i, density in enumerate(self._members(name)):
                found.update({f"{name}.{i}.{key}": value for key, value in density.state_dict().items()})
        for name, tail in self.tails.items():
            found.update({f"{name}.tail.{key}": value for key, value in tail.state_dict().items()})
        return found

    @property
    def densities(self) -> list[GaussianDensity]:
        """The density of each member, in the first kind of coordinates."""
        return self._members(next(iter(self.parts)))

    @property
    def members(self) -> dict[FeatureTransform, list[GaussianDensity]]:
        """The density of each member, by the coordinates of its features."""
        return {name: self._members(name) for name in self.parts}  # type: ignore[misc]  # the keys are coordinates

    @property
    def is_log_density(self) -> bool:
        """Whether the score is minus :meth:`log_density`."""
        return self.score == "log_density" and len(self.parts) == 1

    def _members(self, coordinates: str) -> list[GaussianDensity]:
        members: Any = self.parts[coordinates]
        return list(members)

    def part_score(self, features: Tensor, coordinates: FeatureTransform, score: DensityScore | None = None) -> Tensor:
        """The score [B] of one part for features [M, B, D]. Log-densities are pooled by log-mean-exp, and other scores by the mean."""
        score = self.score if score is None else score
        rows = transform_features(features, coordinates)
        densities = self._members(coordinates)
        members = torch.stack([density.score(f, score) for density, f in zip(densities, rows, strict=True)])
        if score == "log_density":
            return -(torch.logsumexp(-members, 0) - math.log(len(members)))
        return members.mean(0)

    def forward(self, features: Tensor) -> Tensor:
        """The out-of-distribution score [B] of features [M, B, D], in float64."""
        if not self.tails:
            return self.part_score(features, list(self.parts)[-1])  # type: ignore[arg-type]  # the keys are coordinates
        scores = [tail(self.part_score(features, name)) for name, tail in self.tails.items()]  # type: ignore[arg-type]
        return torch.stack(scores).amax(0)

    def results(self, features: Tensor) -> dict[str, Tensor]:
        """``log_density`` and ``ood_score`` [B], or maps [B, *P] for features [M, B, D, *P] at positions."""
        log_density = score_positions(self.log_density, features)
        score = -log_density if self.is_log_density else score_positions(self, features)
        return {"log_density": log_density, "ood_score": score}

    def log_density(self, features: Tensor) -> Tensor:
        """The log-density [B] of features [M, B, D] in the first kind of coordinates, which are the raw ones for "combined"."""
        return -self.part_score(features, next(iter(self.parts)), "log_density")  # type: ignore[arg-type]

    def log_prob(self, features: Tensor) -> Tensor:
        """Log p(f | c) [B, C], without the prior, of features [M, B, D], in the same coordinates."""
        coordinates: Any = next(iter(self.parts))
        rows = transform_features(features, coordinates)
        members = torch.stack([density.log_prob(f) for density, f in zip(self.densities, rows, strict=True)])
        return torch.logsumexp(members, 0) - math.log(len(members))

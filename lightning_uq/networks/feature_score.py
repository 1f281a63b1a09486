"""A fitted score of a network's features, as one module of buffers for callbacks and exported graphs."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_uq.functional.feature_transforms import FeatureTransform
from lightning_uq.functional.precision import move_only, move_wide, to_float64
from lightning_uq.functional.tail import TailFit, tail_score
from lightning_uq.networks.positions import score_positions

Tails = Mapping[FeatureTransform, TailFit]
"""The tail of each score, by the coordinates of its features."""


class FeatureScore(nn.Module, ABC):
    """Out-of-distribution scores [B] of features [M, B, D], pooled over M members. Higher is further out.

    A subclass holds the fit as buffers and computes scores in ``forward``. The buffers move with the module, and keep their
    precision if a module around them is cast. The same instance computes scores for a callback, for predictions and in an exported graph.

    Attributes:
        names: The names of the entries of :meth:`results`, in order.
        needs_float64: Whether the buffers stay on the CPU if a device has no float64. If not, they become float32 there.
        num_members: M.
    """

    names: ClassVar[tuple[str, ...]] = ("ood_score",)
    needs_float64: ClassVar[bool] = False
    num_members: int

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The score from the fitted tensors of a callback."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """The scores [B] of features [M, B, D], in float64 if the device supports it; plus infinity for a row that is not finite."""

    @functools.cached_property
    def summary(self) -> Tensor:
        """Numbers [2, N] in float64 on the CPU that distinguish two fits: mean and standard deviation of the fitted tensors."""
        fitted = [to_float64(t).cpu().reshape(-1) for t in self.buffers() if t.is_floating_point() and t.numel()]
        return torch.stack([torch.stack([t.mean(), t.std(correction=0)]) for t in fitted], 1)

    def results(self, features: Tensor) -> dict[str, Tensor]:
        """The entries that predictions carry, by name: [B], or maps [B, *P] for features [M, B, D, *P] at positions."""
        return {"ood_score": score_positions(self, features)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        move = move_wide if self.needs_float64 else move_only
        super()._apply(functools.partial(move, fn), recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self


class Tail(nn.Module):
    """A fitted tail as buffers. It maps scores [B] to -log p, where p is the share of held-out rows with a score at least as high."""

    knots: Tensor
    values: Tensor
    slopes: Tensor

    def __init__(self, fit: TailFit) -> None:
        super().__init__()
        for name, value in fit._asdict().items():
            self.register_buffer(name, value)

    def forward(self, scores: Tensor) -> Tensor:
        """-log p of scores [B]."""
        return tail_score(scores, TailFit(self.knots, self.values, self.slopes))


def tails_to_tensors(tails: Tails) -> dict[str, Tensor]:
    """Tails as plain data, for a checkpoint."""
    return {f"{name}.tail.{key}": value for name, fit in tails.items() for key, value in fit._asdict().items()}


def tails_from_tensors(tensors: Mapping[str, Any]) -> dict[FeatureTransform, TailFit]:
    """The tails from the tensors of a checkpoint, whose ``coordinates`` name the parts."""
    return {
        name: TailFit(*(tensors[f"{name}.tail.{field}"] for field in TailFit._fields))
        for name in tensors["coordinates"]
        if f"{name}.tail.knots" in tensors
    }

"""Shared by predictions without a variance: their only uncertainty is the spread between hypotheses."""

from abc import abstractmethod
from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction

ADVICE = "use a head with a variance, for instance `Regression(head='mean_variance')`"


class SpreadPrediction(NumberPrediction):
    """The base class of predictions whose only variance is that between hypotheses, of which they need several."""

    score_names: ClassVar[tuple[str, ...]] = ("epistemic_variance",)

    _reason: ClassVar[str] = "it does not predict the noise of the targets"
    """The reason why there is no variance of the target, for the error."""

    members_variance = Field(
        "Variance over the pooled hypotheses [B, D]; absent while the prediction holds the hypotheses.",
        batch_axis=0,
        optional=True,
        unit="variance",
    )

    @property
    def is_pooled(self) -> bool:
        """Whether the members were pooled when the prediction was made."""
        return self._get("members_variance") is not None

    @property
    def num_indices(self) -> int | None:
        """Z, the number of hypotheses; None if they were pooled."""
        return None if self.is_pooled else len(self._members)

    @property
    @abstractmethod
    def _members(self) -> Tensor:
        """The hypotheses [Z, B, ...], or their mean [1, B, ...] if they were pooled."""

    @abstractmethod
    def _spread(self) -> Tensor:
        """The variance over several hypotheses [B, D]."""

    def _listed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name != "epistemic_variance" or self._has_spread)

    @property
    def _has_spread(self) -> bool:
        """Whether there are several hypotheses, or were before pooling."""
        return self.is_pooled or len(self._members) > 1

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over the hypotheses [B, D].

        Raises:
            InputError: There is only one hypothesis.
        """
        if self.is_pooled:
            return self.members_variance
        if len(self._members) == 1:
            raise InputError(
                "The prediction of one network has no `epistemic_variance`: train several networks, for instance with "
                f"EnsembleModule, or {ADVICE}."
            )
        return self._spread()

    @property
    def variance(self) -> Tensor:
        """Raise an error: the spread of the hypotheses does not include the noise of the targets."""
        self._refuse("variance")

    @property
    def aleatoric_variance(self) -> Tensor:
        """Raise an error: the noise of the targets is not predicted."""
        self._refuse("aleatoric_variance")

    def log_prob(self, target: Tensor) -> Tensor:
        """Raise an error: the noise of the targets is not predicted."""
        self._refuse("log_prob")

    def _refuse(self, name: str) -> NoReturn:
        kind = type(self).__name__
        raise InputError(
            f"A {kind} has no `{name}`: {self._reason}. Read `epistemic_variance` of several networks, or {ADVICE}."
        )

    def _pooled(self, **tensors: Tensor | None) -> "SpreadPrediction":
        """A copy with pooled members; the prediction itself if there is one network."""
        if self.is_pooled or len(self._members) == 1:
            return self
        return self.replace(members_variance=self._spread(), **tensors)

    def _member_spread(self) -> dict[str, Tensor]:
        """``epistemic_variance`` for a table, if there is one."""
        return {"epistemic_variance": self.epistemic_variance} if self._has_spread else {}

    def _check(self) -> None:
        super()._check()
        spread = self._get("members_variance")
        if spread is not None and (spread.shape != self.target_shape or len(self._members) != 1):
            raise InputError(
                f"`members_variance` must have shape {list(self.target_shape)} and belongs to pooled members with Z = 1, but its shape is "
                f"{list(spread.shape)} and Z is {len(self._members)}."
            )


def variance_over(members: Tensor) -> Tensor:
    """The variance over axis 0, divided by Z, and computed from centred numbers.

    Example:
        >>> import torch
        >>> variance_over(torch.tensor([[0.0], [2.0]]))
        tensor([1.])
    """
    return (members - members.mean(0)).square().mean(0)

"""What predictions share whose hypotheses say numbers without a variance: their spread is all that is known of it."""

from abc import abstractmethod
from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction

ADVICE = "use a head with a variance, for instance `Regression(head='mean_variance')`"


class SpreadPrediction(NumberPrediction):
    """The base of predictions whose only variance is that between hypotheses, of which there must be several."""

    score_names: ClassVar[tuple[str, ...]] = ("epistemic_variance",)

    _reason: ClassVar[str] = "it knows nothing of the noise of the targets"
    """Why there is no variance of the target, in the error for it."""

    members_variance = Field(
        "Variance over the hypotheses [B, D] that were pooled; absent while the prediction has them.",
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
        """Whether there are, or were, several hypotheses."""
        return self.is_pooled or len(self._members) > 1

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over the hypotheses [B, D].

        Raises:
            InputError: There is one hypothesis alone.
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
        """Not known: the spread of the hypotheses leaves out the noise of the targets."""
        self._refuse("variance")

    @property
    def aleatoric_variance(self) -> Tensor:
        """Not known."""
        self._refuse("aleatoric_variance")

    def log_prob(self, target: Tensor) -> Tensor:
        """Not known."""
        self._refuse("log_prob")

    def _refuse(self, name: str) -> NoReturn:
        kind = type(self).__name__
        raise InputError(
            f"A {kind} has no `{name}`: {self._reason}. Read `epistemic_variance` of several networks, or {ADVICE}."
        )

    def _pooled(self, **tensors: Tensor | None) -> "SpreadPrediction":
        """A copy with pooled members; the prediction itself where one network has none to pool."""
        if self.is_pooled or len(self._members) == 1:
            return self
        return self.replace(members_variance=self._spread(), **tensors)

    def _member_spread(self) -> dict[str, Tensor]:
        """``epistemic_variance`` for a table, where there is one."""
        return {"epistemic_variance": self.epistemic_variance} if self._has_spread else {}

    def _check(self) -> None:
        super()._check()
        spread = self._get("members_variance")
        if spread is not None and (spread.shape != self.target_shape or len(self._members) != 1):
            raise InputError(
                f"`members_variance` must have shape {list(self.target_shape)} beside pooled members, Z = 1, but its shape is "
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

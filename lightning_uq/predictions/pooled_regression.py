"""The prediction of a regressor whose members were pooled."""

from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction


class PooledRegressionPrediction(NumberPrediction):
    """A regressor's prediction without its members: its mean and the two parts of its variance.

    A module returns it instead of a prediction with more than 32 members, which is Z times larger, and :meth:`pool` of a prediction
    with members returns it too. A density, a quantile or an interval needs the members.

    Args:
        mean: E[y] [B, D].
        aleatoric_variance: Mean over the hypotheses of their predicted variance [B, D].
        epistemic_variance: Variance of the hypotheses' means [B, D].
        inverse_nu: mean_z 1 / nu [B, D] of a pooled normal-inverse-gamma.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes differ or have fewer than two axes.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import GaussianMixturePrediction
        >>> GaussianMixturePrediction(torch.zeros(1000, 2, 1), torch.ones(1000, 2, 1)).pool().variance
        tensor([[1.],
                [1.]])
    """

    _hint: ClassVar[str] = (
        " The other scores need the members, which were pooled: set `module.return_members = True` to keep them."
    )

    mean = Field("E[y] [B, D].", batch_axis=0)
    aleatoric_variance = Field(
        "Mean over the hypotheses of their predicted variance [B, D].", batch_axis=0, unit="variance"
    )
    epistemic_variance = Field("Variance of the hypotheses' means [B, D].", batch_axis=0, unit="variance")
    inverse_nu = Field("mean_z 1 / nu [B, D]; only for a normal-inverse-gamma.", batch_axis=0, optional=True)

    @property
    def score_names(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the type that was pooled
        """The names that :meth:`score` takes; a pooled normal-inverse-gamma also has ``inverse_nu``."""
        further = () if self._get("inverse_nu") is None else ("inverse_nu",)
        return (*NumberPrediction.score_names, *further)

    def _check(self) -> None:
        self._check_shapes("[B, D]", "mean", "aleatoric_variance", "epistemic_variance")
        super()._check()

    def pool(self) -> "PooledRegressionPrediction":
        """The prediction itself."""
        return self

    @property
    def member_mean(self) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("member_mean")

    @property
    def member_variance(self) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("member_variance")

    def components(self) -> Components:
        """Raise an error: the members were pooled."""
        self._raise("components")

    def log_prob(self, target: Tensor) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("log_prob")

    def quantile(self, level: float) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("quantile")

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Raise an error: the members were pooled."""
        self._raise("interval")

    def cdf(self, target: Tensor) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("cdf")

    def crps(self, target: Tensor) -> Tensor:
        """Raise an error: the members were pooled."""
        self._raise("crps")

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, and ``log_density`` if fitted.

        Raises:
            InputError: An ``interval`` was requested.
        """
        if interval is not None:
            raise InputError(
                f"The bounds of an interval (interval={interval}) need the members, which were pooled when this prediction was "
                "made. Set `module.return_members = True` to keep them, or interval=None to leave out the bounds."
            )
        return super().to_dict()

    def _raise(self, name: str) -> NoReturn:
        raise InputError(
            f"`{name}` needs the members, which were pooled when this prediction was made. Set "
            "`module.return_members = True` to keep them."
        )

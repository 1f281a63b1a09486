"""The prediction of a regressor whose members were pooled."""

from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.components import Components
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction


class PooledRegressionPrediction(NumberPrediction):
    """A regressor's prediction without its members: its mean and the two parts of its variance.

    A module makes it in place of a prediction with more than 32 members, which are Z times larger; :meth:`pool` of a
    prediction with members makes it, too. A density, a quantile and an interval need the members.

    Args:
        mean: E[y] [B, D].
        aleatoric_variance: [B, D].
        epistemic_variance: [B, D].
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
        " The others need the members, which were pooled: set `module.return_members = True` to keep them."
    )

    mean = Field("E[y] [B, D].", batch_axis=0)
    aleatoric_variance = Field(
        "Mean over the hypotheses of the variance that each of them expects [B, D].", batch_axis=0, unit="variance"
    )
    epistemic_variance = Field("Variance of the hypotheses' means [B, D].", batch_axis=0, unit="variance")
    inverse_nu = Field("mean_z 1 / nu [B, D]; of a normal-inverse-gamma alone.", batch_axis=0, optional=True)

    @property
    def score_names(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on what was pooled
        """The names that :meth:`score` takes; a pooled normal-inverse-gamma has ``inverse_nu``, too."""
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
        """Not held."""
        self._raise("member_mean")

    @property
    def member_variance(self) -> Tensor:
        """Not held."""
        self._raise("member_variance")

    def components(self) -> Components:
        """Not defined without the members."""
        self._raise("components")

    def log_prob(self, target: Tensor) -> Tensor:
        """Not defined without the members."""
        self._raise("log_prob")

    def quantile(self, level: float) -> Tensor:
        """Not defined without the members."""
        self._raise("quantile")

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Not defined without the members."""
        self._raise("interval")

    def cdf(self, target: Tensor) -> Tensor:
        """Not defined without the members."""
        self._raise("cdf")

    def crps(self, target: Tensor) -> Tensor:
        """Not defined without the members."""
        self._raise("crps")

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, and ``log_density`` if there is one.

        Raises:
            InputError: An ``interval`` was asked for.
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

"""The prediction of an evidential regressor."""

from typing import ClassVar, Literal

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions.fields import Field
from lightning_uq.predictions.numbers import NumberPrediction
from lightning_uq.predictions.student_t_mixture import StudentTMixturePrediction


class StudentTPrediction(StudentTMixturePrediction):
    """An evidential regressor's prediction: one normal-inverse-gamma per hypothesis, hence a Student-t over the target.

    mu ~ N(location, sigma^2 / nu) and sigma^2 ~ Inverse-Gamma(alpha, beta), so the target has a Student-t distribution with 2 alpha
    degrees of freedom, this location and the squared scale beta (1 + nu) / (nu alpha). Several hypotheses form an equal-weight
    mixture; the D dimensions are independent given the hypothesis.

    Args:
        location: gamma [Z, B, D]; Z = 1 for one network.
        nu: [Z, B, D], positive.
        alpha: [Z, B, D], above 1.
        beta: [Z, B, D], positive.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes differ or have fewer than three axes, or a value is out of range.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1)
        >>> prediction = StudentTPrediction(0 * one, 2 * one, 3 * one, 4 * one)
        >>> prediction.aleatoric_variance, prediction.epistemic_variance, prediction.variance
        (tensor([[2.]]), tensor([[1.]]), tensor([[3.]]))
    """

    score_names: ClassVar[tuple[str, ...]] = (*NumberPrediction.score_names, "inverse_nu")

    location = Field("gamma [Z, B, D].", batch_axis=1, unit="location")
    nu = Field("nu [Z, B, D], the evidence for the location.", batch_axis=1)
    alpha = Field("alpha [Z, B, D], the shape of the inverse gamma.", batch_axis=1)
    beta = Field("beta [Z, B, D], the scale of the inverse gamma.", batch_axis=1, unit="variance")

    def _check_values(self) -> None:
        if not bool(((self.nu > 0) & (self.alpha > 1) & (self.beta > 0)).all()):
            raise InputError("`nu` and `beta` must be positive and `alpha` above 1, but some of their values are not.")

    @property
    def degrees_of_freedom(self) -> Tensor:  # type: ignore[override]  # computed from the parameters
        """2 alpha [Z, B, D]."""
        return 2 * self.alpha

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # computed from the parameters
        """Scale of each Student-t [Z, B, D]: sqrt(beta (1 + nu) / (nu alpha))."""
        # Division comes first: products of large parameters would overflow.
        return (self.beta / self.alpha * (1 + 1 / self.nu)).sqrt()

    @property
    def aleatoric_variance(self) -> Tensor:
        """mean_z E[sigma^2 | z] = mean_z beta / (alpha - 1) [B, D], by Amini's definition."""
        return (self.beta / (self.alpha - 1)).mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """mean_z Var[mu | z] + Var_z[location] [B, D], with Var[mu | z] = beta / (nu (alpha - 1)) by Amini's definition."""
        within = (self.beta / (self.alpha - 1) / self.nu).mean(0)
        return within + (self.location - self.mean).square().mean(0)

    @property
    def inverse_nu(self) -> Tensor:
        """mean_z 1 / nu [B, D]: the variance of mu relative to that of the noise."""
        return (1 / self.nu).mean(0)

    def uncertainties(self, reading: Literal["amini", "meinert"] = "amini") -> tuple[Tensor, Tensor]:
        """Aleatoric and epistemic uncertainty, each [B, D], by the definition of one of two papers.

        - ``"amini"``: the square roots of ``aleatoric_variance`` and ``epistemic_variance``, in the target's units;
        - ``"meinert"``: the Student-t's scale, in the target's units, and 1 / sqrt(nu), relative to it and without unit. It is
          defined only for one hypothesis.

        Raises:
            InputError: ``reading`` is unknown, or there are several hypotheses for ``"meinert"``.
        """
        if reading == "amini":
            return self.aleatoric_variance.sqrt(), self.epistemic_variance.sqrt()
        if reading != "meinert":
            raise InputError(f"`reading` must be 'amini' or 'meinert', but it is {reading!r}.")
        if self.num_indices != 1:
            raise InputError(
                f"reading='meinert' is defined only for one hypothesis, but the prediction has {self.num_indices}. Read `scale` and "
                "`nu` [Z, B, D], or use reading='amini'."
            )
        return self.scale[0], self.nu[0].rsqrt()

    def _further_moments(self) -> dict[str, Tensor]:
        return {"inverse_nu": self.inverse_nu}

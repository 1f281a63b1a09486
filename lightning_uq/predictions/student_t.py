"""The prediction of an evidential regressor."""

from typing import ClassVar, Literal

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import student_t
from lightning_uq.predictions.base import Prediction


class StudentTPrediction(Prediction):
    """An evidential regressor's prediction: a normal-inverse-gamma over mean and variance, a Student-t over the target.

    mu ~ N(location, sigma^2 / nu), sigma^2 ~ Inverse-Gamma(alpha, beta), so that the target is Student-t with 2 alpha degrees
    of freedom, this location and the squared scale beta (1 + nu) / (nu alpha).

    Args:
        location: gamma [B, D].
        nu: [B, D], positive.
        alpha: [B, D], above 1.
        beta: [B, D], positive.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: The shapes differ, have not two axes, or a value is out of range.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> one = torch.ones(1, 1)
        >>> prediction = StudentTPrediction(0 * one, 2 * one, 3 * one, 4 * one)
        >>> prediction.aleatoric_variance, prediction.epistemic_variance, prediction.variance
        (tensor([[2.]]), tensor([[1.]]), tensor([[3.]]))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {"location": 0, "nu": 0, "alpha": 0, "beta": 0, "log_density": 0}

    def __init__(
        self, location: Tensor, nu: Tensor, alpha: Tensor, beta: Tensor, log_density: Tensor | None = None
    ) -> None:
        self._set(location=location, nu=nu, alpha=alpha, beta=beta, log_density=log_density)
        shapes = [list(x.shape) for x in (location, nu, alpha, beta)]
        if location.ndim != 2 or any(shape != shapes[0] for shape in shapes):
            raise InputError(
                "Expected arguments `location`, `nu`, `alpha` and `beta` to be of one shape [B, D], but got "
                f"{', '.join(map(str, shapes))}."
            )
        if not bool(((nu > 0) & (alpha > 1) & (beta > 0)).all()):
            raise InputError("Expected arguments `nu` and `beta` to be positive and `alpha` above 1, but they are not.")

    @property
    def mean(self) -> Tensor:
        """E[y] = location [B, D]."""
        return self._get("location")

    @property
    def degrees_of_freedom(self) -> Tensor:
        """2 alpha [B, D]."""
        return 2 * self._get("alpha")

    @property
    def scale(self) -> Tensor:
        """Scale of the Student-t [B, D]: sqrt(beta (1 + nu) / (nu alpha))."""
        # Divided first: products of large parameters would overflow.
        return (self._get("beta") / self._get("alpha") * (1 + 1 / self._get("nu"))).sqrt()

    @property
    def variance(self) -> Tensor:
        """Var[y] = beta (1 + nu) / (nu (alpha - 1)) [B, D]: the sum of the next two."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def aleatoric_variance(self) -> Tensor:
        """E[sigma^2] = beta / (alpha - 1) [B, D]: Amini's reading."""
        return self._get("beta") / (self._get("alpha") - 1)

    @property
    def epistemic_variance(self) -> Tensor:
        """Var[mu] = beta / (nu (alpha - 1)) [B, D]: Amini's reading."""
        return self.aleatoric_variance / self._get("nu")

    def uncertainties(self, reading: Literal["amini", "meinert"] = "amini") -> tuple[Tensor, Tensor]:
        """Aleatoric and epistemic uncertainty, each [B, D], as one of two papers reads them.

        - ``"amini"``: the standard deviations sqrt(beta / (alpha - 1)) and sqrt(beta / (nu (alpha - 1))), in the target's units;
        - ``"meinert"``: the Student-t's scale, in the target's units, and 1 / sqrt(nu), relative to it and without unit.

        Raises:
            InputError: ``reading`` is neither.
        """
        if reading == "amini":
            return self.aleatoric_variance.sqrt(), self.epistemic_variance.sqrt()
        if reading == "meinert":
            return self.scale, self._get("nu").rsqrt()
        raise InputError(f"Expected argument `reading` to be 'amini' or 'meinert', but got {reading!r}.")

    def log_prob(self, target: Tensor) -> Tensor:
        """sum_d log St(target_d): [B] in float64 for ``target`` [B, D]."""
        return student_t.student_t_log_prob(self._checked(target), *self._student_t).sum(-1)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] in float64."""
        return student_t.student_t_cdf(self._checked(target), *self._student_t)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] in float64, in the target's units; lower is better."""
        return student_t.student_t_crps(self._checked(target), *self._student_t)

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] at a ``level`` in (0, 1), in float64."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return student_t.student_t_quantile(level, *self._student_t)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that holds a share ``level`` of the Student-t."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        upper = self.quantile((1 + level) / 2)
        return 2 * self.mean - upper, upper

    def to_dict(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, ``degrees_of_freedom``, ``scale``, and ``log_density`` if there is one."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "aleatoric_variance": self.aleatoric_variance,
            "epistemic_variance": self.epistemic_variance,
            "degrees_of_freedom": self.degrees_of_freedom,
            "scale": self.scale,
            **self._optional(),
        }

    @property
    def _student_t(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.degrees_of_freedom, self.mean, self.scale

    def _checked(self, target: Tensor) -> Tensor:
        if target.shape != self.mean.shape:
            raise InputError(
                f"Expected argument `target` to be of shape {list(self.mean.shape)}, but got {list(target.shape)}; an array "
                "of another shape would broadcast."
            )
        return target

"""The prediction of an evidential classifier."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import dirichlet
from lightning_uq.predictions.class_probabilities import ClassProbabilities


class DirichletPrediction(ClassProbabilities):
    """An evidential classifier's prediction: a Dirichlet over class probabilities.

    Args:
        concentration: alpha [B, C] (or [B, C, ...]), positive.
        temperature: Scalar T that tempers the mean probabilities alone.
        class_scaling: Scale and bias [2, C] of a vector scaling of the mean probabilities alone.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Example:
        >>> prediction = DirichletPrediction(torch.tensor([[3.0, 1.0]]))
        >>> prediction.probs, prediction.vacuity
        (tensor([[0.7500, 0.2500]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {
        "concentration": 0,
        "temperature": None,
        "class_scaling": None,
        "log_density": 0,
    }

    def __init__(
        self,
        concentration: Tensor,
        temperature: Tensor | None = None,
        log_density: Tensor | None = None,
        class_scaling: Tensor | None = None,
    ) -> None:
        look = isinstance(concentration, Tensor) and not torch.compiler.is_compiling()  # a graph holds no values
        if look and (concentration.ndim < 2 or not bool((concentration > 0).all())):
            raise InputError(
                "Expected argument `concentration` to be positive and of shape [B, C], but got shape "
                f"{list(concentration.shape)}"
                + ("." if concentration.ndim < 2 else " with values that are not positive.")
            )
        self._set(
            concentration=concentration, temperature=temperature, class_scaling=class_scaling, log_density=log_density
        )

    @property
    def concentration(self) -> Tensor:
        """alpha [B, C, ...]."""
        return self._get("concentration")

    @property
    def log_probs(self) -> Tensor:
        """log(alpha / S) [B, C, ...] in float64, after the temperature where there is one."""
        alpha = self.concentration.double()
        return self._calibrated(alpha.log() - alpha.sum(1, keepdim=True).log())

    @property
    def expected_entropy(self) -> Tensor:
        """E[H[p]] in nats: [B, ...]."""
        return dirichlet.dirichlet_expected_entropy(self.concentration)

    @property
    def mutual_information(self) -> Tensor:
        """H[E[p]] - E[H[p]] in nats: [B, ...]."""
        return dirichlet.dirichlet_mutual_information(self.concentration)

    @property
    def differential_entropy(self) -> Tensor:
        """Differential entropy of the Dirichlet in nats: [B, ...]."""
        return dirichlet.dirichlet_differential_entropy(self.concentration)

    @property
    def vacuity(self) -> Tensor:
        """C / S: 1 without any evidence, towards 0 as it grows: [B, ...]."""
        alpha = self.concentration.double()
        return alpha.shape[1] / alpha.sum(1)

    def to_dict(self) -> dict[str, Tensor]:
        """As for any classifier, with ``vacuity`` and ``differential_entropy``."""
        return {**super().to_dict(), "vacuity": self.vacuity, "differential_entropy": self.differential_entropy}

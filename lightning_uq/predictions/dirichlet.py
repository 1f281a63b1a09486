"""The prediction of an evidential classifier."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import dirichlet, entropy
from lightning_uq.functional.precision import widen
from lightning_uq.predictions.class_probabilities import ClassProbabilities
from lightning_uq.predictions.fields import Field


class DirichletPrediction(ClassProbabilities):
    """An evidential classifier's prediction: one Dirichlet over class probabilities per hypothesis.

    Args:
        concentration: alpha [Z, B, C] (or [Z, B, C, ...]), positive; Z = 1 for one network.
        prior: Scalar weight of each class without evidence: concentration = evidence + prior. Default: 1.
        temperature: Scalar T that tempers only the mean probabilities.
        class_scaling: Scale and bias [2, C] of a vector scaling of only the mean probabilities.
        class_matrix: Weights, bias, floor and 1 / T [C + 3, C] of a matrix scaling of only the mean probabilities.
        class_curves: Knots and values [2, C, K] of an isotonic calibration of only the mean probabilities.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: ``concentration`` has fewer than three axes, or values that are not positive.

    Source: Malinin & Gales, NeurIPS 2018 (arXiv 1802.10501); the prior: Chen et al., R-EDL, ICLR 2024.

    Example:
        >>> import torch
        >>> prediction = DirichletPrediction(torch.tensor([[[3.0, 1.0]]]))
        >>> prediction.probs, prediction.vacuity
        (tensor([[0.7500, 0.2500]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """

    score_names: ClassVar[tuple[str, ...]] = (
        "vacuity",
        "mutual_information",
        "differential_entropy",
        "predictive_entropy",
        "expected_entropy",
        "max_softmax",
        "gen",
    )

    concentration = Field("alpha [Z, B, C, ...] of every hypothesis.", batch_axis=1, class_axis=2)
    prior = Field("Weight of each class without evidence; 1 if none was given.", default=1.0)

    def _check(self) -> None:
        self._check_classes("concentration", "[Z, B, C]")
        super()._check()

    def _check_values(self) -> None:
        if not bool((self.concentration > 0).all()):
            raise InputError("`concentration` must be positive, but some of its values are not.")

    @property
    def num_indices(self) -> int:
        """Z, the number of hypotheses."""
        return len(self.concentration)

    @property
    def mean_log_probs(self) -> Tensor:
        """log mean_z alpha_z / S_z [B, C, ...] in float64, before any calibration."""
        return self._once("mean_log_probs", self._mean_log_probs)

    def _mean_log_probs(self) -> Tensor:
        mean: Tensor = torch.logsumexp(self._log_means(), 0) - math.log(self.num_indices)
        return mean

    def _log_means(self) -> Tensor:
        """log alpha_z / S_z [Z, B, C, ...] in float64."""
        alpha = widen(self.concentration)
        return alpha.log() - alpha.sum(2, keepdim=True).log()

    @property
    def uncalibrated_expected_entropy(self) -> Tensor:
        """mean_z E[H[p] | z] in nats, before any pooled calibration: [B, ...]."""
        return self._mean(dirichlet.dirichlet_expected_entropy)

    @property
    def uncalibrated_mutual_information(self) -> Tensor:
        """H[E[p]] - E[H[p]] in nats, over the hypotheses and their Dirichlets, before any calibration: [B, ...].

        It is the Dirichlets' mutual information, averaged over z, plus that of their means. No difference of entropies is computed.
        """
        within = self._mean(dirichlet.dirichlet_mutual_information)
        if self.num_indices == 1:
            return within
        return within + entropy.mutual_information(self._log_means())

    @property
    def differential_entropy(self) -> Tensor:
        """Mean over z of the Dirichlets' differential entropy, in nats: [B, ...]."""
        return self._mean(dirichlet.dirichlet_differential_entropy)

    @property
    def vacuity(self) -> Tensor:
        """Mean over z of prior C / S, which is 1 without evidence and falls towards 0 with more: [B, ...]."""
        alpha = widen(self.concentration)
        return (alpha.shape[2] / alpha.sum(2)).mean(0) * self.prior

    def _further_moments(self) -> dict[str, Tensor]:
        return {"vacuity": self.vacuity, "differential_entropy": self.differential_entropy}

    def _no_logits(self) -> str:
        return f"{super()._no_logits()} Use its mean probabilities: `log_probs`, or scope='pooled' for a temperature."

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """The results of any classifier, with ``vacuity`` and ``differential_entropy``."""
        named = {"vacuity": self.vacuity, "differential_entropy": self.differential_entropy}
        return self._columns({**super().to_dict(interval), **named})

    def _mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over z of a function of concentrations [N, C, ...]."""
        values = function(self.concentration.flatten(0, 1))
        return values.reshape(*self.concentration.shape[:2], *values.shape[1:]).mean(0)

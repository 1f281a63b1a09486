"""The base of the kinds of last-layer outputs: curvature, choice of precisions, and changed predictions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.callbacks.last_layer import LastLayerRows
from lightning_uq.functional import laplace
from lightning_uq.functional.laplace import LastLayerPosterior
from lightning_uq.predictions import Prediction

Sums = dict[str, Tensor]
"""Sums over rows, by name. The first axis is that of the members."""


class LaplaceOutputs(ABC):
    """One kind of outputs of a last layer.

    Args:
        rows: Their indices among the layer's outputs [O].
        shift: The prediction of an output of 0 [O]; 0 for logits.
        scale: Units of the prediction per unit of the network [O]; 1 for logits.

    Attributes:
        needs_target: Whether a fit to training rows uses their targets.
        has_noise: Whether the noise of the targets is fitted.
        has_logits: Whether predictions are of logits, which can be sampled. Only held-out rows choose their prior well: a network that fits
            all training labels has almost no curvature, so the marginal likelihood lets its logits vary far too much.
        shares_precision: Whether all outputs share one prior precision.
        per_decade: Number of candidate prior precisions per factor of ten, for held-out rows.
    """

    name: ClassVar[str]
    needs_target: ClassVar[bool] = False
    has_noise: ClassVar[bool] = False
    has_logits: ClassVar[bool] = False
    shares_precision: ClassVar[bool] = False
    per_decade: ClassVar[int] = 4

    def __init__(self, rows: Tensor, shift: Tensor, scale: Tensor) -> None:
        self.rows = rows
        self.shift = shift
        self.scale = scale

    # ------------------------------------------------------------------ fitting

    @classmethod
    def num_sums(cls, num_features: int, num_outputs: int) -> int:
        """The number of values that :meth:`sums` holds per member, apart from vectors."""
        return num_features**2 * num_outputs

    @abstractmethod
    def sums(self, rows: LastLayerRows) -> Sums:
        """The sums over training rows that determine a posterior: ``moments`` [M, K, P, P] and others."""

    def posteriors(self, sums: Sums, weights: Sequence[Tensor]) -> list[LastLayerPosterior]:
        """The posterior of each member with the prior precision that maximizes the marginal likelihood, given the layer's weights [O, P]."""
        found = []
        for m, weight in enumerate(weights):
            values, vectors = laplace.eigen(sums["moments"][m])
            curvature, basis = self.directions(sums, m, len(weight))
            zeros = torch.zeros(len(weight), dtype=weight.dtype)
            posterior = LastLayerPosterior(weight, values, vectors, curvature, basis, torch.ones_like(curvature), zeros)
            found.append(laplace.marginal_precision(posterior, shared=self.shares_precision))
        return found

    def directions(self, sums: Sums, member: int, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Curvature [R] and basis [O, R] of a member's outputs."""
        return torch.ones(num_outputs, dtype=torch.float64), torch.eye(num_outputs, dtype=torch.float64)

    def held_out_sums(self, rows: LastLayerRows, posteriors: Sequence[LastLayerPosterior]) -> Sums:
        """Sums over held-out rows for :meth:`chosen`: by default, their NLL under each candidate [M, G, O]."""
        nll = []
        for m, posterior in enumerate(posteriors):
            posterior = to_device(posterior, rows.features.device)
            each = []
            for precision in laplace.precision_candidates(posterior, self.per_decade):
                under = laplace.with_precision(posterior, precision)
                each.append(self.nll(rows, m, laplace.output_variance(under, rows.features[m])))
            nll.append(torch.stack(each))
        return {"nll": torch.stack(nll), "known": self.known(rows).sum(0)}

    def chosen(
        self, posteriors: Sequence[LastLayerPosterior], sums: Sums, *, keeps_prior: bool = False
    ) -> list[LastLayerPosterior]:
        """The posteriors with the prior precision that maximizes the likelihood of held-out rows.

        With ``keeps_prior``, only the noise is chosen, at the posteriors' ratio of prior and noise.
        """
        found = []
        for posterior, nll in zip(posteriors, sums["nll"], strict=True):
            options = laplace.precision_candidates(posterior, self.per_decade)
            best = nll.sum(1).argmin() if self.shares_precision else nll.argmin(0)
            found.append(laplace.with_precision(posterior, options[best]))
        return found

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """The NLL [O] of held-out rows, up to a constant, if the outputs have variances [B, O]."""
        raise NotImplementedError  # for kinds that override `chosen`

    def known(self, rows: LastLayerRows) -> Tensor:
        """Mask of the known numbers of the target [B, O], as 0 and 1."""
        return torch.ones_like(rows.outputs[0])

    # ------------------------------------------------------------------ predictions

    def mutual_information(self, logits: Tensor) -> Tensor:
        """The mutual information of the target and the weights [B], from sampled logits [Z, B, O]."""
        raise NotImplementedError  # for kinds without logits

    @abstractmethod
    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction with variances [M, B, O] of its outputs and noise [M, O], in the network's units."""

    def moved(self, logits: Tensor, deviations: Tensor) -> Tensor:
        """Logits [Z, B, ...] with deviations [Z, B, O] added."""
        return logits + deviations.reshape(logits.shape)

    @classmethod
    def preview(cls, prediction: Prediction, num_samples: int) -> Prediction:
        """A prediction in the type that it will have; logits are sampled ``num_samples`` times."""
        return prediction.map_logits(lambda logits: logits.repeat_interleave(draws_each(num_samples, len(logits)), 0))

    def score(self, variance: Tensor, noise: Tensor) -> Tensor:
        """The out-of-distribution score [B], from the variances and the noise."""
        return variance.mean((0, 2))


def draws_each(num_samples: int, num_members: int) -> int:
    """The number of draws per member, so that there are at least ``num_samples`` in total."""
    return -(-num_samples // num_members)


def to_device(posterior: LastLayerPosterior, device: torch.device) -> LastLayerPosterior:
    """The posterior on a device."""
    return LastLayerPosterior(*(tensor.to(device) for tensor in posterior))


def weighted_moments(features: Tensor, weights: Tensor) -> Tensor:
    """sum_b w_bo phi_b phi_b^T [M, O, P, P] of features [M, B, P] and weights [M, B, O]."""
    return torch.stack([(features * w.unsqueeze(-1)).mT @ features for w in weights.unbind(-1)], 1)

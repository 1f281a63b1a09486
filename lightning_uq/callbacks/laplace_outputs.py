"""What the outputs of a last layer mean to its Laplace approximation: their curvature, how precisions are chosen, what predictions become."""

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
"""Sums over rows, by name; the first axis is the members'."""


class LaplaceOutputs(ABC):
    """One kind of outputs.

    Args:
        rows: Which of the layer's outputs they are [O].
        shift: What an output of 0 predicts [O]; 0 for logits.
        scale: Units of the prediction per unit of the network [O]; 1 for logits.

    Attributes:
        needs_target: Whether a fit to training rows reads their targets.
        has_noise: Whether the noise of the targets is fitted.
        has_logits: Whether predictions are of logits, which can be drawn. Only held-out rows choose their prior well: a network that fits
            all training labels has next to no curvature, so that by the marginal likelihood its logits vary far too much.
        shares_precision: Whether all outputs share one prior precision.
        per_decade: Candidates of a prior precision per factor of ten, for held-out rows.
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
        """How many numbers :meth:`sums` holds per member, apart from vectors."""
        return num_features**2 * num_outputs

    @abstractmethod
    def sums(self, rows: LastLayerRows) -> Sums:
        """The sums over training rows that a posterior follows from: ``moments`` [M, K, P, P] and others."""

    def posteriors(self, sums: Sums, weights: Sequence[Tensor]) -> list[LastLayerPosterior]:
        """Each member's posterior under the prior precision of the largest marginal likelihood, from the layer's weights [O, P]."""
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
        """Sums over held-out rows that :meth:`chosen` reads: here their NLL under each candidate [M, G, O]."""
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
        """The posteriors under the prior precision that gives held-out rows the largest likelihood.

        With ``keeps_prior`` they choose the noise alone, at the ratio of prior and noise that the posteriors have.
        """
        found = []
        for posterior, nll in zip(posteriors, sums["nll"], strict=True):
            options = laplace.precision_candidates(posterior, self.per_decade)
            best = nll.sum(1).argmin() if self.shares_precision else nll.argmin(0)
            found.append(laplace.with_precision(posterior, options[best]))
        return found

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """The NLL [O] of held-out rows, if the outputs have variances [B, O]; up to a constant."""
        raise NotImplementedError  # of kinds that choose in another way

    def known(self, rows: LastLayerRows) -> Tensor:
        """Which numbers of the target count [B, O], as 0 and 1."""
        return torch.ones_like(rows.outputs[0])

    # ------------------------------------------------------------------ predictions

    def mutual_information(self, logits: Tensor) -> Tensor:
        """That of the target and the weights [B], from drawn logits [Z, B, O]."""
        raise NotImplementedError  # of kinds without logits

    @abstractmethod
    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction with variances [M, B, O] of its outputs, and noise [M, O], in the network's units."""

    def moved(self, logits: Tensor, deviations: Tensor) -> Tensor:
        """Logits [Z, B, ...] with deviations [Z, B, O] added."""
        return logits + deviations.reshape(logits.shape)

    @classmethod
    def preview(cls, prediction: Prediction, num_samples: int) -> Prediction:
        """A prediction in the type that it is changed to; logits are drawn ``num_samples`` times."""
        return prediction.map_logits(lambda logits: logits.repeat_interleave(draws_each(num_samples, len(logits)), 0))

    def score(self, variance: Tensor, noise: Tensor) -> Tensor:
        """The out-of-distribution score [B], from the same."""
        return variance.mean((0, 2))


def draws_each(num_samples: int, num_members: int) -> int:
    """Draws of each member's weights, so that there are ``num_samples`` in all or a few more."""
    return -(-num_samples // num_members)


def to_device(posterior: LastLayerPosterior, device: torch.device) -> LastLayerPosterior:
    """The posterior on a device."""
    return LastLayerPosterior(*(tensor.to(device) for tensor in posterior))


def weighted_moments(features: Tensor, weights: Tensor) -> Tensor:
    """sum_b w_bo phi_b phi_b^T [M, O, P, P] of features [M, B, P] and weights [M, B, O]."""
    return torch.stack([(features * w.unsqueeze(-1)).mT @ features for w in weights.unbind(-1)], 1)

"""What the outputs of a last layer mean to its Laplace approximation: their curvature, how precisions are chosen, what predictions become."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.callbacks.last_layer import LastLayerRows
from lightning_uq.errors import InputError
from lightning_uq.functional import laplace
from lightning_uq.functional.laplace import LastLayerPosterior
from lightning_uq.functional.precision import to_float64
from lightning_uq.predictions import (
    BernoulliPrediction,
    CategoricalPrediction,
    GaussianMixturePrediction,
    PointPrediction,
    Prediction,
)

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
        has_logits: Whether predictions are of logits, which can be drawn.
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
            posterior = LastLayerPosterior(values, vectors, curvature, basis, torch.ones_like(curvature), zeros)
            found.append(laplace.marginal_precision(posterior, weight, shared=self.shares_precision))
        return found

    def directions(self, sums: Sums, member: int, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Curvature [R] and basis [O, R] of a member's outputs."""
        eye = torch.eye(num_outputs, dtype=torch.float64)
        return eye[0] * 0 + 1, eye

    def held_out_sums(self, rows: LastLayerRows, posteriors: Sequence[LastLayerPosterior]) -> Sums:
        """Sums over held-out rows that :meth:`chosen` reads: here their NLL under each candidate [M, G, O]."""
        nll = []
        for m, posterior in enumerate(posteriors):
            posterior = to_device(posterior, rows.features.device)
            options = laplace.precision_candidates(posterior, self.per_decade)
            nll.append(
                torch.stack(
                    [
                        self.nll(
                            rows, m, laplace.output_variance(laplace.with_precision(posterior, one), rows.features[m])
                        )
                        for one in options
                    ]
                )
            )
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
        """The NLL [O] of held-out rows, if the outputs have variances [B, O]."""
        raise NotImplementedError

    def known(self, rows: LastLayerRows) -> Tensor:
        """Which numbers of the target count [B, O], as 0 and 1."""
        return torch.ones_like(rows.outputs[0])

    # ------------------------------------------------------------------ predictions

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


class Means(LaplaceOutputs):
    """One mean per target; the noise of each target is a constant that is fitted too.

    Where targets are missing, a target that was known in a share of the rows counts that share of their second moments.
    """

    name = "means"
    needs_target = True
    has_noise = True

    def residuals(self, rows: LastLayerRows) -> Tensor:
        """Target less mean [M, B, O] in the network's units; NaN where the target is missing."""
        assert rows.target is not None
        target = rows.target.reshape(rows.outputs.shape[1:])
        return (target - self.shift.to(target)) / self.scale.to(target) - rows.outputs

    def known(self, rows: LastLayerRows) -> Tensor:
        """Where the target is no NaN."""
        return (~self.residuals(rows)[0].isnan()).to(rows.outputs.dtype)

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features, and squared residuals."""
        moments = rows.features.mT @ rows.features
        known = self.known(rows)
        return {
            "moments": moments.unsqueeze(1),
            "errors": self.residuals(rows).square().nansum(1),
            "known": known.sum(0),
            "count": known.new_full((1,), len(known)),
        }

    def posteriors(self, sums: Sums, weights: Sequence[Tensor]) -> list[LastLayerPosterior]:
        """Noise and prior precision by the marginal likelihood."""
        if not bool((sums["known"] > 0).all()):
            raise InputError(
                "FitLaplace needs rows with a known value of each target, but one target is missing in all."
            )
        share = sums["known"] / sums["count"]
        found = []
        for m, weight in enumerate(weights):
            values, vectors = laplace.eigen(sums["moments"][m])
            squared = weight.square().sum(1)
            noise, precision = laplace.marginal_noise(
                share[:, None] * values, sums["errors"][m], squared, sums["known"]
            )
            eye = torch.eye(len(weight), dtype=weight.dtype)
            found.append(LastLayerPosterior(values, vectors, share / noise, eye, precision, noise))
        return found

    def held_out_sums(self, rows: LastLayerRows, posteriors: Sequence[LastLayerPosterior]) -> Sums:
        """What the best noise under each candidate follows from."""
        errors, logs, known = [], [], self.known(rows)
        for m, posterior in enumerate(posteriors):
            posterior = to_device(posterior, rows.features.device)
            scaled, alpha = self._candidates(posterior)  # [O, P], [G]
            squares = laplace.projected(posterior.eigenvectors, rows.features[m])[0].square()
            if bool((scaled == scaled[:1]).all()):
                scaled = scaled[:1]
            spread = torch.stack([squares @ (1 / (scaled + one)).T for one in alpha])  # [G, B, O] or [G, B, 1]
            squared = self.residuals(rows)[m].square().nan_to_num(0.0)
            errors.append((squared / (1 + spread)).sum(1))
            logs.append((known * spread.log1p()).sum(1))
        return {"errors": torch.stack(errors), "logs": torch.stack(logs), "known": known.sum(0)}

    def chosen(
        self, posteriors: Sequence[LastLayerPosterior], sums: Sums, *, keeps_prior: bool = False
    ) -> list[LastLayerPosterior]:
        """Noise and prior precision by the likelihood of held-out rows, or the noise alone."""
        found = []
        for m, posterior in enumerate(posteriors):
            _, alpha = self._candidates(posterior)
            errors, logs = sums["errors"][m], sums["logs"][m]
            if keeps_prior:
                kept = (alpha[:, None].log() - (posterior.prior_precision * posterior.noise).log()).abs().argmin(0)
                alpha, errors, logs = alpha[kept], errors.gather(0, kept[None]), logs.gather(0, kept[None])
            noise, best = laplace.held_out_noise(errors, logs, sums["known"])
            best = torch.arange(len(kept)) if keeps_prior else best
            share = posterior.curvature * posterior.noise
            found.append(posterior._replace(curvature=share / noise, prior_precision=alpha[best] / noise, noise=noise))
        return found

    @staticmethod
    def _candidates(posterior: LastLayerPosterior) -> tuple[Tensor, Tensor]:
        scaled = (posterior.curvature * posterior.noise)[:, None] * posterior.eigenvalues
        return scaled, laplace.candidates(scaled.amax())

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """A Gaussian per member: its variance is the noise, and what the weights leave open."""
        point: PointPrediction = prediction  # type: ignore[assignment]
        mean = point.member_mean
        own = _in_units(variance, self.scale, mean)
        aleatoric = _in_units(noise.unsqueeze(1).expand_as(variance), self.scale, mean)
        return point.with_variance(aleatoric + own, own)

    @classmethod
    def preview(cls, prediction: Prediction, num_samples: int) -> Prediction:
        """A Gaussian of variance 1."""
        point: PointPrediction = prediction  # type: ignore[assignment]
        return point.with_variance(torch.ones_like(point.member_mean), torch.zeros_like(point.member_mean))

    def score(self, variance: Tensor, noise: Tensor) -> Tensor:
        """The mean over targets of the epistemic variance, in units of the noise."""
        return (variance / noise.unsqueeze(1)).mean((0, 2))


class Gaussians(Means):
    """A mean and a variance per target: rows count by the inverse of their variance."""

    name = "gaussians"
    has_noise = False  # the network says it

    def variance(self, rows: LastLayerRows) -> Tensor:
        """The network's variances [M, B, O], in its own units."""
        gaussian: GaussianMixturePrediction = rows.prediction  # type: ignore[assignment]
        found = to_float64(gaussian.member_variance).to(rows.outputs.device)
        return found.reshape(rows.outputs.shape) / self.scale.to(rows.outputs).square()

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features for each target."""
        return {"moments": _weighted_moments(rows.features, self.known(rows) / self.variance(rows))}

    posteriors = LaplaceOutputs.posteriors
    chosen = LaplaceOutputs.chosen
    held_out_sums = LaplaceOutputs.held_out_sums

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """Under the sum of both variances."""
        total = self.variance(rows)[member] + variance
        squared = self.residuals(rows)[member].square()
        return torch.where(squared.isnan(), 0.0, 0.5 * (total.log() + squared / total)).sum(0)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The members' variances grow by what the weights leave open."""
        gaussian: GaussianMixturePrediction = prediction  # type: ignore[assignment]
        own = _in_units(variance, self.scale, gaussian.member_mean)
        return gaussian.replace(member_variance=gaussian.member_variance + own, member_epistemic_variance=own)

    @classmethod
    def preview(cls, prediction: Prediction, num_samples: int) -> Prediction:
        """The prediction as it is, with a part of its variance of 0."""
        gaussian: GaussianMixturePrediction = prediction  # type: ignore[assignment]
        return gaussian.replace(member_epistemic_variance=torch.zeros_like(gaussian.member_variance))

    score = LaplaceOutputs.score


class Labels(LaplaceOutputs):
    """One logit per label that is on or off."""

    name = "labels"
    has_logits = True

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features, weighted by p (1 - p), for each label."""
        p = torch.sigmoid(rows.outputs)
        return {"moments": _weighted_moments(rows.features, p * (1 - p))}

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """Of the sigmoid of logits that are scaled down by their variance."""
        assert rows.target is not None
        target = rows.target.reshape(variance.shape).to(variance)
        logits = rows.outputs[member] * laplace.probit_scale(variance)
        losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(0.0), reduction="none")
        return torch.where(target.isnan(), 0.0, losses).sum(0)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """Logits that are scaled down by their variance."""
        return prediction.map_logits(
            lambda logits: logits * laplace.probit_scale(variance).reshape(logits.shape).to(logits)
        )


class OneLogit(Labels):
    """One logit l that stands for the softmax over [0, l]."""

    name = "one logit"

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The logit scaled down by its variance."""
        return prediction.map_logits(lambda logits: logits * laplace.probit_scale(variance).to(logits))

    def moved(self, logits: Tensor, deviations: Tensor) -> Tensor:
        """Logits [0, l] with l moved."""
        return logits + F.pad(deviations, (1, 0))


class Classes(LaplaceOutputs):
    """Logits of classes: the curvature of the softmax couples them, so it is a Kronecker product."""

    name = "classes"
    has_logits = True
    shares_precision = True
    per_decade = 1

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features, and sums of diag p - p p^T."""
        p = rows.outputs.softmax(-1)
        return {
            "moments": (rows.features.mT @ rows.features).unsqueeze(1),
            "curvature": torch.diag_embed(p.sum(1)) - p.mT @ p,
            "count": p.new_full((1,), p.shape[1]),
        }

    def directions(self, sums: Sums, member: int, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Those of the mean curvature."""
        return laplace.softmax_directions(sums["curvature"][member] / sums["count"])

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """Of the softmax of logits that are scaled down by their variance: [1]."""
        assert rows.target is not None
        logits = _scaled_down(rows.outputs[member], variance)
        target = rows.target.to(logits) if rows.target.is_floating_point() else rows.target.long()
        return F.cross_entropy(logits, target, reduction="sum").reshape(1)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """Logits that are scaled down by their variance."""
        return prediction.map_logits(lambda logits: _scaled_down(logits, variance.to(logits)))


KINDS: dict[str, type[LaplaceOutputs]] = {kind.name: kind for kind in (Means, Gaussians, Labels, OneLogit, Classes)}


def kind_of(prediction: Prediction, num_outputs: int | None = None) -> type[LaplaceOutputs] | None:
    """The kind of outputs that a prediction [M, B, ...] is made of; None if there is no Laplace approximation of them here.

    Args:
        prediction: The members' prediction.
        num_outputs: How many outputs per input it is made of, if that is known.
    """
    if prediction.map_shape:
        return None
    if isinstance(prediction, CategoricalPrediction) and num_outputs not in (None, prediction.logits.shape[2]):
        return OneLogit if num_outputs == 1 and prediction.logits.shape[2] == 2 else None
    types: dict[type[Prediction], type[LaplaceOutputs]] = {
        PointPrediction: Means,
        GaussianMixturePrediction: Gaussians,
        BernoulliPrediction: Labels,
        CategoricalPrediction: Classes,
    }
    return types.get(type(prediction))


def draws_each(num_samples: int, num_members: int) -> int:
    """Draws of each member's weights, so that there are ``num_samples`` in all or a few more."""
    return -(-num_samples // num_members)


def to_device(posterior: LastLayerPosterior, device: torch.device) -> LastLayerPosterior:
    """The posterior on a device."""
    return LastLayerPosterior(*(tensor.to(device) for tensor in posterior))


def _weighted_moments(features: Tensor, weights: Tensor) -> Tensor:
    """sum_b w_bo phi_b phi_b^T [M, O, P, P] of features [M, B, P] and weights [M, B, O]."""
    return torch.stack([(features * w.unsqueeze(-1)).mT @ features for w in weights.unbind(-1)], 1)


def _scaled_down(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits about their mean, each scaled down by its variance [..., C]."""
    return (logits - logits.mean(-1, keepdim=True)) * laplace.probit_scale(variance)


def _in_units(variance: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Variances [M, B, O] in the units of the predictions, in the shape of ``like``; NaN where it is."""
    found = (variance * scale.to(variance).square()).reshape(like.shape).to(like.dtype)
    return torch.where(like.isnan(), like, found)

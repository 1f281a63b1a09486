"""Numbers as last-layer outputs with a Laplace approximation: means, with or without a variance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.callbacks.laplace_outputs import LaplaceOutputs, Sums, to_device, weighted_moments
from lightning_uq.callbacks.last_layer import LastLayerRows
from lightning_uq.errors import InputError
from lightning_uq.functional import laplace
from lightning_uq.functional.laplace import LastLayerPosterior
from lightning_uq.functional.precision import to_float64
from lightning_uq.predictions import GaussianMixturePrediction, PointPrediction, Prediction


class Means(LaplaceOutputs):
    """One mean per target. The noise of each target is a constant, which is also fitted.

    If targets are missing, the second moments of a target are those of all rows times the share of rows where it is known.
    """

    name = "means"
    needs_target = True
    has_noise = True

    @classmethod
    def num_sums(cls, num_features: int, num_outputs: int) -> int:
        """The size of one matrix, which all targets share."""
        return num_features**2

    def residuals(self, rows: LastLayerRows) -> Tensor:
        """Target minus mean [M, B, O] in the network's units; NaN where the target is missing."""
        assert rows.target is not None
        target = rows.target.reshape(rows.outputs.shape[1:])
        return (target - self.shift.to(target.device)) / self.scale.to(target.device) - rows.outputs

    def known(self, rows: LastLayerRows) -> Tensor:
        """1 where the target is not NaN."""
        return torch.ones_like(rows.outputs[0]).masked_fill(self.residuals(rows)[0].isnan(), 0.0)

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
        """Posteriors whose noise and prior precision maximize the marginal likelihood."""
        if not bool((sums["known"] > 0).all()):
            raise InputError(
                "FitLaplace needs rows with a known value of each target, but one target is missing in all of them."
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
            found.append(LastLayerPosterior(weight, values, vectors, share / noise, eye, precision, noise))
        return found

    def held_out_sums(self, rows: LastLayerRows, posteriors: Sequence[LastLayerPosterior]) -> Sums:
        """Sums that determine the best noise for each candidate."""
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
        """Posteriors whose noise, and prior precision unless kept, maximize the likelihood of held-out rows."""
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
        """A Gaussian per member, whose variance is the noise plus that of the weights."""
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
    """A mean and a variance per target. Rows are weighted by the inverse of their variance."""

    name = "gaussians"
    has_noise = False  # the network predicts it

    def variance(self, rows: LastLayerRows) -> Tensor:
        """The network's variances [M, B, O], in its own units."""
        gaussian: GaussianMixturePrediction = rows.prediction  # type: ignore[assignment]
        found = to_float64(gaussian.member_variance).to(rows.outputs.device)
        return found.reshape(rows.outputs.shape) / self.scale.to(found.device).square()

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features for each target."""
        return {"moments": weighted_moments(rows.features, self.known(rows) / self.variance(rows))}

    num_sums = LaplaceOutputs.num_sums
    posteriors = LaplaceOutputs.posteriors
    chosen = LaplaceOutputs.chosen
    held_out_sums = LaplaceOutputs.held_out_sums

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """The NLL with the sum of both variances."""
        total = self.variance(rows)[member] + variance
        squared = self.residuals(rows)[member].square()
        return torch.where(squared.isnan(), 0.0, 0.5 * (total.log() + squared / total)).sum(0)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction with members' variances increased by that of the weights."""
        gaussian: GaussianMixturePrediction = prediction  # type: ignore[assignment]
        own = _in_units(variance, self.scale, gaussian.member_mean)
        return gaussian.replace(member_variance=gaussian.member_variance + own, member_epistemic_variance=own)

    @classmethod
    def preview(cls, prediction: Prediction, num_samples: int) -> Prediction:
        """The prediction with an additional variance of 0."""
        gaussian: GaussianMixturePrediction = prediction  # type: ignore[assignment]
        return gaussian.replace(member_epistemic_variance=torch.zeros_like(gaussian.member_variance))

    score = LaplaceOutputs.score


def _in_units(variance: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Variances [M, B, O] in the units and the shape of the predictions ``like``; NaN where ``like`` is NaN."""
    found = (variance * scale.to(variance).square()).reshape(like.shape).to(like.dtype)
    return torch.where(like.isnan(), like, found)

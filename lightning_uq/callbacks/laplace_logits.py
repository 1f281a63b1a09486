"""Logits as last-layer outputs with a Laplace approximation: of labels, of one label, and of classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.callbacks.laplace_outputs import LaplaceOutputs, Sums, weighted_moments
from lightning_uq.callbacks.last_layer import LastLayerRows
from lightning_uq.functional import laplace
from lightning_uq.functional.bernoulli import bernoulli_mutual_information
from lightning_uq.functional.entropy import mutual_information
from lightning_uq.predictions import Prediction


class Labels(LaplaceOutputs):
    """One logit per label that is on or off."""

    name = "labels"
    has_logits = True

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features, weighted by p (1 - p), for each label."""
        p = torch.sigmoid(rows.outputs)
        return {"moments": weighted_moments(rows.features, p * (1 - p))}

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """The NLL of the sigmoid of logits that are scaled down by their variance."""
        assert rows.target is not None
        target = rows.target.reshape(variance.shape).to(variance)
        logits = rows.outputs[member] * laplace.probit_scale(variance)
        losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(0.0), reduction="none")
        return torch.where(target.isnan(), 0.0, losses).sum(0)

    def mutual_information(self, logits: Tensor) -> Tensor:
        """The sum over labels of the mutual information."""
        return bernoulli_mutual_information(logits).sum(-1)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction of logits that are scaled down by their variance."""
        return prediction.map_logits(
            lambda logits: logits * laplace.probit_scale(variance).reshape(logits.shape).to(logits)
        )


class OneLogit(Labels):
    """One logit l that stands for the softmax over [0, l]."""

    name = "one logit"

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction of the logit scaled down by its variance."""
        return prediction.map_logits(lambda logits: logits * laplace.probit_scale(variance).to(logits))

    def moved(self, logits: Tensor, deviations: Tensor) -> Tensor:
        """Logits [0, l] with deviations added to l."""
        return logits + F.pad(deviations, (1, 0))


class Classes(LaplaceOutputs):
    """Logits of classes. The curvature of the softmax couples them, so it is a Kronecker product."""

    name = "classes"
    has_logits = True
    shares_precision = True
    per_decade = 2

    @classmethod
    def num_sums(cls, num_features: int, num_outputs: int) -> int:
        """The size of one matrix of the features and one of the classes."""
        return num_features**2 + num_outputs**2

    def sums(self, rows: LastLayerRows) -> Sums:
        """Second moments of the features, and sums of diag p - p p^T."""
        p = rows.outputs.softmax(-1)
        return {
            "moments": (rows.features.mT @ rows.features).unsqueeze(1),
            "curvature": torch.diag_embed(p.sum(1)) - p.mT @ p,
            "count": p.new_full((1,), p.shape[1]),
        }

    def directions(self, sums: Sums, member: int, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the mean curvature."""
        return laplace.softmax_directions(sums["curvature"][member] / sums["count"])

    def nll(self, rows: LastLayerRows, member: int, variance: Tensor) -> Tensor:
        """The NLL of the softmax of logits that are scaled down by their variance: [1]."""
        assert rows.target is not None
        logits = _scaled_down(rows.outputs[member], variance)
        target = rows.target.to(logits) if rows.target.is_floating_point() else rows.target.long()
        return F.cross_entropy(logits, target, reduction="sum").reshape(1)

    def mutual_information(self, logits: Tensor) -> Tensor:
        """The mutual information of the class and the weights."""
        return mutual_information(logits)

    def changed(self, prediction: Prediction, variance: Tensor, noise: Tensor) -> Prediction:
        """The prediction of logits that are scaled down by their variance."""
        return prediction.map_logits(lambda logits: _scaled_down(logits, variance.to(logits)))


def _scaled_down(logits: Tensor, variance: Tensor) -> Tensor:
    """Centered logits, each scaled down by its variance [..., C]."""
    return (logits - logits.mean(-1, keepdim=True)) * laplace.probit_scale(variance)

"""The transform that adds the uncertainty of the last layer's weights to predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.callbacks.laplace_outputs import LaplaceOutputs, draws_each, to_device
from lightning_uq.functional.laplace import LastLayerPosterior, output_variance, weight_samples, with_bias
from lightning_uq.functional.precision import wide_dtype
from lightning_uq.predictions import Prediction
from lightning_uq.running.features import LayerFeatures
from lightning_uq.running.transforms import Change, PredictionTransform

Link = Literal["samples", "probit"]


class LaplaceTransform(PredictionTransform):
    """Adds the epistemic variance of the last layer to means, or samples logits from its posterior.

    Args:
        features: Features of the last layer: its input.
        outputs: The kind of its outputs.
        posteriors: One per member.
        has_bias: Whether the layer has a bias.
        link: How logits change: ``"samples"`` or ``"probit"``.
        num_samples: The total number of draws of the weights.
        seed: Seed of the draws, which all inputs share.
    """

    kind = "laplace"
    makes_members = True

    def __init__(
        self,
        features: LayerFeatures,
        outputs: LaplaceOutputs,
        posteriors: Sequence[LastLayerPosterior],
        *,
        has_bias: bool = True,
        link: Link = "samples",
        num_samples: int = 32,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.outputs = outputs
        self.posteriors = list(posteriors)
        self.has_bias = has_bias
        self.link = link
        self.num_samples = num_samples
        self.seed = seed
        self._weights: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": None}  # redrawn from the seed

    @contextmanager
    def observing(self, module: nn.Module) -> Iterator[Change]:
        """Record the features of the forward pass."""
        with self.features.recording(module) as features:
            yield lambda prediction: self.changed(prediction, features())

    @contextmanager
    def drawing(self, module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
        """A context around one forward pass; the function that it yields turns the members' means [M, B, ...] into draws [M S, B, ...].

        A draw has one set of weights for all inputs, so it is a function of x, with gradients. Means and draws are in the units of the predictions.
        """
        with self.features.recording(module, detach=False) as features:

            def draw(means: Tensor) -> Tensor:
                deviations = self._deviations(features(), means.dtype) * self.outputs.scale.to(means)
                return self._repeated(means) + deviations.reshape(-1, *means.shape[1:])

            yield draw

    def changed(self, prediction: Prediction, features: Tensor) -> Prediction:
        """The changed prediction of inputs with features [M, B, D]."""
        if self.link == "samples" and self.outputs.has_logits:
            moved = prediction.map_logits(
                lambda logits: self.outputs.moved(self._repeated(logits), self._deviations(features, logits.dtype))
            )
        else:
            moved = self.outputs.changed(prediction, self.variance(features), self._noise(features.device))
        return moved.replace(prior_precision=torch.stack([one.prior_precision for one in self.posteriors]))

    def variance(self, features: Tensor) -> Tensor:
        """Variance [M, B, O] of the outputs, in the network's units."""
        self._move_to(features.device)
        rows = self._rows(features)
        return torch.stack([output_variance(one, phi) for one, phi in zip(self.posteriors, rows, strict=True)])

    def score(self, features: Tensor) -> Tensor:
        """The out-of-distribution score [B]; plus infinity where features are not finite."""
        if self.outputs.has_logits:
            means = torch.stack([one.mean for one in self.posteriors]).to(features)
            logits = (with_bias(features) if self.has_bias else features) @ means.mT
            score = self.outputs.mutual_information(self._repeated(logits) + self._deviations(features, logits.dtype))
        else:
            score = self.outputs.score(self.variance(features), self._noise(features.device))
        return torch.where(score.isnan(), torch.inf, score).to(wide_dtype(features.device))

    def _noise(self, device: torch.device) -> Tensor:
        self._move_to(device)
        return torch.stack([one.noise for one in self.posteriors])

    def _repeated(self, logits: Tensor) -> Tensor:
        """Logits or means [M S, B, ...] of M members, once per draw."""
        return logits.repeat_interleave(draws_each(self.num_samples, len(logits)), 0)

    def _deviations(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """Deviations of the outputs [M S, B, O] under S draws of each member's weights."""
        self._move_to(features.device)
        rows = self._rows(features).to(dtype)
        return torch.einsum("mbp,msop->msbo", rows, self.weights.to(rows)).flatten(0, 1)

    @property
    def weights(self) -> Tensor:
        """Deviations of the weights [M, S, O, P] in float32. They are drawn once, before an export, since a graph cannot draw the same ones."""
        if self._weights is None:
            with torch.inference_mode(False):  # a later pass may need gradients
                self._weights = self._drawn()
        return self._weights

    def _drawn(self) -> Tensor:
        """Deviations of the weights [M, S, O, P], in float32."""
        generator, drawn = torch.Generator().manual_seed(self.seed), []
        for one in self.posteriors:
            shape = draws_each(self.num_samples, len(self.posteriors)), *one.mean.shape
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn.append(weight_samples(one, noise.to(one.mean)).float())
        return torch.stack(drawn)

    def _rows(self, features: Tensor) -> Tensor:
        rows = features.to(wide_dtype(features.device))
        return with_bias(rows) if self.has_bias else rows

    def _move_to(self, device: torch.device) -> None:
        held, dtype = self.posteriors[0].mean, wide_dtype(device)
        if held.device == device and held.dtype == dtype:
            return
        # Convert on the CPU: a device without float64 accepts no float64 tensor.
        on_cpu = [to_device(one, torch.device("cpu")) for one in self.posteriors]
        self.posteriors = [LastLayerPosterior(*(t.to(dtype).to(device) for t in one)) for one in on_cpu]
        self._weights = None

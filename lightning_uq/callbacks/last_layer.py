"""Reads batches at a network's last linear layer, which must make the network's outputs."""

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.laplace import with_bias
from lightning_uq.functional.precision import to_float64
from lightning_uq.predictions import CategoricalPrediction, NumberPrediction, Prediction
from lightning_uq.running.features import FeatureReader
from lightning_uq.running.finite import check_numbers


@dataclass(frozen=True)
class LastLayerRows:
    """A batch at the last layer of M members, in float64.

    Attributes:
        features: Features with a 1 for the bias [M, B, P].
        outputs: Outputs [M, B, O] in the network's units: the logits, or the means [M, B, D], or [M, B, H D] for a horizon.
        index: Their indices among the layer's outputs [O].
        raw: All outputs [M, B, ...], as the network returns them.
        prediction: The members' prediction.
        target: The target, in the shape of the outputs in a loss; None if it was not requested.
    """

    features: Tensor
    outputs: Tensor
    index: Tensor
    raw: Tensor
    prediction: Prediction
    target: Tensor | None = None


class LastLayerReader:
    """Reads batches at the linear layer that makes the outputs.

    Args:
        features: Reader of the layer's input.
        name: Name of the callback, for errors.
    """

    def __init__(self, features: FeatureReader, name: str) -> None:
        self.features = features
        self.name = name

    def __call__(self, model: nn.Module, batch: object, trainer: Trainer | None = None) -> LastLayerRows:
        """A batch at the last layer.

        Raises:
            InputError: The layer is not linear, its features hold NaN, or it does not make the outputs.
            NotFiniteError: The outputs hold NaN or infinity.
        """
        logits = self.features.logits
        logits.look_at_task(model, batch, trainer)
        if self.features.found is None:
            self.features(model, batch, trainer)  # finds the layer
        with self.features.recording(model, trainer) as recorded:
            raw = logits(model, batch, trainer)
        features = recorded()
        layer = self.features.resolved
        wrong = [one for one in self.features.layers(model) if not isinstance(one, nn.Linear)]
        if wrong:
            raise InputError(
                f"{self.name} needs a linear layer that makes the outputs, but {layer!r} is a {type(wrong[0]).__name__}. Pass the name of a "
                "linear layer as `feature_layer`."
            )
        if not bool(features.isfinite().all()):
            raise InputError(
                f"The features that {self.name} is fitted to, the input of layer {layer!r}, hold NaN or infinity."
            )
        check_numbers(raw, logits.task(model))
        prediction = logits.prediction(model, raw, to_members=False)
        rows = to_float64(features)
        rows = with_bias(rows) if self.has_bias(model) else rows
        is_softmax = isinstance(prediction, CategoricalPrediction) and raw.shape == prediction.logits.shape
        if not self._makes_outputs(model, rows, raw, up_to_constant=is_softmax):
            raise InputError(
                f"{self.name} needs the layer that makes the outputs of {type(model).__name__}, but {layer!r} does not. Pass the name of the "
                "linear layer that makes them as `feature_layer`, without an activation, a rescaling or a sampled part after it "
                "(`Regression(target_scale=...)` rescales targets)."
            )
        index = torch.arange(raw[0, 0].numel()).reshape(raw.shape[2:])
        if isinstance(prediction, NumberPrediction) and index.ndim:
            index = index[..., : prediction.target_shape[-1]]  # the means; the variances follow
        outputs = to_float64(raw).reshape(*raw.shape[:2], -1)[..., index.flatten()]
        return LastLayerRows(rows, outputs, index.flatten(), raw, prediction)

    def has_bias(self, model: nn.Module) -> bool:
        """Whether the layer has a bias."""
        return all(layer.bias is not None for layer in self.features.layers(model))

    def weights(self, model: nn.Module) -> list[Tensor]:
        """The weights of each member's layer [O, P], with the bias as the last column, in float64 on the CPU."""
        found = []
        for layer in self.features.layers(model):
            assert isinstance(layer, nn.Linear)
            columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
            found.append(to_float64(torch.cat(columns, 1)).cpu())
        return found

    def _makes_outputs(self, model: nn.Module, rows: Tensor, raw: Tensor, *, up_to_constant: bool) -> bool:
        """Whether the outputs are W phi + b; for a softmax, up to a constant that all logits of an input share."""
        weights = torch.stack(self.weights(model)).to(rows.device)
        found = to_float64(raw).reshape(*raw.shape[:2], -1)
        if len(found) != len(rows) or found.shape[-1] != weights.shape[1]:
            return False
        gap, size = found - rows @ weights.mT, rows.abs() @ weights.mT.abs()
        if up_to_constant:
            gap, size = gap - gap.mean(-1, keepdim=True), size.amax(-1, keepdim=True)
        return bool((gap.abs() <= _tolerance(raw) * size).all())


def _tolerance(raw: Tensor) -> float:
    """The tolerated deviation of outputs from float64, relative to the sum of absolute terms, by their apparent precision."""
    if any(bool((raw == raw.to(half).to(raw.dtype)).all()) for half in (torch.bfloat16, torch.float16)):
        return 2**-6
    return 1e-3 if raw.dtype == torch.float32 else 1e-6  # TF32 rounds to 2^-11

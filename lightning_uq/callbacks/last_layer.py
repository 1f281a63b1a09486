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
        self._picked: Tensor | None = None  # the layer's output that each output is, if not all of them in order

    def __call__(
        self, model: nn.Module, batch: object, trainer: Trainer | None = None, *, is_first: bool = True
    ) -> LastLayerRows:
        """A batch at the last layer. The first batch of a fit shows which of the layer's outputs the model returns.

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
                + ("" if self.features.pool is None else " A row of padding alone has NaN: leave such rows out.")
            )
        check_numbers(raw, logits.task(model))
        prediction = logits.prediction(model, raw, to_members=False)
        rows = to_float64(features)
        rows = with_bias(rows) if self.has_bias(model) else rows
        is_softmax = isinstance(prediction, CategoricalPrediction) and raw.shape == prediction.logits.shape
        num_outputs = raw[0, 0].numel()
        if is_first:
            self._picked = None
        if self._picked is None and num_outputs < self._num_outputs(model):
            self._picked = self._find_picked(model, batch, trainer)
        if not self._makes_outputs(model, rows, raw, up_to_constant=is_softmax):
            pooled = "" if self.features.pool is None else f" from the features of `pool={self.features.pool!r}`"
            raise InputError(
                f"{self.name} needs the layer that makes the outputs of {type(model).__name__}, but {layer!r} does not make them{pooled}. Pass the "
                "name of the linear layer that makes them as `feature_layer`, without an activation, a rescaling or a sampled part after it "
                "(`Regression(target_scale=...)` rescales targets)."
            )
        index = torch.arange(num_outputs).reshape(raw.shape[2:])
        if isinstance(prediction, NumberPrediction) and index.ndim:
            index = index[..., : prediction.target_shape[-1]]  # the means; the variances follow
        index = index.flatten()
        outputs = to_float64(raw).reshape(*raw.shape[:2], -1)[..., index]
        return LastLayerRows(rows, outputs, index if self._picked is None else self._picked[index], raw, prediction)

    def has_bias(self, model: nn.Module) -> bool:
        """Whether the layer has a bias."""
        return all(layer.bias is not None for layer in self.features.layers(model))

    def weights(self, model: nn.Module, index: Tensor | None = None) -> list[Tensor]:
        """The weights of each member's layer [O, P], with the bias as the last column, in float64 on the CPU; only those with ``index``, if given."""
        found = []
        for layer in self.features.layers(model):
            assert isinstance(layer, nn.Linear)
            columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
            chosen = [one if index is None else one[index.to(one.device)] for one in columns]
            found.append(to_float64(torch.cat(chosen, 1)).cpu())
        return found

    def _num_outputs(self, model: nn.Module) -> int:
        layer = self.features.layers(model)[0]
        assert isinstance(layer, nn.Linear)
        return layer.out_features

    def _find_picked(self, model: nn.Module, batch: object, trainer: Trainer | None) -> Tensor | None:
        """The index of the layer's output that each of the model's outputs is [O]; None if they are not simply some of these.

        The layer is made to return the index of each output in its place, so the model returns the indices.
        """

        def indices(layer: nn.Module, args: object, output: Tensor) -> Tensor:
            return torch.arange(output.shape[-1], dtype=torch.float32, device=output.device).expand(output.shape)

        hooks = [layer.register_forward_hook(indices) for layer in self.features.layers(model)]
        try:
            with torch.compiler.set_stance("force_eager"):
                found = self.features.logits(model, batch, trainer, check=False)
        finally:
            for hook in hooks:
                hook.remove()
        picked = found[0, 0].flatten()
        is_index = (picked == picked.round()) & (picked >= 0) & (picked < self._num_outputs(model))
        return picked.long().cpu() if bool(is_index.all()) and bool((found == found[:1, :1]).all()) else None

    def _makes_outputs(self, model: nn.Module, rows: Tensor, raw: Tensor, *, up_to_constant: bool) -> bool:
        """Whether the outputs are W phi + b; for a softmax, up to a constant that all logits of an input share."""
        weights = torch.stack(self.weights(model, self._picked)).to(rows.device)
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

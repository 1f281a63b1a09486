"""A trained network with everything fitted after its training, as one plain module that returns named results."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, NotFiniteError
from lightning_uq.functional.validation import check_choice
from lightning_uq.networks.features import FeatureTap
from lightning_uq.networks.finite import NonFinite, check_finite, nonfinite_rows, with_zeros
from lightning_uq.networks.pooling import Pool
from lightning_uq.predictions import ClassProbabilities, NumberPrediction, Prediction, QuantilePrediction

_OF_NO_USE: Mapping[str, float] = {
    "log_density": -math.inf,
    "ood_score": math.inf,
    "conformal_lower": -math.inf,
    "conformal_upper": math.inf,
    "prediction_set": True,
    "answered": False,
    "ood_p_value": 0.0,
    "ood_alarm": True,
}
"""The results for an input that is not finite; NaN for all other names."""


class FittedChange(NamedTuple):
    """One fitted change of predictions.

    Attributes:
        change: ``change(prediction)``, or ``change(prediction, features)`` with features [M, B, D] if there are layers.
        layers: Names, in the network, of the layers whose inputs are the features of the members.
        pool: How an input with more axes than [B, D] is pooled.
    """

    change: Callable[..., Prediction]
    layers: Sequence[str] = ()
    pool: Pool | None = None


class FittedPredictor(nn.Module):
    """Maps inputs to the named results of the prediction after all changes, such as ``mean`` and ``conformal_lower``, or ``probs`` and ``prediction_set``.

    For classes and labels, the results are ``probs``, ``prediction_set`` and ``answered``; for numbers, the entries of ``prediction.to_dict()``. A feature
    score adds ``ood_score``, and a density ``log_density``. The module can be moved, cast, pickled, compiled, and exported as a whole; an exported graph returns
    the same dictionary. For ONNX, pass ``output_names=fitted.output_names``.

    Args:
        network: Returns outputs [Z, B, ...].
        predict: Makes a prediction from outputs.
        changes: The fitted changes, in order.
        nonfinite: How to treat an input row with NaN or infinity: ``"error"`` raises; ``"inf"`` returns NaN, a set of all classes, and an infinite
            interval and score, as an exported graph always does.

    Example:
        >>> from lightning_uq.predictions import PointPrediction
        >>> fitted = FittedPredictor(nn.Linear(2, 1), lambda outputs: PointPrediction(outputs.unsqueeze(0)), [])
        >>> list(fitted(torch.zeros(3, 2)))
        ['mean']
    """

    def __init__(
        self,
        network: nn.Module,
        predict: Callable[[Tensor], Prediction],
        changes: Sequence[FittedChange],
        nonfinite: NonFinite = "error",
    ) -> None:
        super().__init__()
        check_choice("nonfinite", nonfinite, ("error", "inf"))
        self.nonfinite = nonfinite
        self.network = network
        self.predict = predict
        self.changes = list(changes)
        self.taps = [FeatureTap(network, one.layers, one.pool) if one.layers else None for one in changes]
        self._names: list[str] | None = None  # None until the first call
        self.has_classes = False  # also set in the first call
        self.eval()

    @property
    def output_names(self) -> list[str]:
        """The names of the results for ONNX, in order, after a first call. ``prediction_mean`` replaces ``mean``, which is reserved there.

        Raises:
            InputError: The module was not called yet.
        """
        if self._names is None:
            raise InputError("`output_names` are unknown before the first call. Call the module with an input first.")
        return ["prediction_mean" if name == "mean" else name for name in self._names]

    def forward(self, x: Any) -> dict[str, Tensor]:
        """The results by name.

        Raises:
            NotFiniteError: A row of the input or its results hold NaN. Not raised with ``nonfinite="inf"``, or in a graph.
        """
        in_graph = torch.compiler.is_compiling()
        refuses = self.nonfinite == "error" and not in_graph
        if refuses:
            check_finite(
                x, advice="Pass `nonfinite='inf'` to `load_fitted` for an infinite score and interval instead."
            )
        prediction, features = self._run(with_zeros(x))
        for one, own in zip(self.changes, features, strict=True):
            prediction = one.change(prediction) if own is None else one.change(prediction, own)
        results = self._named(prediction)
        if refuses and any(bool(t.isnan().any()) for t in results.values()):
            raise NotFiniteError(
                "The results hold NaN although the input is finite, because the network's outputs overflow."
            )
        if not in_graph:
            self._names = list(results)
            self.has_classes = isinstance(prediction, ClassProbabilities)
        elif isinstance(
            prediction, QuantilePrediction
        ):  # its levels, and so its names, are unknown while a graph is traced
            if self._names is None:
                raise InputError(
                    "The names of quantiles are unknown before the first call. Call the module with an input first."
                )
            results = dict(zip(self._names, results.values(), strict=True))
        bad = nonfinite_rows(x)
        if bad is None:
            return results
        return {name: _filled(values, bad, name) for name, values in results.items()}

    def _run(self, x: Any) -> tuple[Prediction, list[Tensor | None]]:
        """The prediction from a forward pass, and the features for each change."""
        outputs: Tensor | None = None
        features: list[Tensor | None] = []
        for tap in self.taps:
            if tap is None:
                features.append(None)
                continue
            outputs, found = tap.run(self.network, x)
            features.append(torch.stack(found))
        return self.predict(self.network(x) if outputs is None else outputs), features

    @staticmethod
    def _named(prediction: Prediction) -> dict[str, Tensor]:
        if isinstance(prediction, NumberPrediction):
            return prediction.to_dict()
        found = prediction.to_dict()
        kept = ("probs", "prediction_set", "answered", "log_density", "ood_score", "ood_p_value", "ood_alarm")
        return {name: found[name] for name in kept if name in found}


def _filled(values: Tensor, bad: Tensor, name: str) -> Tensor:
    """Values [B, ...] with the placeholder for ``name`` in bad rows [B]."""
    rows = bad.reshape(-1, *[1] * (values.ndim - 1))
    if values.dtype == torch.bool:  # onnxruntime has no `where` for bool
        return values | rows if _OF_NO_USE.get(name) else values & ~rows
    return torch.where(rows, _OF_NO_USE.get(name, math.nan), values) if values.is_floating_point() else values

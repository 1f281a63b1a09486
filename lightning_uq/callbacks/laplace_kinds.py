"""The kinds of last-layer outputs, by the predictions made of them."""

from lightning_uq.callbacks.laplace_logits import Classes, Labels, OneLogit
from lightning_uq.callbacks.laplace_numbers import Gaussians, Means
from lightning_uq.callbacks.laplace_outputs import LaplaceOutputs
from lightning_uq.predictions import (
    BernoulliPrediction,
    CategoricalPrediction,
    GaussianMixturePrediction,
    PointPrediction,
    Prediction,
)

KINDS: dict[str, type[LaplaceOutputs]] = {kind.name: kind for kind in (Means, Gaussians, Labels, OneLogit, Classes)}


def kind_of(prediction: Prediction, num_outputs: int | None = None) -> type[LaplaceOutputs] | None:
    """The kind of outputs of which a prediction [M, B, ...] is made; None if there is no Laplace approximation for it.

    Args:
        prediction: The prediction of the members.
        num_outputs: The number of outputs per input, if known.
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

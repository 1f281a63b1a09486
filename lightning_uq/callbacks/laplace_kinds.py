"""Which kind of outputs of a last layer a prediction is made of."""

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

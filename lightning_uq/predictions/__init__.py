"""The results of every method: frozen sets of tensors with an explicit member axis, one file per type.

Shapes: Z indices or members, B batch, C classes, D target dimensions. If more axes follow the class axis (segmentation, logits
[Z, B, C, H, W]), it keeps its place, and every score is [B, H, W].
"""

from lightning_uq.predictions.base import Prediction
from lightning_uq.predictions.bernoulli import BernoulliPrediction, LabelProbabilities, PooledBernoulliPrediction
from lightning_uq.predictions.categorical import CategoricalPrediction
from lightning_uq.predictions.class_probabilities import ClassProbabilities
from lightning_uq.predictions.dirichlet import DirichletPrediction
from lightning_uq.predictions.gaussian_mixture import GaussianMixturePrediction
from lightning_uq.predictions.mixture_density import MixtureDensityPrediction
from lightning_uq.predictions.numbers import NumberPrediction
from lightning_uq.predictions.point import PointPrediction
from lightning_uq.predictions.pooled_categorical import PooledCategoricalPrediction
from lightning_uq.predictions.pooled_regression import PooledRegressionPrediction
from lightning_uq.predictions.quantiles import QuantilePrediction
from lightning_uq.predictions.recalibrated import RecalibratedPrediction
from lightning_uq.predictions.student_t import StudentTPrediction
from lightning_uq.predictions.student_t_mixture import StudentTMixturePrediction

__all__ = [
    "BernoulliPrediction",
    "CategoricalPrediction",
    "ClassProbabilities",
    "DirichletPrediction",
    "GaussianMixturePrediction",
    "LabelProbabilities",
    "MixtureDensityPrediction",
    "NumberPrediction",
    "PointPrediction",
    "PooledBernoulliPrediction",
    "PooledCategoricalPrediction",
    "PooledRegressionPrediction",
    "Prediction",
    "QuantilePrediction",
    "RecalibratedPrediction",
    "StudentTMixturePrediction",
    "StudentTPrediction",
]

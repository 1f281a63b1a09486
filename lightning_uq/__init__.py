"""Uncertainty quantification for PyTorch Lightning: every method is a network f(x, z), and every output [Z, B, ...]."""

from lightning_uq import active_learning, data, functional, losses, metrics, networks, tasks
from lightning_uq.callbacks import (
    CalibratedNLL,
    FitGMM,
    FitKNN,
    FitViM,
    OODDetection,
    PredictionWriter,
    TemperatureScaling,
    VectorScaling,
    load_fitted,
    read_predictions,
)
from lightning_uq.checkpoint_files import AtomicCheckpointIO
from lightning_uq.data import Indexed
from lightning_uq.errors import InputError, MissingExtraError, NotFittedError, UnsupportedError, UQError
from lightning_uq.method import Method, Setting
from lightning_uq.modules import (
    BayesByBackpropModule,
    CategoricalRegressionModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    EvidentialModule,
    EvidentialRegressionModule,
    HypermodelModule,
    UncertaintyModule,
)
from lightning_uq.networks import EpinetHead, EpistemicNetwork, Factory
from lightning_uq.predictions import (
    CategoricalPrediction,
    DirichletPrediction,
    GaussianMixturePrediction,
    PooledCategoricalPrediction,
    PooledRegressionPrediction,
    Prediction,
    StudentTPrediction,
)
from lightning_uq.tasks import (
    Classification,
    EvidentialClassification,
    EvidentialRegression,
    Regression,
    Segmentation,
    Task,
)

__version__ = "0.1.0"

__all__ = [
    "AtomicCheckpointIO",
    "BayesByBackpropModule",
    "CalibratedNLL",
    "CategoricalPrediction",
    "CategoricalRegressionModule",
    "Classification",
    "DeterministicModule",
    "DirichletPrediction",
    "DropoutModule",
    "EnsembleModule",
    "EpinetHead",
    "EpinetModule",
    "EpistemicNetwork",
    "EvidentialClassification",
    "EvidentialModule",
    "EvidentialRegression",
    "EvidentialRegressionModule",
    "Factory",
    "FitGMM",
    "FitKNN",
    "FitViM",
    "GaussianMixturePrediction",
    "HypermodelModule",
    "Indexed",
    "InputError",
    "Method",
    "MissingExtraError",
    "NotFittedError",
    "OODDetection",
    "PooledCategoricalPrediction",
    "PooledRegressionPrediction",
    "Prediction",
    "PredictionWriter",
    "Regression",
    "Segmentation",
    "Setting",
    "StudentTPrediction",
    "Task",
    "TemperatureScaling",
    "UQError",
    "UncertaintyModule",
    "UnsupportedError",
    "VectorScaling",
    "active_learning",
    "data",
    "functional",
    "load_fitted",
    "losses",
    "metrics",
    "networks",
    "read_predictions",
    "tasks",
]

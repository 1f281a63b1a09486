"""Uncertainty quantification for PyTorch Lightning: every method is a network f(x, z), every output has shape [Z, B, ...]."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_uq.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_uq import active_learning, data, functional, losses, metrics, networks, tasks
    from lightning_uq.callbacks import (
        CalibratedNLL,
        ConformalIntervals,
        ConformalRiskControl,
        ConformalSets,
        ConformalStream,
        DriftMonitor,
        FitGMM,
        FitKNN,
        FitLaplace,
        FitViM,
        IsotonicScaling,
        MatrixScaling,
        OODAlarm,
        OODDetection,
        PredictionWriter,
        QuantileRecalibration,
        SelectiveThreshold,
        TemperatureScaling,
        VarianceScaling,
        VectorScaling,
        load_fitted,
        read_predictions,
        save_fitted,
    )
    from lightning_uq.checkpoint_files import AtomicCheckpointIO
    from lightning_uq.compare import UncertaintyReport
    from lightning_uq.data import Indexed
    from lightning_uq.errors import (
        InputError,
        MissingExtraError,
        NotFiniteError,
        NotFittedError,
        UnsupportedError,
        UQError,
    )
    from lightning_uq.loggers import LogFigures
    from lightning_uq.method import Method, Reading, Setting
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
    from lightning_uq.modules.member_parallel import MemberParallelStrategy
    from lightning_uq.networks import EpinetHead, EpistemicNetwork, Factory, export_fitted
    from lightning_uq.predictions import (
        BernoulliPrediction,
        CategoricalPrediction,
        DirichletPrediction,
        GaussianMixturePrediction,
        MixtureDensityPrediction,
        PointPrediction,
        PooledCategoricalPrediction,
        PooledRegressionPrediction,
        Prediction,
        QuantilePrediction,
        StudentTMixturePrediction,
        StudentTPrediction,
    )
    from lightning_uq.tasks import (
        Binary,
        Classification,
        EvidentialClassification,
        EvidentialRegression,
        Multilabel,
        Regression,
        Segmentation,
        Task,
    )

__all__ = [
    "AtomicCheckpointIO",
    "BayesByBackpropModule",
    "BernoulliPrediction",
    "Binary",
    "CalibratedNLL",
    "CategoricalPrediction",
    "CategoricalRegressionModule",
    "Classification",
    "ConformalIntervals",
    "ConformalRiskControl",
    "ConformalSets",
    "ConformalStream",
    "DeterministicModule",
    "DirichletPrediction",
    "DriftMonitor",
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
    "FitLaplace",
    "FitViM",
    "GaussianMixturePrediction",
    "HypermodelModule",
    "Indexed",
    "InputError",
    "IsotonicScaling",
    "LogFigures",
    "MatrixScaling",
    "MemberParallelStrategy",
    "Method",
    "MissingExtraError",
    "MixtureDensityPrediction",
    "Multilabel",
    "NotFiniteError",
    "NotFittedError",
    "OODAlarm",
    "OODDetection",
    "PointPrediction",
    "PooledCategoricalPrediction",
    "PooledRegressionPrediction",
    "Prediction",
    "PredictionWriter",
    "QuantilePrediction",
    "QuantileRecalibration",
    "Reading",
    "Regression",
    "Segmentation",
    "SelectiveThreshold",
    "Setting",
    "StudentTMixturePrediction",
    "StudentTPrediction",
    "Task",
    "TemperatureScaling",
    "UQError",
    "UncertaintyModule",
    "UncertaintyReport",
    "UnsupportedError",
    "VarianceScaling",
    "VectorScaling",
    "active_learning",
    "data",
    "export_fitted",
    "functional",
    "load_fitted",
    "losses",
    "metrics",
    "networks",
    "read_predictions",
    "save_fitted",
    "tasks",
]

_ROOMS = (
    "errors",
    "functional",
    "losses",
    "predictions",
    "tasks",
    "method",
    "checkpoint_files",
    "loggers",
    "data",
    "metrics",
    "networks",
    "modules",
    "modules.member_parallel",
    "callbacks",
    "active_learning",
    "compare",
)


def __getattr__(name: str) -> Any:
    """Load a subpackage or a public name at its first use, so that the command line can print its help without torch and Lightning."""
    if name in _ROOMS:
        return import_module(f"lightning_uq.{name}")
    if name in __all__:
        rooms = (import_module(f"lightning_uq.{room}") for room in _ROOMS)
        return next(vars(room)[name] for room in rooms if name in vars(room))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Callbacks for any LightningModule, one per file."""

from lightning_uq.callbacks.calibrated_nll import CalibratedNLL
from lightning_uq.callbacks.conformal_intervals import ConformalIntervals
from lightning_uq.callbacks.conformal_sets import ConformalSets
from lightning_uq.callbacks.conformal_stream import ConformalStream
from lightning_uq.callbacks.drift_monitor import DriftMonitor
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.isotonic import IsotonicScaling
from lightning_uq.callbacks.knn import FitKNN
from lightning_uq.callbacks.laplace import FitLaplace
from lightning_uq.callbacks.load import load_fitted
from lightning_uq.callbacks.matrix_scaling import MatrixScaling
from lightning_uq.callbacks.ood import OODDetection
from lightning_uq.callbacks.ood_alarm import OODAlarm
from lightning_uq.callbacks.ood_scores import OODScorer
from lightning_uq.callbacks.prediction_files import read_predictions
from lightning_uq.callbacks.prediction_writer import PredictionWriter
from lightning_uq.callbacks.quantile_recalibration import QuantileRecalibration
from lightning_uq.callbacks.risk_control import ConformalRiskControl
from lightning_uq.callbacks.save import save_fitted
from lightning_uq.callbacks.selective_threshold import SelectiveThreshold
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.variance_scaling import VarianceScaling
from lightning_uq.callbacks.vector_scaling import VectorScaling
from lightning_uq.callbacks.vim import FitViM

__all__ = [
    "CalibratedNLL",
    "ConformalIntervals",
    "ConformalRiskControl",
    "ConformalSets",
    "ConformalStream",
    "DriftMonitor",
    "FitGMM",
    "FitKNN",
    "FitLaplace",
    "FitViM",
    "IsotonicScaling",
    "MatrixScaling",
    "OODAlarm",
    "OODDetection",
    "OODScorer",
    "PredictionWriter",
    "QuantileRecalibration",
    "SelectiveThreshold",
    "TemperatureScaling",
    "VarianceScaling",
    "VectorScaling",
    "load_fitted",
    "read_predictions",
    "save_fitted",
]

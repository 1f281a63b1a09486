"""Metrics of uncertainty as ``torchmetrics.Metric`` classes, thin wrappers of :mod:`lightning_uq.functional`.

Classification metrics take ``update(probs, target)``, or a prediction object instead of ``probs``. Logits need the constructor's
``from_logits=True``; they are never guessed from the values. Detection metrics take ``update(score, is_ood)``, regression metrics
``update(prediction, target)``. States are float64, whatever the precision of the module that holds them.
"""

from lightning_uq.metrics.answered import AnsweredShare, SelectiveError
from lightning_uq.metrics.calibration import ExpectedCalibrationError, SmoothCalibrationError
from lightning_uq.metrics.conformal import ConformalCoverage, ConformalSize, FalseNegativeRate
from lightning_uq.metrics.intersection_over_union import MeanIoU
from lightning_uq.metrics.intervals import IntervalScore, Sharpness
from lightning_uq.metrics.joint import JointLogLoss
from lightning_uq.metrics.labels import (
    LabelAccuracy,
    LabelAUROC,
    LabelAveragePrecision,
    LabelBrierScore,
    LabelCalibrationError,
    LabelNLL,
)
from lightning_uq.metrics.ood import OODAUPRC, OODAUROC, OODFPR95
from lightning_uq.metrics.ood_alarm import OODAlarmRate
from lightning_uq.metrics.pinball import PinballLoss
from lightning_uq.metrics.pit import PITHistogram
from lightning_uq.metrics.regression import CRPS, MAE, RMSE, RegressionNLL
from lightning_uq.metrics.regression_calibration import IntervalCoverage, QuantileCalibrationError
from lightning_uq.metrics.scoring import (
    Accuracy,
    BrierScore,
    MutualInformation,
    NegativeLogLikelihood,
    PredictiveEntropy,
)
from lightning_uq.metrics.selective import AUGRC, AURC
from lightning_uq.metrics.sparsification import AUSE
from lightning_uq.metrics.unpredicted import UnpredictedClasses

__all__ = [
    "AUGRC",
    "AURC",
    "AUSE",
    "CRPS",
    "MAE",
    "OODAUPRC",
    "OODAUROC",
    "OODFPR95",
    "RMSE",
    "Accuracy",
    "AnsweredShare",
    "BrierScore",
    "ConformalCoverage",
    "ConformalSize",
    "ExpectedCalibrationError",
    "FalseNegativeRate",
    "IntervalCoverage",
    "IntervalScore",
    "JointLogLoss",
    "LabelAUROC",
    "LabelAccuracy",
    "LabelAveragePrecision",
    "LabelBrierScore",
    "LabelCalibrationError",
    "LabelNLL",
    "MeanIoU",
    "MutualInformation",
    "NegativeLogLikelihood",
    "OODAlarmRate",
    "PITHistogram",
    "PinballLoss",
    "PredictiveEntropy",
    "QuantileCalibrationError",
    "RegressionNLL",
    "SelectiveError",
    "Sharpness",
    "SmoothCalibrationError",
    "UnpredictedClasses",
]

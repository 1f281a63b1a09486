"""Metrics of regression on the predictions of all heads: missing targets, horizons, and values by definition."""

import math

import numpy as np
import pytest
import torch
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_uq.errors import InputError
from lightning_uq.metrics import (
    AUSE,
    CRPS,
    MAE,
    RMSE,
    IntervalCoverage,
    IntervalScore,
    PinballLoss,
    PITHistogram,
    QuantileCalibrationError,
    RegressionNLL,
    Sharpness,
)
from lightning_uq.predictions import GaussianMixturePrediction, PointPrediction, QuantilePrediction

NAN = math.nan


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


GAUSSIAN = GaussianMixturePrediction(randn(3, 40, 2), randn(3, 40, 2, seed=1).exp())
QUANTILES = QuantilePrediction(randn(2, 40, 2, 3).sort(-1).values, torch.tensor([0.1, 0.5, 0.9]))
POINTS = PointPrediction(randn(3, 40, 2))
Y = randn(40, 2, seed=3)

EVERY = [
    (RegressionNLL, {}, GAUSSIAN),
    (RegressionNLL, {"moment_matched": True}, GAUSSIAN),
    (CRPS, {}, GAUSSIAN),
    (CRPS, {}, POINTS),
    (RMSE, {}, GAUSSIAN),
    (RMSE, {}, POINTS),
    (MAE, {}, GAUSSIAN),
    (MAE, {}, QUANTILES),
    (IntervalCoverage, {"level": 0.8}, GAUSSIAN),
    (IntervalCoverage, {"level": 0.8}, QUANTILES),
    (IntervalScore, {"level": 0.8}, GAUSSIAN),
    (IntervalScore, {"level": 0.8}, QUANTILES),
    (Sharpness, {}, GAUSSIAN),
    (Sharpness, {"level": 0.8}, QUANTILES),
    (PinballLoss, {}, GAUSSIAN),
    (PinballLoss, {}, QUANTILES),
    (PITHistogram, {}, GAUSSIAN),
    (QuantileCalibrationError, {}, GAUSSIAN),
    (QuantileCalibrationError, {"levels": (0.1, 0.5, 0.9)}, QUANTILES),
    (AUSE, {}, GAUSSIAN),
    (AUSE, {"error": "mae", "uncertainty": "interval_width"}, QUANTILES),
    (AUSE, {"uncertainty": "epistemic_variance"}, POINTS),
]
each = pytest.mark.parametrize(
    ("kind", "options", "prediction"), EVERY, ids=[f"{k.__name__}-{o}-{type(p).__name__}" for k, o, p in EVERY]
)


def value(kind, options, prediction, y):
    metric = kind(**options)
    metric.update(prediction, y)
    return metric.compute()


@each
def test_missing_targets_are_left_out(kind, options, prediction):
    """Rows without a target change nothing, and columns without one leave those of the others."""
    y = torch.where(torch.arange(40).unsqueeze(1) % 3 > 0, Y, NAN)
    kept = y[:, 0].isfinite()
    torch.testing.assert_close(value(kind, options, prediction, y), value(kind, options, prediction[kept], Y[kept]))
    assert value(kind, options, prediction, y * NAN).isnan()
    one = Y.clone()
    one[:, 1] = NAN
    alone = type(prediction)(**{n: (t if axis is None else t[:, :, :1]) for n, t, axis in prediction._present()})
    torch.testing.assert_close(value(kind, options, prediction, one), value(kind, options, alone, Y[:, :1]))


@each
def test_a_horizon_is_as_many_targets(kind, options, prediction):
    """[B, H, D] counts as [B, H D]; a density is of the whole row."""
    shaped = {n: t if axis is None else t.unflatten(1, (10, 4)) for n, t, axis in prediction._present()}
    found = value(kind, options, type(prediction)(**shaped), Y.reshape(10, 4, 2))
    factor = 4 if kind is RegressionNLL and options else 1
    if kind is RegressionNLL and not options:
        return  # of a mixture, the density of four rows together is no sum
    torch.testing.assert_close(found, factor * value(kind, options, prediction, Y))


def test_errors_are_torchmetrics():
    assert value(MAE, {}, GAUSSIAN, Y).item() == pytest.approx(MeanAbsoluteError()(GAUSSIAN.mean, Y).item())
    assert value(RMSE, {}, GAUSSIAN, Y).item() == pytest.approx(
        MeanSquaredError(squared=False)(GAUSSIAN.mean, Y).item()
    )


def test_values_by_definition():
    low, high = GAUSSIAN.interval(0.8)
    assert value(Sharpness, {"level": 0.8}, GAUSSIAN, Y).item() == pytest.approx((high - low).mean().item())
    assert value(Sharpness, {}, GAUSSIAN, Y).item() == pytest.approx(GAUSSIAN.variance.sqrt().mean().item())
    penalty = (low - Y).clamp_min(0) + (Y - high).clamp_min(0)
    expected = (high - low + 10 * penalty).mean().item()
    assert value(IntervalScore, {"level": 0.8}, GAUSSIAN, Y).item() == pytest.approx(expected, rel=1e-6)
    counts = np.histogram(GAUSSIAN.cdf(Y).numpy(), 20, (0, 1))[0] / 80
    assert value(PITHistogram, {}, GAUSSIAN, Y).item() == pytest.approx(0.5 * abs(counts - 0.05).sum())
    assert value(PinballLoss, {}, QUANTILES, Y).item() == pytest.approx(QUANTILES.pinball(Y).mean().item())
    covered = np.mean([abs((QUANTILES.quantile(p) >= Y).double().mean().item() - p) for p in (0.1, 0.5, 0.9)])
    found = value(QuantileCalibrationError, {"levels": (0.1, 0.5, 0.9)}, QUANTILES, Y).item()
    assert found == pytest.approx(covered, abs=1e-6)


def test_what_a_prediction_lacks_is_an_error():
    with pytest.raises(InputError, match="A QuantilePrediction has no `mean`"):
        value(RMSE, {}, QUANTILES, Y)
    with pytest.raises(InputError, match="level 0.01 lies outside the predicted levels"):
        value(QuantileCalibrationError, {}, QUANTILES, Y)
    with pytest.raises(InputError, match="A PointPrediction has no `log_prob`"):
        value(RegressionNLL, {}, POINTS, Y)
    with pytest.raises(InputError, match="`error` must be one of 'rmse', 'mae'"):
        AUSE(error="mse")
    with pytest.raises(InputError, match="`uncertainty` must be one of"):
        AUSE(uncertainty="entropy")
    for kind in (IntervalScore, Sharpness):
        with pytest.raises(InputError, match=r"`level` must be a number in \(0, 1\)"):
            kind(level=95)


def test_a_perfect_forecast_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 20_000, 1, generator=generator)
    prediction = GaussianMixturePrediction(mean, torch.ones_like(mean))
    y = mean[0] + torch.randn(20_000, 1, generator=generator)
    assert value(PITHistogram, {"num_bins": 10}, prediction, y) < 0.02
    assert value(IntervalCoverage, {"level": 0.8}, prediction, y).item() == pytest.approx(0.8, abs=0.01)
    wide = prediction.replace(member_variance=4 * torch.ones_like(mean))
    assert value(IntervalScore, {"level": 0.8}, prediction, y) < value(IntervalScore, {"level": 0.8}, wide, y)
    assert value(PITHistogram, {"num_bins": 10}, wide, y) > 0.1

"""Detection and regression metrics: their values, and what `update` refuses."""

import pytest
import torch

from lightning_uq import functional
from lightning_uq.errors import InputError
from lightning_uq.metrics import (
    CRPS,
    OODAUPRC,
    OODAUROC,
    OODFPR95,
    RMSE,
    IntervalCoverage,
    QuantileCalibrationError,
    RegressionNLL,
)
from lightning_uq.predictions import GaussianMixturePrediction, StudentTPrediction

DETECTION = [OODAUROC, OODAUPRC, OODFPR95]
REGRESSION = [RegressionNLL, CRPS, RMSE, IntervalCoverage, QuantileCalibrationError]


@pytest.mark.parametrize("constructor", DETECTION)
@pytest.mark.parametrize(
    ("label", "missing"), [(0, "out-of-distribution"), (1, "in-distribution")], ids=["all_in", "all_out"]
)
def test_one_kind_alone_is_nan_with_one_warning(constructor, label, missing):
    metric = constructor()
    metric.update(torch.rand(4), torch.full((4,), label))
    with pytest.warns(
        UserWarning, match=f"{constructor.__name__} has seen no {missing} rows; its value is NaN"
    ) as record:
        assert metric.compute().isnan()
    assert len(record) == 1
    metric.update(torch.rand(4), torch.full((4,), 1 - label))
    assert metric.compute().isfinite()


def test_detection_defaults_and_choices():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(100, generator=generator)
    is_ood = torch.rand(100, generator=generator) < 0.3
    found = {}
    for name, metric in {
        "auroc": OODAUROC(),
        "out": OODAUPRC(),
        "in": OODAUPRC(positive="in"),
        "fpr": OODFPR95(),
        "fpr_out": OODFPR95(positive="out"),
    }.items():
        metric.update(score, is_ood)
        found[name] = metric.compute()
    assert torch.equal(found["auroc"], functional.auroc(score, is_ood))
    assert torch.equal(found["out"], functional.average_precision(score, is_ood, "out"))
    assert torch.equal(found["in"], functional.average_precision(score, is_ood, "in"))
    assert torch.equal(found["fpr"], functional.fpr_at_tpr(score, is_ood, 0.95, "in"))
    assert torch.equal(found["fpr_out"], functional.fpr_at_tpr(score, is_ood, 0.95, "out"))
    assert len({value.item() for value in found.values()}) == 5


@pytest.mark.parametrize("constructor", DETECTION)
def test_bad_detection_batches(constructor):
    metric = constructor()
    with pytest.raises(InputError, match="`score` must hold numbers, but it holds NaN"):
        metric.update(torch.tensor([torch.nan]), torch.tensor([1]))
    with pytest.raises(InputError, match=r"`is_ood` must have shape \[2\], but its shape is \[1\]"):
        metric.update(torch.zeros(2), torch.tensor([1]))
    with pytest.raises(InputError, match="`is_ood` must hold only 0 and 1"):
        metric.update(torch.zeros(2), torch.tensor([1, -1]))
    if constructor is not OODAUROC:
        with pytest.raises(InputError, match="`positive` must be one of 'out', 'in', but it is 'id'"):
            constructor(positive="id")


def test_mixed_dtypes_of_scores():
    metric = OODAUROC()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        metric.update(torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([False, True]))
    metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.uint8))
    assert metric.compute() == 1


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 20, 2, generator=generator)
    variance = 0.1 + torch.rand(3, 20, 2, generator=generator)
    return mean, variance, torch.randn(20, 2, generator=generator)


@pytest.mark.parametrize("constructor", REGRESSION)
def test_objects_and_tuples_agree(constructor, problem):
    mean, variance, target = problem
    metric, twin = constructor(), constructor()
    metric.update((mean, variance), target)
    twin.update(GaussianMixturePrediction(mean, variance), target)
    assert torch.equal(metric.compute(), twin.compute())


def test_values_equal_the_predictions_own(problem):
    mean, variance, target = problem
    prediction = GaussianMixturePrediction(mean, variance)

    def value(metric):
        metric.update(prediction, target)
        return metric.compute().item()

    assert value(RegressionNLL()) == pytest.approx(-prediction.log_prob(target).double().mean().item(), rel=1e-6)
    matched = torch.distributions.Normal(prediction.mean, prediction.variance.sqrt()).log_prob(target)
    assert value(RegressionNLL(moment_matched=True)) == pytest.approx(-matched.sum(1).double().mean().item(), rel=1e-5)
    assert value(CRPS()) == pytest.approx(prediction.crps(target).double().mean().item(), rel=1e-6)
    squared = (prediction.mean - target).double().square().mean()
    assert value(RMSE()) == pytest.approx(squared.sqrt().item(), rel=1e-6)
    low, high = prediction.interval(0.7)
    covered = ((low <= target) & (target <= high)).double().mean().item()
    assert value(IntervalCoverage(0.7)) == pytest.approx(covered)


def test_rmse_far_from_zero():
    """The error of a large target, in float64: squares of float32 differences keep their digits."""
    metric = RMSE()
    target = torch.full((1000, 1), 1e6) + torch.arange(1000.0)[:, None] % 2
    metric.update((torch.full((1, 1000, 1), 1e6), torch.ones(1, 1000, 1)), target)
    assert metric.compute().item() == pytest.approx(0.5**0.5, rel=1e-9)


@pytest.mark.parametrize("constructor", REGRESSION)
def test_bad_regression_batches(constructor, problem):
    mean, variance, target = problem
    metric = constructor()
    with pytest.raises(
        InputError,
        match=r"`target` must have shape \[20, 2\], but its shape is \[20\]. An array of another shape would",
    ):
        metric.update((mean, variance), target[:, 0])
    with pytest.raises(InputError, match=r"`mean` must be a floating-point tensor \[Z, B, D\] .*mean\[None\]"):
        metric.update((mean[0], variance[0]), target)
    with pytest.raises(InputError, match="`variance` must be positive and finite"):
        metric.update((mean, -variance), target)
    with pytest.raises(InputError, match="`target` must be finite, or NaN"):
        metric.update((mean, variance), target / 0)
    for wrong in (mean, (mean,), None):
        with pytest.raises(InputError, match=r"must be a prediction of numbers, or a tuple \(mean, variance\)"):
            metric.update(wrong, target)
    student = StudentTPrediction(mean, variance, variance + 1, variance)
    with pytest.raises(
        InputError,
        match=r"`target` must have shape \[20, 2\], but its shape is \[20\]. An array of another shape would",
    ):
        metric.update(student, target[:, 0])
    with pytest.raises(InputError, match="`target` must be finite, or NaN"):
        metric.update(student, target / 0)


@pytest.mark.parametrize("level", [0, 1, -0.5, 90, True, "0.9"])
def test_bad_level(level):
    with pytest.raises(InputError, match=r"`level` must be a number in \(0, 1\), but it is"):
        IntervalCoverage(level)


def test_bad_regression_options():
    with pytest.raises(InputError, match="`num_levels` must be an integer of at least 1, but it is 0"):
        QuantileCalibrationError(num_levels=0)
    with pytest.raises(InputError, match="`norm` must be one of"):
        QuantileCalibrationError(norm="l0")
    with pytest.raises(InputError, match="`moment_matched` must be True or False"):
        RegressionNLL(moment_matched="mixture")

"""Numbers under a Gaussian per hypothesis."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.metrics import CRPS, RMSE, IntervalCoverage, RegressionNLL
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks import OutputShapeError, Regression

OUTPUTS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))  # Z, B, 2 D
TARGET = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))


@given(seed=st.integers(0, 99), rows=st.integers(1, 6), dims=st.integers(1, 4))
@settings(max_examples=30)
def test_the_loss_is_torch_s_with_its_gradient(seed, rows, dims):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(rows, 2 * dims, generator=generator).requires_grad_()
    target = torch.randn(rows, dims, generator=generator)
    sums, counts = Regression().sample_losses(output, target)
    assert sums.shape == (rows,)
    assert counts.tolist() == [dims] * rows
    mean, raw = output.chunk(2, -1)
    expected = F.gaussian_nll_loss(mean, target, F.softplus(raw) + 1e-6, eps=0, reduction="none")
    torch.testing.assert_close(sums, expected.sum(1))
    value = sums.sum() / counts.sum()
    ours, theirs = (torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in (value, expected.mean()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    low, target = OUTPUTS[0].to(dtype), TARGET.to(dtype)
    sums, counts = Regression().sample_losses(low, target)
    expected, _ = Regression().sample_losses(low.float(), target.float())
    assert sums.dtype == counts.dtype == torch.float32
    torch.testing.assert_close(sums, expected, rtol=1e-2, atol=1e-2)


def test_predictions_and_scores():
    task = Regression()
    prediction = task.predict(OUTPUTS)
    assert isinstance(prediction, GaussianMixturePrediction)
    mean, raw = OUTPUTS.chunk(2, -1)
    variance = F.softplus(raw) + 1e-6
    torch.testing.assert_close(prediction.mean, mean.mean(0))
    torch.testing.assert_close(prediction.variance, variance.mean(0) + mean.var(0, correction=0))
    assert task.ood_score in task.score_names
    assert all(prediction.score(name).shape == (5,) for name in task.score_names)
    assert task.num_outputs is None
    assert task.has_numeric_targets
    assert not task.has_classes


def test_metrics():
    test = Regression().metrics("test")
    assert {name: type(metric) for name, metric in test.items()} == {
        "nll": RegressionNLL,
        "rmse": RMSE,
        "crps": CRPS,
        "coverage_95": IntervalCoverage,
    }
    assert test["coverage_95"].level == 0.95
    assert list(Regression().metrics("val")) == ["nll", "rmse"]
    assert Regression().metric_on_bar in Regression().metrics("val")


@pytest.mark.parametrize("fields", [{"head": "median"}, {"loss": "mse"}])
def test_bad_fields(fields):
    ((name, _),) = fields.items()
    with pytest.raises(InputError, match=f"`{name}` must be one of"):
        Regression(**fields)


@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 5, 0), (1, 5), (1, 5, 2, 3)])
def test_bad_outputs(shape):
    with pytest.raises(
        OutputShapeError,
        match=r"for Regression\(\) must return \[B, 2 D\], the means and then the raw variances.*`output`",
    ):
        Regression().check_output(torch.zeros(shape))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            TARGET[:, 0],
            r"must have shape \[5, 2\], because the network returns \[5, 4\], but they have \[5\]; .*broadcast",
        ),
        (TARGET[:, :1], r"must have shape \[5, 2\], .* but they have \[5, 1\]"),
        (TARGET.long(), "must be floating-point numbers, but they are torch.int64"),
        (TARGET / 0, "must be finite, or NaN if they are missing, but they hold infinity"),
    ],
)
def test_bad_targets(target, message):
    Regression().check_output(OUTPUTS)
    Regression().check_target(TARGET, OUTPUTS)
    with pytest.raises(InputError, match=message):
        Regression().check_target(target, OUTPUTS)
    if "finite" in message:
        Regression().check_target(target, OUTPUTS, values=False)


def test_a_target_alone_is_taken_or_explained():
    assert Regression().accepts(TARGET) is None
    assert Regression().accepts(TARGET.long()) == "the targets are not floating-point numbers"


def test_numbers_that_nothing_can_be_predicted_from():
    outputs = torch.tensor([[[0.0, -math.inf], [math.nan, 0.0], [math.inf, 0.0], [1.0, 2.0]]])
    assert Regression().invalid(outputs).any(-1).tolist() == [[True, True, True, False]]

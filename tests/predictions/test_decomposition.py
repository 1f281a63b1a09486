"""The predictive entropy is the sum of its two parts, or the parts say that they are of something else."""

import pytest
import torch

from lightning_uq import TemperatureScaling
from lightning_uq.callbacks import IsotonicScaling, MatrixScaling, VectorScaling
from lightning_uq.errors import InputError
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction
from tests.predictions.cases import bernoulli, categorical, dirichlet

T = {"temperature": torch.tensor(2.5)}
SCALING = {"class_scaling": torch.stack([torch.full((5,), 0.7), torch.arange(5.0)])}
POOLED = [(categorical, T), (categorical, SCALING), (bernoulli, T)]


def assert_adds_up(prediction):
    table = prediction.to_dict()
    torch.testing.assert_close(
        table["predictive_entropy"], table["expected_entropy"] + table["mutual_information"], rtol=1e-5, atol=1e-6
    )
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        assert torch.equal(table[name], getattr(prediction, name))
        summed = table[name].sum(1) if isinstance(prediction, BernoulliPrediction) else table[name]
        torch.testing.assert_close(prediction.score(name), summed)


@pytest.mark.parametrize("z", [1, 3])
@pytest.mark.parametrize("make", [categorical, bernoulli, dirichlet])
def test_without_a_calibration_they_add_up(make, z):
    assert_adds_up(make(z=z))


@pytest.mark.parametrize(("make", "calibration"), POOLED)
def test_of_one_network_they_add_up_after_any_calibration(make, calibration):
    prediction = make(z=1, **calibration)
    assert_adds_up(prediction)
    assert torch.equal(prediction.predictive_entropy, prediction.expected_entropy)  # exactly
    assert not prediction.mutual_information.any()
    assert not torch.allclose(prediction.expected_entropy, prediction.uncalibrated_expected_entropy)
    pooled = prediction.pool()
    for name, value in prediction.to_dict().items():
        torch.testing.assert_close(pooled.to_dict()[name], value)


@pytest.mark.parametrize("scope", ["shared", "member"])
def test_they_add_up_where_the_members_are_calibrated(scope):
    g = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(3, 60, 4, generator=g), torch.randint(4, (60,), generator=g)
    logits[:, torch.arange(60), labels] += 3
    prediction = TemperatureScaling(scope=scope).fit_logits(logits, labels).calibrate(CategoricalPrediction(logits))
    assert not torch.allclose(prediction.logits, logits)
    assert_adds_up(prediction)
    assert_adds_up(prediction[:1])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("make", "calibration"), [*POOLED, (dirichlet, T), (lambda **k: dirichlet(z=1, **k), T)])
def test_parts_of_the_uncalibrated_members_are_named_so(make, calibration, pool):
    plain, prediction = make(), make(**calibration)
    prediction = prediction.pool() if pool else prediction
    table = prediction.to_dict()
    for name in ("expected_entropy", "mutual_information"):
        assert name not in table
        torch.testing.assert_close(table[f"uncalibrated_{name}"], getattr(plain, name))
        torch.testing.assert_close(prediction.score(f"uncalibrated_{name}"), plain.score(name))
        for read in (lambda one, n=name: getattr(one, n), lambda one, n=name: one.score(n)):
            with pytest.raises(InputError, match=f"`{name}` is not defined for.*Use `uncalibrated_{name}`"):
                read(prediction)


def test_the_calibrations_of_callbacks():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    logits = 2 * torch.randn(1, 90, 3, generator=g)
    logits[:, torch.arange(90), labels] += 1
    for callback in (
        TemperatureScaling(),
        TemperatureScaling(scope="member"),
        VectorScaling(),
        MatrixScaling(),
        IsotonicScaling(),
    ):
        assert_adds_up(callback.fit_logits(logits, labels).calibrate(CategoricalPrediction(logits)))

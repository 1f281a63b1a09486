"""Numbers under a normal-inverse-gamma per hypothesis."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.losses import EvidentialRegressionLoss
from lightning_uq.predictions import StudentTPrediction
from lightning_uq.tasks import EvidentialRegression, OutputShapeError

OUTPUTS = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)).double()  # Z, B, 4 D with D = 2
TARGET = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()


def test_the_loss_by_its_definition():
    """Amini et al.: the negative log-density of the Student-t, and |y - gamma| (2 nu + alpha) as its regularizer."""
    sums, counts = EvidentialRegression(reg_factor=0.3).sample_losses(OUTPUTS[0], TARGET)
    assert counts.tolist() == [2] * 6
    prediction = EvidentialRegression().predict(OUTPUTS[:1])
    location, nu, alpha, beta = (getattr(prediction, name)[0].numpy() for name in ("location", "nu", "alpha", "beta"))
    t = stats.t(2 * alpha, location, (beta * (1 + nu) / (nu * alpha)) ** 0.5)
    y = TARGET.numpy()
    expected = -t.logpdf(y) + 0.3 * abs(y - location) * (2 * nu + alpha)
    torch.testing.assert_close(sums, torch.from_numpy(expected).sum(1))


@pytest.mark.parametrize("loss", ["amini", "scaled", "meinert"])
def test_the_mean_is_the_loss_module_s_with_its_gradient(loss):
    task = EvidentialRegression(loss, 0.2)
    output = OUTPUTS[0, :, : 2 * task.outputs_per_target].clone().requires_grad_()
    sums, counts = task.sample_losses(output, TARGET)
    expected = EvidentialRegressionLoss(loss, 0.2)(output, TARGET)
    value = sums.sum() / counts.sum()
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(each, output, retain_graph=True)[0] for each in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_predictions_and_scores():
    task = EvidentialRegression()
    prediction = task.predict(OUTPUTS)
    assert isinstance(prediction, StudentTPrediction)
    assert prediction.location.shape == (3, 6, 2)
    torch.testing.assert_close(prediction.mean, OUTPUTS[..., :2].mean(0))
    torch.testing.assert_close(prediction.nu, F.softplus(OUTPUTS[..., 2:4]), rtol=1e-4, atol=1e-5)
    assert task.ood_score in task.score_names
    assert all(prediction.score(name).shape == (6,) for name in task.score_names)


def test_bad_fields():
    with pytest.raises(InputError, match="`loss` must be one of 'amini', 'scaled', 'meinert'"):
        EvidentialRegression(loss="nig")
    for factor in (-0.1, float("nan")):
        with pytest.raises(InputError, match="`reg_factor` must be at least 0, but it is"):
            EvidentialRegression(reg_factor=factor)


def test_bad_outputs_and_targets():
    EvidentialRegression().check_output(OUTPUTS)
    EvidentialRegression("meinert").check_output(OUTPUTS[..., :6])
    with pytest.raises(OutputShapeError, match=r"'meinert'\) must return \[B, 3 D\], .* returned shape \[6, 8\]"):
        EvidentialRegression("meinert").check_output(OUTPUTS)
    with pytest.raises(InputError, match=r"must have shape \[6, 2\], .* but they have \[6\]"):
        EvidentialRegression().check_target(TARGET[:, 0], OUTPUTS)

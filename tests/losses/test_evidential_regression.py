import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Gamma, Normal, StudentT

from lightning_uq.errors import InputError
from lightning_uq.losses import EvidentialRegressionLoss, evidential_regression_loss, split_nig
from lightning_uq.losses.evidential_regression import student_t_scale

LOSSES = ["amini", "scaled", "meinert"]


def parameters(n=5, d=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    location, target = torch.randn(2, n, d, generator=generator, dtype=dtype)
    nu, alpha, beta = torch.rand(3, n, d, generator=generator, dtype=dtype) * 3 + 0.1
    return location, nu, alpha + 1, beta, target


def test_student_t_is_the_marginal_of_the_normal_inverse_gamma():
    location, nu, alpha, beta = (x[:1, :1] for x in parameters()[:4])
    variance = 1 / Gamma(alpha, beta).sample((400_000,))
    y = Normal(Normal(location, (variance / nu).sqrt()).sample(), variance.sqrt()).sample()
    student = StudentT(2 * alpha, location, student_t_scale(nu, alpha, beta))
    levels = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    expected = student.sample((400_000,)).flatten().quantile(levels)
    torch.testing.assert_close(y.flatten().quantile(levels), expected, rtol=0.02, atol=0.02)


def test_amini_s_loss_is_the_negative_log_density_and_its_regularizer():
    location, nu, alpha, beta, y = parameters()
    density = StudentT(2 * alpha, location, student_t_scale(nu, alpha, beta)).log_prob(y)
    # The formula as the paper has it.
    omega = 2 * beta * (1 + nu)
    paper = 0.5 * (torch.pi / nu).log() - alpha * omega.log() + torch.lgamma(alpha) - torch.lgamma(alpha + 0.5)
    paper = paper + (alpha + 0.5) * ((y - location).square() * nu + omega).log()
    torch.testing.assert_close(paper, -density)
    value = evidential_regression_loss(location, nu, alpha, beta, y, 0.0, reduction="none")
    torch.testing.assert_close(value, paper)
    regularized = evidential_regression_loss(location, nu, alpha, beta, y, 0.3, reduction="none")
    torch.testing.assert_close(regularized - value, 0.3 * (y - location).abs() * (2 * nu + alpha))


def test_scaled_and_meinert_losses():
    location, nu, alpha, beta, y = parameters()
    plain = evidential_regression_loss(location, nu, alpha, beta, y, 0.0, "scaled", "none")
    value = evidential_regression_loss(location, nu, alpha, beta, y, 0.3, "scaled", "none")
    residual = (y - location).abs() / student_t_scale(nu, alpha, beta)
    torch.testing.assert_close(value - plain, 0.3 * residual * (2 * nu + alpha))
    value = evidential_regression_loss(location, nu, nu + 1, beta, y, 0.3, "meinert", "none")
    torch.testing.assert_close(value, (beta / nu).log() + (1 + 0.3 * nu) * (y - location) ** 2 * nu / beta)


@pytest.mark.parametrize(("loss", "changes"), [("scaled", False), ("meinert", False), ("amini", True)])
def test_only_amini_s_regularizer_depends_on_the_unit(loss, changes):
    location, nu, alpha, beta, y = parameters()

    def gradient_of_nu(unit):
        leaf = nu.clone().requires_grad_()
        value = evidential_regression_loss(location * unit, leaf, alpha, beta * unit**2, y * unit, 0.3, loss, "sum")
        return torch.autograd.grad(value, leaf)[0]

    assert torch.allclose(gradient_of_nu(1.0), gradient_of_nu(100.0)) is not changes


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    leaves = [x.requires_grad_() for x in parameters()]
    function = lambda *p: evidential_regression_loss(*p, reg_factor=0.1, loss=loss, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss):
    rows = evidential_regression_loss(*parameters(), loss=loss, reduction="none")
    assert rows.shape == (5, 2)
    torch.testing.assert_close(evidential_regression_loss(*parameters(), loss=loss), rows.mean())
    torch.testing.assert_close(evidential_regression_loss(*parameters(), loss=loss, reduction="sum"), rows.sum())


@settings(max_examples=30)
@given(alpha=st.floats(1.001, 1e5), nu=st.floats(1e-5, 1e5), beta=st.floats(1e-5, 1e5), error=st.floats(0, 1e3))
def test_float32_keeps_its_digits(alpha, nu, beta, error):
    one = torch.ones(1, 1)
    arguments = [0 * one, nu * one, alpha * one, beta * one, error * one]
    value = evidential_regression_loss(*arguments)
    truth = evidential_regression_loss(*(x.double() for x in arguments))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


def test_raw_outputs_are_split():
    raw = torch.tensor([[1.0, 2.0, 0.0, 5.0, -100.0, 0.5, 0.1, -3.0]])
    location, nu, alpha, beta = split_nig(raw)
    softplus = torch.nn.functional.softplus
    torch.testing.assert_close(location, raw[:, :2])
    torch.testing.assert_close(nu, softplus(raw[:, 2:4]) + 1e-6)
    torch.testing.assert_close(alpha, softplus(raw[:, 4:6]) + 1 + 1e-6)
    torch.testing.assert_close(beta, softplus(raw[:, 6:]) + 1e-6)
    assert (alpha > 1).all()
    location, nu, alpha, beta = split_nig(raw[:, :6], "meinert")
    torch.testing.assert_close(alpha, nu + 1)
    torch.testing.assert_close(beta, softplus(raw[:, 4:6]) + 1e-6)
    assert split_nig(raw.bfloat16())[1].dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_the_module_takes_raw_outputs(loss):
    raw, y = torch.randn(4, 6 if loss == "meinert" else 8), torch.randn(4, 2)
    value = EvidentialRegressionLoss(loss, 0.1)(raw, y)
    torch.testing.assert_close(value, evidential_regression_loss(*split_nig(raw, loss), y, 0.1, loss))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_nig(torch.zeros(2, 6)), r"\[..., 4 D\] for loss='amini', but its shape is \[2, 6\]"),
        (
            lambda: split_nig(torch.zeros(2, 4), "meinert"),
            r"\[..., 3 D\] for loss='meinert', but its shape is \[2, 4\]",
        ),
        (lambda: split_nig(torch.zeros(2, 4), "nig"), "`loss` must be one of 'amini', 'scaled', 'meinert'"),
        (
            lambda: evidential_regression_loss(*parameters()[:4], torch.zeros(5)),
            r"`target` must have shape \[5, 2\], but its shape is \[5\]",
        ),
        (lambda: evidential_regression_loss(*parameters(), -0.1), "`reg_factor` must be at least 0"),
        (lambda: evidential_regression_loss(*parameters(), reduction="max"), "`reduction` must be one of"),
        (lambda: EvidentialRegressionLoss("nig"), "`loss` must be one of"),
        (lambda: EvidentialRegressionLoss(reg_factor=-1), "`reg_factor` must be at least 0"),
        (lambda: EvidentialRegressionLoss(reduction="max"), "`reduction` must be one of"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()

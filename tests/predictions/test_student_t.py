import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional import student_t
from lightning_uq.predictions import StudentTPrediction
from tests.predictions.cases import student_t as make
from tests.predictions.cases import tensors

Y = torch.randn(4, 2, generator=torch.Generator().manual_seed(7))


def scipy_t(p):
    return stats.t(p.degrees_of_freedom.double().numpy(), p.location.double().numpy(), p.scale.double().numpy())


def close(found, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found.double(), torch.as_tensor(np.asarray(expected)).double(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------- one network


def test_moments_are_those_of_the_student_t():
    p = make(z=1)
    (variance,) = scipy_t(p).var()
    close(p.variance, variance)
    close(p.log_prob(Y), scipy_t(p).logpdf(Y.double().numpy())[0].sum(-1))
    lower, upper = p.interval(0.9)
    close(p.cdf(upper) - p.cdf(lower), torch.full((4, 2), 0.9))
    close(p.quantile(0.05), lower)


def test_one_network_has_the_former_numbers():
    p = make(z=1)
    location, nu, alpha, beta = (x[0] for x in (p.location, p.nu, p.alpha, p.beta))
    df, scale = 2 * alpha, (beta / alpha * (1 + 1 / nu)).sqrt()
    assert torch.equal(p.mean, location)
    assert torch.equal(p.aleatoric_variance, beta / (alpha - 1))
    assert torch.equal(p.epistemic_variance, beta / (alpha - 1) / nu)
    assert torch.equal(p.variance, beta / (alpha - 1) + beta / (alpha - 1) / nu)
    assert torch.equal(p.log_prob(Y), student_t.student_t_log_prob(Y, df, location, scale).sum(-1))
    assert torch.equal(p.cdf(Y), student_t.student_t_cdf(Y, df, location, scale))
    assert torch.equal(p.crps(Y), student_t.student_t_crps(Y, df, location, scale))
    upper = student_t.student_t_quantile(0.95, df, location, scale)
    assert torch.equal(p.quantile(0.95), upper)
    lower = p.interval(0.9)[0]
    assert torch.equal(lower, 2 * location - upper)
    named = p.to_dict()
    assert torch.equal(named["degrees_of_freedom"], df)
    assert torch.equal(named["scale"], scale)


def test_both_readings():
    p = make(z=1)
    nu, alpha, beta = p.nu[0], p.alpha[0], p.beta[0]
    aleatoric, epistemic = p.uncertainties()
    torch.testing.assert_close(aleatoric, (beta / (alpha - 1)).sqrt())
    torch.testing.assert_close(epistemic, (beta / (alpha - 1) / nu).sqrt())
    aleatoric, epistemic = p.uncertainties("meinert")
    torch.testing.assert_close(aleatoric, (beta * (1 + nu) / (alpha * nu)).sqrt())
    torch.testing.assert_close(epistemic, 1 / nu.sqrt())


def test_huge_parameters_have_a_scale():
    huge = torch.full((1, 1, 1), 3e38)
    torch.testing.assert_close(StudentTPrediction(0 * huge, huge, huge, huge).scale, torch.ones(1, 1, 1))


# ---------------------------------------------------------------------- several hypotheses


def test_moments_are_those_of_the_mixture():
    p = make(z=3)
    mean, variance = p.location.double().mean(0), torch.from_numpy(scipy_t(p).var()).mean(0)
    between = p.location.double().var(0, unbiased=False)
    close(p.mean, mean)
    close(p.variance, variance + between)
    close(p.aleatoric_variance, (p.beta / (p.alpha - 1)).mean(0))
    close(p.epistemic_variance, (p.beta / (p.alpha - 1) / p.nu).mean(0) + between)
    close(p.inverse_nu, (1 / p.nu).mean(0))
    aleatoric, epistemic = p.uncertainties()
    close(aleatoric.square() + epistemic.square(), p.variance)


def test_densities_and_distributions_are_those_of_the_mixture():
    p, y = make(z=3), Y.double().numpy()
    close(p.log_prob(Y), np.log(np.exp(scipy_t(p).logpdf(y).sum(-1)).mean(0)))
    close(p.cdf(Y), scipy_t(p).cdf(y).mean(0))
    for level in (1e-3, 0.5, 0.99):
        close(p.cdf(p.quantile(level)), torch.full((4, 2), level), rtol=1e-9)
    lower, upper = p.interval(0.8)
    close(p.cdf(lower), torch.full((4, 2), 0.1))
    close(p.cdf(upper), torch.full((4, 2), 0.9))
    assert list(p.to_dict(0.8)) == ["mean", "variance", "aleatoric_variance", "epistemic_variance", "lower", "upper"]


def test_samples_have_its_crps():
    p = make(1, z=3)
    rng = np.random.default_rng(0)
    draws = np.concatenate(scipy_t(p).rvs((200_000, 3, 1, 2), random_state=rng).swapaxes(0, 1))
    y = Y[:1].double().numpy()
    shuffled = draws[rng.permutation(len(draws))]
    expected = np.abs(draws - y).mean(0) - np.abs(draws - shuffled).mean(0) / 2
    close(p.crps(Y[:1]), expected, rtol=2e-2)


def test_copies_of_a_hypothesis_change_nothing():
    one = make(z=1)
    many = StudentTPrediction(**{name: tensor.repeat(3, 1, 1) for name, tensor in tensors(one).items()})
    for name in ("mean", "variance", "aleatoric_variance", "epistemic_variance", "inverse_nu"):
        torch.testing.assert_close(getattr(many, name), getattr(one, name))
    for name in ("log_prob", "cdf", "crps"):
        torch.testing.assert_close(getattr(many, name)(Y), getattr(one, name)(Y), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(many.quantile(0.2), one.quantile(0.2))


def test_scores_are_means_over_the_target_dimensions():
    p = make()
    assert p.score_names == ("variance", "aleatoric_variance", "epistemic_variance", "inverse_nu")
    for name in p.score_names:
        assert torch.equal(p.score(name), getattr(p, name).mean(1))


def test_all_four_parameters_are_shown():
    p = make()
    assert repr(p) == "StudentTPrediction(location=[3, 4, 2], nu=[3, 4, 2], alpha=[3, 4, 2], beta=[3, 4, 2])"
    assert torch.equal(p.degrees_of_freedom, 2 * p.alpha)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.log_prob(torch.zeros(4)), r"`target` must have shape \[4, 2\], but its shape is \[4\]"),
        (lambda p: p.interval(1.0), r"`level` must be a number in \(0, 1\), but it is 1.0"),
        (lambda p: p.quantile(0), r"`level` must be a number in \(0, 1\)"),
        (lambda p: p.uncertainties("both"), "`reading` must be 'amini' or 'meinert', but it is 'both'"),
        (
            lambda p: p.uncertainties("meinert"),
            "defined only for one hypothesis, but the prediction has 3. Read `scale` and",
        ),
        (
            lambda p: StudentTPrediction(*[torch.ones(4)] * 4),
            r"one shape \[Z, B, D\], but their shapes are \[4\], \[4\]",
        ),
        (lambda p: StudentTPrediction(*[torch.ones(4, 1)] * 4), r"Add the index axis: `location.unsqueeze\(0\)`"),
        (lambda p: StudentTPrediction(*[torch.ones(1, 4, 1)] * 4), "`alpha` above 1, but some of their values are not"),
        (lambda p: StudentTPrediction(*[torch.full((1, 1, 1), math.nan)] * 4), "some of their values are not"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(make())

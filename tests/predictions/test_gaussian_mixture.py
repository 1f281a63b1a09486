import pytest
import torch
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.predictions import GaussianMixturePrediction
from tests.predictions.cases import gaussian_mixture


def test_the_variance_is_the_sum_of_its_parts():
    prediction = gaussian_mixture()
    torch.testing.assert_close(prediction.mean, prediction.member_mean.mean(0))
    torch.testing.assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance)
    torch.testing.assert_close(prediction.aleatoric_variance, prediction.member_variance.mean(0))
    torch.testing.assert_close(prediction.epistemic_variance, prediction.member_mean.var(0, unbiased=False))
    assert prediction.num_indices == 3


def test_scores_are_means_over_the_target_dimensions():
    prediction = gaussian_mixture()
    assert prediction.score_names == ("variance", "aleatoric_variance", "epistemic_variance")
    for name in prediction.score_names:
        assert torch.equal(prediction.score(name), getattr(prediction, name).mean(1))


def test_the_joint_density_of_two_dimensions_is_not_the_product_of_marginals():
    prediction = gaussian_mixture()
    y = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    normal = stats.norm(prediction.member_mean.double().numpy(), prediction.member_variance.double().sqrt().numpy())
    expected = torch.from_numpy(normal.logpdf(y.double().numpy())).sum(-1).exp().mean(0).log()
    torch.testing.assert_close(prediction.log_prob(y).double(), expected, rtol=1e-4, atol=1e-5)


def test_interval_holds_its_share():
    prediction = gaussian_mixture()
    lower, upper = prediction.interval(0.9)
    share = prediction.cdf(upper) - prediction.cdf(lower)
    torch.testing.assert_close(share, torch.full_like(share, 0.9), rtol=0, atol=1e-5)
    named = prediction.to_dict(interval=0.9)
    assert torch.equal(named["lower"], lower)
    assert torch.equal(named["upper"], upper)
    assert "lower" not in prediction.to_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.log_prob(torch.zeros(4)), r"`target` must have shape \[4, 2\], .* \[4\]. .* would broadcast"),
        (lambda p: p.crps(torch.zeros(4, 1)), "would broadcast"),
        (lambda p: p.cdf(torch.zeros(1, 2)), "would broadcast"),
        (lambda p: p.interval(1.0), r"`level` must be a number in \(0, 1\), but it is 1.0"),
        (lambda p: p.quantile(0), r"`level` must be a number in \(0, 1\)"),
        (
            lambda p: GaussianMixturePrediction(torch.zeros(1, 2, 3), torch.ones(1, 2, 1)),
            r"`member_mean`, `member_variance` must have one shape \[Z, B, D\], but .* \[1, 2, 3\], \[1, 2, 1\]",
        ),
        (
            lambda p: GaussianMixturePrediction(torch.zeros(2, 1), torch.ones(2, 1)),
            r"Add the index axis: `member_mean.unsqueeze\(0\)`",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call(gaussian_mixture())

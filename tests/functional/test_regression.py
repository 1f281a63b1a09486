"""Mixture scores against scipy and simulation."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from lightning_uq.errors import InputError
from lightning_uq.functional import gaussian_nll, interval_covered, mixture_quantile, quantile_calibration_error
from lightning_uq.functional.regression import check_mixture, quantile_counts


def mixture(seed, members=4, rows=30, dims=2):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(members, rows, dims, generator=generator)
    variance = 0.1 + torch.rand(members, rows, dims, generator=generator)
    return mean, variance, torch.randn(rows, dims, generator=generator)


def test_nll_of_the_mixture_is_joint_over_dimensions():
    mean, variance, target = mixture(0)
    members = stats.norm.logpdf(target.numpy(), mean.numpy(), variance.sqrt().numpy()).sum(-1)
    expected = np.log(4) - logsumexp(members, 0)
    np.testing.assert_allclose(gaussian_nll(mean, variance, target), expected, rtol=1e-5)


def test_nll_of_the_matched_gaussian():
    mean, variance, target = mixture(1)
    m, v = mean.double().numpy(), variance.double().numpy()
    center, spread = m.mean(0), (v + m**2).mean(0) - m.mean(0) ** 2
    expected = -stats.norm.logpdf(target.numpy(), center, np.sqrt(spread)).sum(-1)
    np.testing.assert_allclose(gaussian_nll(mean, variance, target, moment_matched=True), expected, rtol=1e-5)


def test_one_member_is_one_gaussian():
    mean, variance, target = mixture(2, members=1)
    torch.testing.assert_close(
        gaussian_nll(mean, variance, target), gaussian_nll(mean, variance, target, moment_matched=True)
    )


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
def test_coverage_equals_a_search_for_the_quantiles(level):
    mean, variance, target = (x.double() for x in mixture(3, rows=200))
    low = mixture_quantile(mean, variance, (1 - level) / 2)
    high = mixture_quantile(mean, variance, (1 + level) / 2)
    assert torch.equal(interval_covered(mean, variance, target, level), (low <= target) & (target <= high))


def test_coverage_and_quantiles_of_the_truth_are_calibrated():
    mean, variance, _ = mixture(4, rows=20000, dims=1)
    generator = torch.Generator().manual_seed(1)
    member = torch.randint(4, (1, 20000, 1), generator=generator)
    noise = torch.randn(20000, 1, generator=generator)
    target = mean.gather(0, member)[0] + variance.gather(0, member)[0].sqrt() * noise
    for level in (0.5, 0.9):
        covered = interval_covered(mean, variance, target, level).double().mean().item()
        assert abs(covered - level) < 4 * np.sqrt(level * (1 - level) / 20000)
    counts = quantile_counts(mean, variance, target, 19)
    total = torch.tensor(20000.0)
    assert quantile_calibration_error(counts, total) < 0.01
    assert quantile_calibration_error(counts, total, "max") < 0.02
    shifted = quantile_counts(mean + 1, variance, target, 19)
    assert quantile_calibration_error(shifted, total) > 0.1


def test_quantile_counts_equal_the_definition():
    mean, variance, target = mixture(5)
    integral = stats.norm.cdf(target.double().numpy(), mean.double().numpy(), variance.double().sqrt().numpy()).mean(0)
    expected = [(integral <= k / 10).sum() for k in range(1, 10)]
    counts = quantile_counts(mean, variance, target, 9)
    assert counts.tolist() == expected
    gap = np.abs(np.array(expected) / 60 - np.arange(1, 10) / 10)
    total = torch.tensor(60.0)
    assert quantile_calibration_error(counts, total).item() == pytest.approx(gap.mean())
    assert quantile_calibration_error(counts, total, "l2").item() == pytest.approx(np.sqrt((gap**2).mean()))
    assert quantile_calibration_error(counts, total, "max").item() == pytest.approx(gap.max())


def test_targets_far_out_are_counted():
    counts = quantile_counts(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[-1e6], [1e6]]), 3)
    assert counts.tolist() == [1, 1, 1]
    covered = interval_covered(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[-1e6], [1e6]]), 0.999)
    assert not covered.any()


@pytest.mark.parametrize(
    ("mean", "variance", "target", "message"),
    [
        (torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1), r"`mean` must be a floating-point tensor \[Z, B, D\]"),
        (
            torch.zeros(1, 2, 1),
            torch.ones(2, 2, 1),
            torch.zeros(2, 1),
            r"must have one shape \[Z, B, D\].* \[2, 2, 1\]",
        ),
        (torch.zeros(0, 2, 1), torch.ones(0, 2, 1), torch.zeros(2, 1), "with Z > 0"),
        (
            torch.zeros(1, 2, 1),
            torch.ones(1, 2, 1),
            torch.zeros(3),
            r"`target` must have shape \[2, 1\], but its shape is \[3\]",
        ),
        (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), "`variance` must be positive and finite"),
        (torch.full((1, 1, 1), torch.nan), torch.ones(1, 1, 1), torch.zeros(1, 1), "`mean` must be finite"),
        (torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1), torch.inf), "`target` must be finite"),
        (torch.zeros(1, 1, 1), torch.full((1, 1, 1), torch.nan), torch.zeros(1, 1), "`variance` must be positive"),
    ],
)
def test_bad_values(mean, variance, target, message):
    with pytest.raises(InputError, match=message):
        check_mixture(mean, variance, target)

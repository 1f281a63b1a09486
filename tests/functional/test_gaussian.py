"""The fitted discriminant, against definitions, the original's numbers and brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.networks.class_statistics import ClassStatistics
from tests.functional import ddu_original
from tests.functional.class_rows import KINDS, brute_scatter, covariance_of, rows, stream

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("ddu_gmm_*_D*.npz"))


def load(case):
    return {key: torch.as_tensor(value) for key, value in np.load(REFERENCE / f"{case}.npz").items()}


@pytest.mark.parametrize("case", CASES)
def test_means_and_covariances_are_the_originals(case):
    data = load(case)
    C = len(data["means"])
    statistics = stream(data["train_x"], data["train_y"], sizes=7, c=C)
    torch.testing.assert_close(statistics.mean, data["means"], rtol=1e-12, atol=1e-13)
    covariance = statistics.scatter / (statistics.count - 1)[:, None, None]
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), data["covs_diagonal"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(covariance.square().sum((1, 2)).sqrt(), data["covs_frobenius"], rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Class .* rows for .* features")
@pytest.mark.parametrize("case", CASES)
def test_the_ddu_schedule_finds_the_originals_jitter(case):
    data = load(case)
    fit = fit_gaussian(stream(data["train_x"], data["train_y"], c=len(data["means"])), regularization="ddu")
    expected = float(data["jitter_eps"])
    if expected == 0:
        assert fit.ridge == 0
    else:  # which jitter a singular matrix takes is rounding: two decades either way
        assert abs(math.log10(float(fit.ridge)) - math.log10(expected)) <= 2.2


@pytest.mark.filterwarnings("ignore:Class .* rows for .* features")
def test_the_ddu_schedule_agrees_with_a_loop_over_every_entry(monkeypatch):
    attempts = 0
    cholesky = torch.linalg.cholesky_ex

    def counted(matrix):
        nonlocal attempts
        attempts += 1
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    for seed in range(3):
        x, y = ddu_original.rows(40, 20, 4, seed)
        _, jitter, originals = ddu_original.original_schedule(x, y, 4)
        attempts = 0
        fit = fit_gaussian(stream(x, y, c=4), regularization="ddu")
        assert abs(math.log10(float(fit.ridge)) - math.log10(jitter)) <= 2
        assert attempts < 50 < 4 * originals  # 4 classes at each of some 295 entries


def test_a_rank_deficient_fit_is_25_times_as_fast_as_the_original():
    fitted = ddu_original.speedups()
    assert min(fitted.values()) > 25, fitted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_float_is_added_to_every_variance(kind, ridge):
    x, y = rows(7)
    fit = fit_gaussian(stream(x, y, kind), regularization=ridge)
    scatter, count = brute_scatter(x, y, kind), torch.bincount(y).double()
    expected = {
        "full": lambda: scatter / (count - 1)[:, None, None],
        "tied": lambda: scatter[None] / (len(x) - 3),
        "diagonal": lambda: torch.diag_embed(scatter / (count - 1)[:, None]),
    }[kind]() + ridge * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance_of(fit), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fit.log_det, torch.logdet(expected).expand(3), rtol=1e-10, atol=1e-12)
    spread = torch.cov(x.T) if kind != "diagonal" else torch.diag(x.var(0))
    background = fit._replace(whitening=fit.background_whitening)
    torch.testing.assert_close(
        covariance_of(background)[0], spread + ridge * torch.eye(4, dtype=x.dtype), rtol=1e-10, atol=1e-12
    )
    assert (fit.shrinkage, fit.ridge) == (0, ridge)


def test_oas_uses_one_intensity_and_one_target_for_all_classes():
    x, y = rows(8, n=30, d=5)
    fit = fit_gaussian(stream(x, y))
    D, target, intensities, covariances = 5, 0.0, [], []
    for c in range(3):
        part = x[y == c]
        S, nu = torch.cov(part.T), len(part) - 1
        squared, trace = (S**2).sum(), S.trace()
        top = (1 - 2 / D) * squared + trace**2
        bottom = (nu + 1 - 2 / D) * (squared - trace**2 / D)
        intensities.append(min(1.0, float(top / bottom)))
        target += float(nu * trace) / (30 - 3) / D
        covariances.append(S)
    r = sum(intensities) / 3
    assert 0 < r < 1
    assert len(set(intensities)) == 3  # so that an average is told from any one of them
    assert float(fit.shrinkage) == pytest.approx(r, rel=1e-10)
    expected = (1 - r) * torch.stack(covariances) + r * target * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(covariance_of(fit), expected, rtol=1e-9, atol=1e-10)
    assert float(fit.ridge) == pytest.approx(r * target, rel=1e-10)
    background = covariance_of(fit._replace(whitening=fit.background_whitening))[0]
    torch.testing.assert_close(background, torch.cov(x.T) + 1e-6 * target * torch.eye(D), rtol=1e-9, atol=1e-10)


def test_oas_of_a_tied_covariance_is_a_tiny_relative_ridge():
    x, y = rows(9)
    fit = fit_gaussian(stream(x, y, "tied"))
    within = brute_scatter(x, y, "tied") / (60 - 3)
    ridge = 1e-6 * within.trace() / 4
    torch.testing.assert_close(covariance_of(fit)[0], within + ridge * torch.eye(4), rtol=1e-9, atol=1e-10)
    assert (float(fit.shrinkage), float(fit.ridge)) == (0, pytest.approx(float(ridge)))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(["oas", 0.0]), st.floats(0.01, 100))
def test_a_fit_is_equivariant_to_shift_and_scale(seed, kind, regularization, scale):
    x, y = rows(seed)
    base = fit_gaussian(stream(x, y, kind), regularization=regularization)
    moved = fit_gaussian(stream(scale * x - 7, y, kind), regularization=regularization)
    torch.testing.assert_close(moved.whitening, base.whitening / scale, rtol=1e-5, atol=1e-8 / scale)
    torch.testing.assert_close(moved.shrinkage, base.shrinkage, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(moved.log_det, base.log_det + 2 * 4 * math.log(scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["tied", "diagonal"])
@pytest.mark.parametrize("regularization", ["oas", 0.1, "ddu"])
def test_full_statistics_give_the_smaller_models_too(kind, regularization):
    x, y = rows(10)
    small = fit_gaussian(stream(x, y, kind), regularization=regularization)
    large = fit_gaussian(stream(x, y), kind, regularization=regularization)
    for name, a, b in zip(small._fields, small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_priors():
    x, y = rows(11)
    assert torch.equal(fit_gaussian(stream(x, y)).log_prior.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    empirical = fit_gaussian(stream(x, y), priors="empirical").log_prior
    torch.testing.assert_close(empirical.exp(), torch.bincount(y).double() / 60)


def test_a_fit_leaves_the_statistics_as_they_are():
    x, y = rows(12)
    for kind in KINDS:
        for regularization in ("oas", "ddu", 0.5):
            statistics = stream(x, y, kind)
            before = [statistics.count.clone(), statistics.mean.clone(), statistics.scatter.clone()]
            fit = fit_gaussian(statistics, regularization=regularization)
            fit.mean.add_(1)
            for one, other in zip(before, (statistics.count, statistics.mean, statistics.scatter), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_two_rows_is_named(kind):
    x, y = rows(13)
    y = torch.where(y == 1, 0, y)
    with pytest.raises(InputError, match=r"Every class needs at least 2 rows, but class 1 has 0\."):
        fit_gaussian(stream(x, y, kind))
    y[4] = 1
    with pytest.raises(InputError, match=r"but class 1 has 1, class 3 has 0\."):
        fit_gaussian(stream(x, y, kind, c=4))
    with pytest.raises(InputError, match=r"class 4 has 0 \.\.\.\."):
        fit_gaussian(ClassStatistics(9, 2, kind))


def test_a_singular_covariance_is_named():
    x, y = rows(14)
    x[y == 2, 3] = 5.0
    with pytest.raises(
        InputError,
        match=r"regularization=0\.0 the covariance of class 2 is not positive definite: features are constant",
    ):
        fit_gaussian(stream(x, y), regularization=0.0)
    with pytest.raises(InputError, match=r"the covariance of class 2 is not"):
        fit_gaussian(stream(x, y, "diagonal"), regularization=0.0)
    constant = torch.ones(60, 4)
    with pytest.raises(InputError, match=r"regularization='oas' .*all features are constant"):
        fit_gaussian(stream(constant, y))
    with pytest.raises(InputError, match=r"the tied covariance is not positive definite: all features are constant"):
        fit_gaussian(stream(constant, y, "tied"))
    assert fit_gaussian(stream(constant, y), regularization=0.1).log_det.isfinite().all()
    assert fit_gaussian(stream(x, y)).log_det.isfinite().all()  # dead units are what shrinkage is for


def test_one_warning_where_the_rank_is_too_small():
    x, y = rows(15, n=15, d=6)
    with pytest.warns(
        UserWarning, match=r"rows for 6 features.* Use regularization=\"oas\" or covariance=\"tied\""
    ) as record:
        fit_gaussian(stream(x, y), regularization=1e-3)
    assert len(record) == 1
    with pytest.warns(UserWarning, match="rank-deficient"):
        fit_gaussian(stream(x, y), regularization="ddu")
    few, labels = rows(16, n=8, d=6)
    with pytest.warns(UserWarning, match=r"tied covariance of 6 features was estimated from 8 rows of 3 classes"):
        fit_gaussian(stream(few, labels, "tied"))
    for kind in ("diagonal", "full", "tied"):  # warnings are errors here: none of these gives one
        fit_gaussian(stream(x, y, kind))


def test_fit_refuses_unknown_settings():
    statistics = stream(*rows(17))
    with pytest.raises(InputError, match="`priors` must be one of 'uniform', 'empirical', but it is 'flat'"):
        fit_gaussian(statistics, priors="flat")
    with pytest.raises(InputError, match="`covariance` must be one of"):
        fit_gaussian(statistics, covariance="low-rank")
    for value in ("ledoit", -1.0, math.nan, math.inf, True, None):
        with pytest.raises(
            InputError, match="`regularization` must be 'held_out', 'oas', 'ddu' or a finite number of at least 0"
        ):
            fit_gaussian(statistics, regularization=value)
    with pytest.raises(
        InputError, match='`covariance` must be "tied", for which the statistics were streamed, but it is "full"'
    ):
        fit_gaussian(stream(*rows(17), "tied"), "full")

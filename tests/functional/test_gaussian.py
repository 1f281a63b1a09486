"""Streamed class statistics and the discriminant, against definitions, the original's numbers and brute force."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import gaussian as module
from lightning_uq.functional.gaussian import (
    DDU_JITTERS,
    ClassStatistics,
    fit_gaussian,
    oas_intensity,
    squared_distances,
)

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("ddu_gmm_*_D*.npz"))
KINDS = ["full", "tied", "diagonal"]


def load(case):
    return {key: torch.as_tensor(value) for key, value in np.load(REFERENCE / f"{case}.npz").items()}


def rows(seed, n=60, d=4, c=3, scale=1.0, offset=0.0, dtype=torch.float64):
    """Anisotropic features with at least two rows of every class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(c).repeat(2), torch.randint(c, (n - 2 * c,), generator=generator)])
    centers = 3 * torch.randn(c, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(c, d, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, d, generator=generator, dtype=torch.float64) @ mix[labels]
    return (scale * (centers[labels] + noise.squeeze(1)) + offset).to(dtype), labels


def stream(x, y, kind="full", sizes=None, c=3):
    statistics = ClassStatistics(c, x.shape[1], kind)
    for part, labels in zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True):
        statistics.update(part, labels)
    return statistics


def brute_scatter(x, y, kind, c=3):
    per_class = []
    for k in range(c):
        part = x[y == k].double()
        part = part - part.mean(0)
        per_class.append(part.T @ part)
    full = torch.stack(per_class)
    return {"full": full, "tied": full.sum(0), "diagonal": full.diagonal(dim1=1, dim2=2)}[kind]


# --- statistics


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 70), st.booleans())
def test_streaming_equals_the_definition_whatever_the_batches(seed, kind, size, tiny_blocks):
    x, y = rows(seed)
    statistics = ClassStatistics(3, 4, kind)
    if tiny_blocks:
        statistics._block = 7  # otherwise all these rows are one block
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        statistics.update(part, labels)
    assert statistics.count.tolist() == torch.bincount(y, minlength=3).tolist()
    torch.testing.assert_close(
        statistics.mean, torch.stack([x[y == c].mean(0) for c in range(3)]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(statistics.scatter, brute_scatter(x, y, kind), rtol=1e-11, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(0, 60), st.integers(0, 60))
def test_merging_in_any_order_and_reducing_over_ranks_give_one_rank(seed, kind, a, b):
    x, y = rows(seed)
    a, b = sorted((a, b))
    parts = [slice(0, a), slice(a, b), slice(b, 60)]  # some ranks may have no row at all
    one = stream(x, y, kind)

    def merged(order):
        total = ClassStatistics(3, 4, kind)
        for i in order:
            total.merge(stream(x[parts[i]], y[parts[i]], kind) if len(x[parts[i]]) else ClassStatistics(3, 4, kind))
        return total

    for other in (merged([0, 1, 2]), merged([2, 0, 1]), reduce_ranks([(x[p], y[p]) for p in parts], kind)[1]):
        for name in ("count", "mean", "scatter"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-11, atol=1e-10)


def reduce_ranks(parts, kind, d=4):
    """Every rank's statistics after `reduce`, run in lock step on threads as ranks would."""
    import threading

    ranks = []
    for x, y in parts:
        statistics = ClassStatistics(3, d, kind)
        if len(x):
            statistics.update(x, y)
        ranks.append(statistics)
    barrier, slots = threading.Barrier(len(ranks)), [None] * len(ranks)

    def run(rank):
        def all_sum(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = sum(slots[1:], slots[0])
            barrier.wait()
            return total

        ranks[rank].reduce(all_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_hold_the_same_bits_after_a_reduction(kind):
    x, y = rows(0)
    ranks = reduce_ranks([(x[:13], y[:13]), (x[13:], y[13:])], kind)
    for name in ("count", "mean", "scatter"):
        assert torch.equal(getattr(ranks[0], name), getattr(ranks[1], name))


@pytest.mark.parametrize("kind", KINDS)
def test_features_a_million_from_the_origin_keep_their_precision(kind):
    x, y = rows(1, n=3000)
    far = x + 1e6
    exact = far - 1e6  # what the addition rounded is not the statistics' fault
    statistics = stream(far, y, kind, 128)
    torch.testing.assert_close(statistics.scatter, brute_scatter(exact, y, kind), rtol=1e-9, atol=1e-6)
    halves = reduce_ranks([(far[:1001], y[:1001]), (far[1001:], y[1001:])], kind)[0]
    torch.testing.assert_close(halves.scatter, statistics.scatter, rtol=1e-10, atol=1e-7)
    # A sum of squares less a squared sum is off by far more.
    if kind == "diagonal":
        part = far[y == 0]
        naive = part.square().sum(0) - len(part) * part.mean(0).square()
        assert (naive - brute_scatter(exact, y, kind)[0]).abs().max() > 0.01


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0.01, 100), st.floats(-50, 50))
def test_scatter_follows_a_change_of_scale_and_ignores_a_shift(seed, kind, scale, shift):
    x, y = rows(seed)
    changed = stream(scale * x + shift, y, kind)
    base = stream(x, y, kind)
    torch.testing.assert_close(changed.scatter, scale**2 * base.scatter, rtol=1e-8, atol=1e-8 * scale**2)
    torch.testing.assert_close(changed.mean, scale * base.mean + shift, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicated_rows_double_the_scatter_and_relabelled_classes_permute_it(kind):
    x, y = rows(2)
    base = stream(x, y, kind)
    double = stream(torch.cat([x, x]), torch.cat([y, y]), kind)
    torch.testing.assert_close(double.mean, base.mean)
    torch.testing.assert_close(double.scatter, 2 * base.scatter)
    order = torch.tensor([2, 0, 1])
    permuted = stream(x, order[y], kind)
    expected = base.scatter if kind == "tied" else base.scatter[order.argsort()]
    torch.testing.assert_close(permuted.scatter, expected)
    torch.testing.assert_close(permuted.mean, base.mean[order.argsort()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_background_is_the_scatter_of_all_rows(kind):
    x, y = rows(3)
    center, spread = stream(x, y, kind).background()
    offset = x - x.mean(0)
    expected = offset.T @ offset
    torch.testing.assert_close(center, x.mean(0))
    torch.testing.assert_close(spread, expected.diagonal() if kind == "diagonal" else expected)


def test_memory_is_that_of_the_scatter_whatever_the_number_of_rows():
    def elements(statistics):
        held = [statistics._count, statistics._mean, statistics._scatter, *sum(statistics._pending, ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    shapes = {"full": (3, 4, 4), "tied": (4, 4), "diagonal": (3, 4)}
    for kind, shape in shapes.items():
        statistics = ClassStatistics(3, 4, kind)
        peaks = []
        for step in range(3000):
            x, y = rows(step % 5, n=10)
            statistics.update(x, y)
            peaks.append(elements(statistics))
        assert max(peaks[1500:]) <= max(peaks[:1500]) <= 8 * (3 + 12 + math.prod(shape)) + 1024 * (4 + 1) * 8 + 400
        assert statistics.scatter.shape == shape
        assert int(statistics.count.sum()) == 30000


def test_a_buffer_that_the_caller_reuses_is_copied():
    x, y = rows(4)
    buffer, labels = x.clone(), y.clone()
    statistics = ClassStatistics(3, 4)
    statistics.update(buffer, labels)
    buffer.zero_()
    labels.zero_()
    torch.testing.assert_close(statistics.scatter, brute_scatter(x, y, "full"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_comes(dtype):
    x, y = rows(5, dtype=dtype)
    statistics = stream(x.requires_grad_(), y)
    assert statistics.mean.dtype == statistics.scatter.dtype == torch.float64
    assert not statistics.mean.requires_grad
    torch.testing.assert_close(
        statistics.scatter, brute_scatter(x.detach().double(), y, "full"), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_autocast_leave_the_sums_as_they_are(kind):
    x, y = rows(5, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        statistics = ClassStatistics(3, 4, kind)
        statistics._block = 16
        statistics.update(x[:40], y[:40])
    statistics.update(x[40:], y[40:])
    expected = stream(x, y, kind)
    torch.testing.assert_close(statistics.scatter, expected.scatter, rtol=1e-11, atol=1e-11)
    assert fit_gaussian(statistics).log_det.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :3], y), r"floating-point tensor \[N, 4\], but got torch.float64 of shape \[60, 3\]"),
        (lambda x, y: (x.long(), y), r"floating-point tensor \[N, 4\], but got torch.int64"),
        (lambda x, y: (x, y[:5]), r"`labels` to be class indices of shape \[60\], but got torch.int64 of shape \[5\]"),
        (lambda x, y: (x, y.double()), r"`labels` to be class indices of shape \[60\], but got torch.float64"),
        (lambda x, y: (x, y + 1), r"`labels` to hold class indices in \[0, 3\), but got 3"),
        (lambda x, y: (x, y - 1), r"`labels` to hold class indices in \[0, 3\), but got -1"),
        (
            lambda x, y: (x.index_fill(0, torch.tensor([1]), math.nan), y),
            r"finite numbers, but got nan in a row of class 1",
        ),
        (lambda x, y: (x.index_fill(0, torch.tensor([2]), -math.inf), y), r"got -inf in a row of class 2"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing_behind(change, message):
    x, y = rows(6)
    statistics = ClassStatistics(3, 4)
    with pytest.raises(InputError, match=message):
        statistics.update(*change(x, y))
    assert statistics.count.sum() == 0


def test_the_memory_budget_is_checked_before_anything_is_allocated():
    with pytest.raises(
        InputError, match=r'1e\+06 classes of|1000000 classes of 100000 .*7.45e\+07 GiB.*covariance="tied"'
    ):
        ClassStatistics(10**6, 10**5)  # 80 PB
    with pytest.raises(InputError, match='covariance="diagonal"'):
        ClassStatistics(10, 10**6, "tied")
    with pytest.raises(InputError, match="fewer features"):
        ClassStatistics(10**6, 10**6, "diagonal")
    ClassStatistics(10, 64, memory_budget=8 * 10 * 64 * 64)
    with pytest.raises(InputError, match="memory_budget"):
        ClassStatistics(10, 64, memory_budget=8 * 10 * 64 * 64 - 1)


def test_constructor_and_merge_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="`covariance` to be one of 'full', 'tied', 'diagonal', but got 'low-rank'"):
        ClassStatistics(2, 2, "low-rank")
    with pytest.raises(InputError, match="`num_classes`"):
        ClassStatistics(0, 2)
    with pytest.raises(InputError, match="`num_features`"):
        ClassStatistics(2, 0)
    with pytest.raises(InputError, match=r"`other` to hold .*\('full', 2, 2\), but got \('full', 3, 2\)"):
        ClassStatistics(2, 2).merge(ClassStatistics(3, 2))
    with pytest.raises(InputError, match="but got \\('tied', 2, 2\\)"):
        ClassStatistics(2, 2).merge(ClassStatistics(2, 2, "tied"))


# --- fit


def covariance_of(fit):
    """Sigma_c [C or 1, D, D] recomputed from the whitening matrices."""
    if fit.whitening.ndim == 2:
        return torch.diag_embed(fit.whitening.reciprocal().square())
    factor = torch.linalg.inv(fit.whitening)
    return factor @ factor.mT


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


def test_the_ddu_schedule_is_the_originals_without_what_rounds_to_the_same():
    expected = np.load(REFERENCE / "ddu_gmm_jitters.npz")["float32"]
    assert np.array_equal(np.array(DDU_JITTERS), expected)


@pytest.fixture
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "gmm.py"
    spec = importlib.util.spec_from_file_location("gmm_benchmark", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.filterwarnings("ignore:Class .* rows for .* features")
def test_the_ddu_schedule_agrees_with_a_loop_over_every_entry(benchmark, monkeypatch):
    attempts = 0
    cholesky = torch.linalg.cholesky_ex

    def counted(matrix):
        nonlocal attempts
        attempts += 1
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    for seed in range(3):
        x, y = benchmark.rows(40, 20, 4, seed)
        _, jitter, originals = benchmark.original_schedule(x, y, 4)
        attempts = 0
        fit = fit_gaussian(stream(x, y, c=4), regularization="ddu")
        assert abs(math.log10(float(fit.ridge)) - math.log10(jitter)) <= 2
        assert attempts < 50 < 4 * originals  # 4 classes at each of some 295 entries


def test_a_rank_deficient_fit_is_25_times_as_fast_as_the_original(benchmark):
    fitted = benchmark.fit_speed(quick=True)
    assert min(fitted["ddu_speedup"], fitted["oas_speedup"]) > 25, fitted


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


def test_the_intensity_comes_close_to_the_oracles():
    # The oracle minimises the expected squared error over draws; the estimate from one draw should be near it.
    generator = torch.Generator().manual_seed(0)
    D, n = 20, 15
    sigma = torch.linspace(0.5, 4, D, dtype=torch.float64)
    draws = torch.randn(400, n, D, generator=generator, dtype=torch.float64) * sigma.sqrt()
    centered = draws - draws.mean(1, keepdim=True)
    S = centered.mT @ centered / (n - 1)
    eye = torch.eye(D, dtype=torch.float64)
    for estimate, truth, target in (
        (S, torch.diag(sigma), eye * (S.diagonal(dim1=1, dim2=2).mean(1))[:, None, None]),
        (variances := S.diagonal(dim1=1, dim2=2), sigma, variances.mean(1, keepdim=True).expand(-1, D)),
    ):
        gap = target - estimate
        oracle = float(((truth - estimate) * gap).sum() / gap.square().sum())
        mean = torch.stack([oas_intensity(one, n - 1) for one in estimate]).mean()
        assert float(mean) == pytest.approx(oracle, abs=0.1), estimate.ndim


def test_intensities_at_the_edges():
    assert oas_intensity(torch.eye(5), 10) == 1  # already a multiple of the identity
    assert oas_intensity(torch.zeros(5, 5), 10) == 1
    assert oas_intensity(torch.ones(5), 10) == 1
    assert oas_intensity(torch.ones(1, 1), 10) == 0
    assert oas_intensity(torch.ones(1), 10) == 0
    assert oas_intensity(torch.diag(torch.tensor([1.0, 1e6])), 10**6) < 1e-5


@settings(max_examples=20, deadline=None)
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
    with pytest.raises(InputError, match=r"at least 2 rows of every class, but class 1 has 0\."):
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
        InputError, match=r"regularization=0\.0 the covariance of class 2 is not: features are constant"
    ):
        fit_gaussian(stream(x, y), regularization=0.0)
    with pytest.raises(InputError, match=r"the covariance of class 2 is not"):
        fit_gaussian(stream(x, y, "diagonal"), regularization=0.0)
    constant = torch.ones(60, 4)
    with pytest.raises(InputError, match=r"regularization='oas' .*all features are constant"):
        fit_gaussian(stream(constant, y))
    with pytest.raises(InputError, match=r"the tied covariance is not: all features are constant"):
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
    with pytest.raises(InputError, match="`priors` to be one of 'uniform', 'empirical', but got 'flat'"):
        fit_gaussian(statistics, priors="flat")
    with pytest.raises(InputError, match="`covariance` to be one of"):
        fit_gaussian(statistics, covariance="low-rank")
    for value in ("ledoit", -1.0, math.nan, math.inf, True, None):
        with pytest.raises(InputError, match="`regularization` to be 'oas', 'ddu' or a finite number of at least 0"):
            fit_gaussian(statistics, regularization=value)
    with pytest.raises(
        InputError, match='`covariance` to be "tied", which the statistics were streamed for, but got "full"'
    ):
        fit_gaussian(stream(*rows(17), "tied"), "full")


def test_the_ddu_schedule_gives_up_with_advice():
    with pytest.raises(InputError, match=r"any jitter of regularization=\"ddu\", up to 0.1"):
        module._ddu_jitter(lambda c: torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), 2)


def test_the_ddu_schedule_rechecks_every_class_after_a_rise():
    # Class 0 factors at 0 and, as rounding can make it, not at 1e-3; class 1 needs 1e-3 or more.
    def covariance(c):
        return torch.tensor([[float(c)]], dtype=torch.float64)

    def factor(matrix):
        value = float(matrix)
        if value < 1:  # class 0: succeeds at 0, and above 5e-3
            return matrix if value == 0 or value > 5e-3 else None
        return matrix if value >= 1.0009 else None

    original = module._cholesky
    module._cholesky = factor
    try:
        assert module._ddu_jitter(covariance, 2) == pytest.approx(1e-2)
    finally:
        module._cholesky = original


# --- distances


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_distances_are_the_definition(seed, kind):
    x, y = rows(seed)
    fit = fit_gaussian(stream(x, y, kind), regularization=0.1)
    got = squared_distances(x, fit.mean, fit.whitening)
    precision = torch.linalg.inv(covariance_of(fit)).expand(3, 4, 4)
    offset = x[:, None] - fit.mean
    expected = torch.einsum("ncd,cde,nce->nc", offset, precision, offset)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_a_single_class_and_a_single_feature():
    x = torch.tensor([[0.0], [2.0], [4.0]])
    for kind in KINDS:
        for regularization in ("oas", 0.0):
            fit = fit_gaussian(stream(x, torch.zeros(3, dtype=torch.long), kind, c=1), regularization=regularization)
            distances = squared_distances(x.double(), fit.mean, fit.whitening).squeeze(1)
            torch.testing.assert_close(distances, torch.tensor([1.0, 0, 1], dtype=torch.float64), rtol=1e-5, atol=1e-9)

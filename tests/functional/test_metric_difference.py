import importlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy import stats

from benchmarks.seed_differences_metrics import metric_coverage
from lightning_uq.errors import InputError
from lightning_uq.functional import auroc
from lightning_uq.functional.metric_difference import metric_difference, resample_metric
from lightning_uq.functional.paired_difference import paired_difference, seed_difference
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.weighted_metrics import weighted_auroc, weighted_mean, weighted_rmse


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=draw(seed), dtype=torch.float64)


def mean(value, weights):
    """The same as weighted_mean, which needs no resamples, but another function."""
    return weighted_mean(value, weights)


def vectors(losses):
    return [{"value": one} for one in losses]


def width(interval):
    return interval.upper - interval.lower


def fixed(num_seeds, num_rows):
    return SeedRows([torch.arange(num_rows)] * num_seeds)


def resplit(num_seeds, num_rows):
    splits = [torch.randperm(2 * num_rows, generator=draw(seed))[:num_rows] for seed in range(num_seeds)]
    return SeedRows(splits, num_train=4 * num_rows)


@pytest.mark.parametrize("make", [fixed, resplit])
@pytest.mark.parametrize("num_seeds", [1, 3, 8])
def test_for_a_mean_it_is_the_interval_of_the_losses(make, num_seeds):
    rows = make(num_seeds, 150)
    row_effect = normal(rows.num_rows, seed=1)
    a, b = normal(2, num_seeds, 150)
    b = b + row_effect[torch.stack(rows.positions)] + 0.2 * normal(num_seeds, 1, seed=2)
    found = metric_difference(*(resample_metric(mean, vectors(x), rows, num_resamples=20_000) for x in (a, b)))
    expected = paired_difference(a, b, rows=rows)
    assert found.difference == pytest.approx(expected.difference)
    assert width(found) == pytest.approx(width(expected), rel=0.02)
    assert found.over == expected.over
    assert metric_difference(*(resample_metric(weighted_mean, vectors(x), rows) for x in (a, b))) == expected


def test_strata_keep_their_sizes():
    """The kinds' difference is large, and does not enter the variance of a stratified mean."""
    kinds = torch.arange(100) % 2 == 0
    value = 10.0 * kinds + normal(100)
    ids = torch.arange(100)
    found = {}
    for strata in (None, [kinds]):
        rows = SeedRows([ids], strata)
        one, zero = (resample_metric(mean, vectors([x]), rows) for x in (value, torch.zeros(100)))
        found[strata is None] = width(metric_difference(one, zero)) / 2
    assert found[True] == pytest.approx(1.98 * value.std().item() / 10, rel=0.1)
    within = torch.stack([value[kinds].var(), value[~kinds].var()]).mean().sqrt().item()
    assert found[False] == pytest.approx(2.01 * within / 10, rel=0.1)


def detection(num_seeds, common, seed, num_rows=60, spread=0.0):
    """Scores of two methods for test rows that are split anew, and for OOD rows, which are the same for all seeds or split anew."""
    kinds = torch.arange(2 * num_rows) >= num_rows
    outside = torch.arange(num_rows)
    ids = [
        torch.cat([torch.arange(num_rows) + 7 * s, outside if common else outside + 7 * s]) for s in range(num_seeds)
    ]
    rows = SeedRows(ids, [kinds] * num_seeds, num_train=240)
    effect, found = normal(rows.num_rows, seed=seed), []
    for method in range(2):
        own = normal(rows.num_rows, seed=seed + 1 + method)
        scores = [
            kinds + effect[at] + own[at] + spread * normal(2 * num_rows, seed=seed + 3 + 10 * s)
            for s, at in enumerate(rows.positions)
        ]
        found.append(
            resample_metric(weighted_auroc, [{"score": x, "is_ood": kinds} for x in scores], rows, num_resamples=500)
        )
    return found


def test_rows_that_all_seeds_share_widen_the_interval_of_splits():
    """Seeds with the same OOD rows say nothing of others, so a resample of these rows has to."""
    narrow, wide = detection(6, common=False, seed=5), detection(6, common=True, seed=5)
    assert all(one.resampled is None for one in narrow)
    assert all(one.resampled.shape == (500, 6) for one in wide)
    a, b = narrow
    expected = seed_difference(a.values, b.values, num_test=120, num_train=240)
    assert metric_difference(a, b).upper == pytest.approx(expected.upper)
    a, b = wide
    of_seeds = seed_difference(a.values, b.values, num_test=60, num_train=240)
    rows = (a.resampled - b.resampled).mean(1).var()
    rest = ((a.resampled - b.resampled).var(0).mean() - rows) / 5
    seeds = (a.values - b.values).var() * (1 / 6 + 60 / 240)
    interval = metric_difference(a, b)
    assert width(interval) > width(of_seeds)
    total = seeds + rows - rest
    df = total**2 / (seeds**2 / 5 + (rows - rest) ** 2 / 59)
    assert width(interval) / 2 == pytest.approx(stats.t.ppf(0.975, df.item()) * total.sqrt().item(), rel=1e-6)


def test_few_seeds_resample_all_rows():
    for common in (False, True):
        a, b = detection(3, common, seed=5)
        assert a.resampled.shape == (500, 3)
        assert metric_difference(a, b).rows_only


def test_values_are_the_plain_metric_and_resamples_are_those_of_repeated_rows():
    a, _ = detection(3, common=True, seed=3)
    kinds = torch.arange(120) >= 60
    found = []

    def spy(score, is_ood, weights):
        found.append((score, weights))
        return weighted_auroc(score, is_ood, weights)

    scores = normal(3, 120)
    result = resample_metric(spy, [{"score": x, "is_ood": kinds} for x in scores], a.rows, num_resamples=100)
    for seed in range(3):
        torch.testing.assert_close(result.values[seed], auroc(scores[seed], kinds))
        counts = found[3 + seed][1][7].long()
        expected = auroc(scores[seed].repeat_interleave(counts), kinds.repeat_interleave(counts))
        torch.testing.assert_close(result.resampled[7, seed], expected)
    # A row has the same weight in each seed that it appears in.
    for one, other in ((0, 1), (0, 2)):
        at, others = a.rows.positions[one], a.rows.positions[other]
        shared = [(i, others.tolist().index(row)) for i, row in enumerate(at.tolist()) if row in others.tolist()]
        for i, j in shared:
            assert torch.equal(found[3 + one][1][:, i], found[3 + other][1][:, j])


def test_the_seed_names_the_resamples():
    rows, losses = fixed(3, 40), normal(3, 40)
    call = partial(resample_metric, mean, vectors(losses), rows, num_resamples=100)
    assert torch.equal(call(seed=1).resampled, call(seed=1).resampled)
    assert not torch.equal(call(seed=1).resampled, call(seed=2).resampled)


def test_the_memory_is_bounded(monkeypatch):
    module = importlib.import_module("lightning_uq.functional.metric_difference")  # the function has the same name
    monkeypatch.setattr(module, "_ELEMENTS", 1000)
    sizes = []

    def metric(value, weights):
        sizes.append(len(weights))
        return mean(value, weights)

    resample_metric(metric, vectors(normal(1, 40)), fixed(1, 40), num_resamples=110)
    assert sizes == [1, 25, 25, 25, 25, 10]


def assert_covered(metric, num_seeds, is_split, repetitions):
    """Between 93 and 97 %, up to twice the standard error of the simulation."""
    flags, _ = metric_coverage(
        metric, "few and all inputs", repetitions, num_seeds, 100, resplit=is_split, resamples=200
    )
    coverage, error = float(flags.double().mean()), math.sqrt(0.05 * 0.95 / repetitions)
    assert coverage >= 0.93 - 2 * error
    if not is_split or num_seeds < 5:  # the corrected interval of many splits is too wide here
        assert coverage <= 0.97 + 2 * error


@pytest.mark.parametrize(("num_seeds", "is_split"), [(3, False), (3, True), (5, False), (5, True), (10, False)])
@pytest.mark.parametrize("metric", ["rmse", "ece", "auroc"])
def test_metrics_are_covered(metric, num_seeds, is_split):
    assert_covered(metric, num_seeds, is_split, repetitions=400 // num_seeds)


@pytest.mark.slow
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("metric", ["mse", "rmse", "ece", "auroc"])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_metrics_are_covered_closely(metric, num_seeds, is_split):
    assert_covered(metric, num_seeds, is_split, repetitions=1000)


def test_means_are_covered_at_few_splits():
    assert_covered("mse", 3, True, repetitions=400)


ROWS = fixed(5, 4)
ONES = torch.ones(5, 4, dtype=torch.float64)
GOOD = resample_metric(mean, vectors(ONES), ROWS, num_resamples=100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: resample_metric(lambda value, weights: weights, vectors(ONES), ROWS),
            "`metric` must return a value for each resample, [1], but it returned torch.float64 of shape [1, 4].",
        ),
        (
            lambda: resample_metric(lambda value, weights: 1.0, vectors(ONES), ROWS),
            "`metric` must return a value for each resample, [1], but it returned a float.",
        ),
        (
            lambda: resample_metric(mean, vectors(ONES / 0), ROWS),
            "`metric` must return finite numbers, but it returned NaN or infinity for the test rows.",
        ),
        (
            lambda: resample_metric(lambda value, weights: 1 / weights[:, 0], vectors(ONES), ROWS),
            "`metric` must return finite numbers, but it returned NaN or infinity for resampled test rows.",
        ),
        (
            lambda: resample_metric(mean, vectors(ONES[:3]), ROWS),
            "`vectors` must have an entry for each of the 5 seeds",
        ),
        (
            lambda: resample_metric(mean, vectors(ONES[:, :3]), ROWS),
            "`vectors[0]['value']` must have a number for each of the 4 rows, but it is torch.float64 of shape [3].",
        ),
        (lambda: resample_metric(mean, vectors(ONES.tolist()), ROWS), "`vectors[0]['value']` must be a tensor [N]"),
        (lambda: resample_metric(mean, vectors(ONES), ROWS, num_resamples=3), "`num_resamples` must be"),
        (lambda: metric_difference(GOOD, GOOD, level=95), "`level` must be a number in (0, 1)"),
        (lambda: metric_difference(GOOD, replace(GOOD, seed=1)), "`a` and `b` must have the same metric, rows"),
        (
            lambda: metric_difference(GOOD, replace(GOOD, rows=fixed(4, 4))),
            "`a` and `b` must have the same metric, rows",
        ),
        (
            lambda: metric_difference(GOOD, resample_metric(weighted_mean, vectors(ONES), ROWS)),
            "`a` and `b` must have the same metric, rows",
        ),
        (
            lambda: metric_difference(GOOD, replace(GOOD, resampled=GOOD.resampled[:50])),
            "`a` has 100 resamples and `b` 50.",
        ),
        (
            lambda: metric_difference(
                *[resample_metric(weighted_rmse, [{"squared_error": x} for x in ONES], SPLITS)] * 2
            ),
            "Pass `num_train`, the number of training rows of a split",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)


SPLITS = SeedRows([torch.arange(4) + s for s in range(5)])

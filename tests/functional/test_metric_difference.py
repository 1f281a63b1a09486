import importlib
import math
from functools import partial

import pytest
import torch

from benchmarks.seed_differences import auroc_coverage, weighted_auroc
from lightning_uq.errors import InputError
from lightning_uq.functional import auroc
from lightning_uq.functional.metric_difference import metric_difference
from lightning_uq.functional.paired_difference import paired_difference


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def mean(losses):
    return lambda weights: weights @ losses.T / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_for_a_mean_it_is_the_interval_of_the_losses(num_seeds):
    a, b = torch.randn(2, num_seeds, 150, generator=draw(), dtype=torch.float64)
    b = b + torch.randn(150, generator=draw(1)) + 0.2 * torch.randn(num_seeds, 1, generator=draw(2))
    found = metric_difference(mean(a), mean(b), 150, num_resamples=20_000, generator=draw())
    expected = paired_difference(a, b)
    assert found.difference == pytest.approx(expected.difference)
    assert found.upper - found.lower == pytest.approx(expected.upper - expected.lower, rel=0.02)
    assert found.over == expected.over


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_an_auroc_is_covered(num_seeds):
    flags = auroc_coverage(150, num_seeds, 200, draw(num_seeds), resamples=200)
    coverage = float(flags.double().mean())
    error = math.sqrt(coverage * (1 - coverage) / len(flags))
    assert 0.93 - 2 * error <= coverage <= 0.97 + 2 * error


def test_the_weighted_auroc_of_the_simulation_is_the_auroc_of_repeated_rows():
    score, label = torch.randn(2, 30, generator=draw(), dtype=torch.float64), torch.arange(30) % 3 == 0
    counts = torch.randint(1, 4, (30,), generator=draw())
    found = weighted_auroc(score[:1], label, counts[None].double())
    # Repeated rows of one kind are tied with each other, not with the other kind.
    expected = auroc(score[0].repeat_interleave(counts), label.repeat_interleave(counts))
    torch.testing.assert_close(found[0, 0], expected)


def test_equal_seeds_give_equal_intervals():
    losses = torch.rand(3, 40, generator=draw(), dtype=torch.float64)
    call = partial(metric_difference, mean(losses), mean(losses.square()), 40, num_resamples=100)
    assert call(generator=draw(1)) == call(generator=draw(1))
    assert call(generator=draw(1)) != call(generator=draw(2))


def test_the_memory_is_bounded(monkeypatch):
    module = importlib.import_module("lightning_uq.functional.metric_difference")  # the function has the same name
    monkeypatch.setattr(module, "_ELEMENTS", 1000)
    sizes = []

    def metric(weights):
        sizes.append(len(weights))
        return weights.square().mean(1, keepdim=True)

    metric_difference(metric, lambda weights: weights[:, :1], 40, num_resamples=110)
    assert sizes == [1, 25, 25, 25, 25, 10]


ONES = torch.ones(5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metric_difference(lambda w: w.sum(1), mean(ONES), 4),
            "`metric_a` must return a value per resample and seed, [R, S] with R = 1, but it returned torch.float64 of shape [1].",
        ),
        (
            lambda: metric_difference(mean(ONES), lambda w: 1.0, 4),
            "`metric_b` must return a value per resample and seed",
        ),
        (lambda: metric_difference(mean(ONES), mean(ONES / 0), 4), "`metric_b` must return finite numbers"),
        (
            lambda: metric_difference(mean(ONES[:1]), lambda w: 1 / w[:, :1], 4),
            "`metric_b` must return finite numbers, but it returned NaN or infinity for resampled test rows.",
        ),
        (lambda: metric_difference(mean(ONES), mean(ONES[:3]), 4), "`metric_a` returned 5 seeds and `metric_b` 3."),
        (lambda: metric_difference(mean(ONES), mean(ONES), 1), "`num_rows` must be an integer of at least 2"),
        (lambda: metric_difference(mean(ONES), mean(ONES), 4, num_resamples=3), "`num_resamples` must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)

"""Statistics in two halves: their sum is that of all rows, whatever the batches, the ranks and the memory."""

import pytest
import torch

from lightning_uq.networks.class_halves import ClassHalves
from lightning_uq.networks.class_statistics import ClassStatistics

C, D = 4, 3


def rows(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + 100
    return x, torch.arange(n) % C, torch.arange(n)


def streamed(x, y, numbers, size=17, **kwargs):
    found = ClassHalves(C, D, **kwargs)
    for part in torch.arange(len(x)).split(size):
        found.update(x[part], y[part], numbers[part])
    return found


def assert_all_rows(found, x, y, covariance="full"):
    whole = ClassStatistics(C, D, covariance)
    whole.update(x, y)
    for name in ("count", "mean", "scatter"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
@pytest.mark.parametrize("halved", [True, False])
def test_the_fit_is_of_all_rows(covariance, halved):
    x, y, numbers = rows()
    found = streamed(x, y, numbers, covariance=covariance, halved=halved)
    if halved and covariance != "tied":
        assert 0.3 < found.second.count.sum() / len(x) < 0.7
    found.fit(covariance, "uniform", "held_out" if halved else 0.1)
    assert_all_rows(found.first, x, y, covariance)


def test_a_half_is_a_matter_of_the_row_alone():
    x, y, numbers = rows()
    base = streamed(x, y, numbers)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for other in (streamed(x[order], y[order], numbers[order], 5), streamed(x, y, numbers, 200)):
        torch.testing.assert_close(other.second.scatter, base.second.scatter)
        torch.testing.assert_close(other.first.mean, base.first.mean)
    ranks = [streamed(x[i::2], y[i::2], numbers[i::2]) for i in (0, 1)]
    ranks[0].first.merge(ranks[1].first)
    ranks[0].second.merge(ranks[1].second)
    torch.testing.assert_close(ranks[0].second.scatter, base.second.scatter)
    torch.testing.assert_close(
        ranks[0].fit("full", "uniform", "held_out").whitening, base.fit("full", "uniform", "held_out").whitening
    )


def test_positions_of_one_sample_are_in_one_half():
    x, y, _ = rows()
    found = streamed(x, y, torch.arange(len(x)) // 20)
    assert float(found.second.count.sum()) % 20 == 0


def test_past_the_memory_budget_the_halves_are_of_some_classes():
    x, y, numbers = rows()
    size = 8 * D * D
    some = streamed(x, y, numbers, memory_budget=size * (C + 3))
    assert some.classes.tolist() == [0, 2, 3]
    fit = some.fit("full", "uniform", "held_out")
    assert_all_rows(some.first, x, y)
    assert float(fit.target) >= 0
    assert len(ClassHalves(C, D, memory_budget=size * C).classes) == 2  # few tell one number
    assert ClassHalves(10, 2048, "diagonal").first.num_features == 2048


def test_classes_of_too_few_rows_take_the_oracle():
    x, y, numbers = rows(8)
    fits = [streamed(x, y, numbers).fit("full", "uniform", name) for name in ("held_out", "oas")]
    if float(fits[0].shrinkage) == float(fits[1].shrinkage):
        torch.testing.assert_close(fits[0].whitening, fits[1].whitening)
    assert all(fit.whitening.isfinite().all() for fit in fits)

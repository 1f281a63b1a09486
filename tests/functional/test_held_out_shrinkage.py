"""The choice of a shrinkage, against the likelihood of the held-out rows themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from lightning_uq.functional.held_out_shrinkage import FLOOR, TARGETS, Shrinkage, held_out_shrinkage, shrinkage_target
from lightning_uq.networks.class_statistics import ClassStatistics


def halves(x, y, C, covariance="full"):
    found = ClassStatistics(C, x.shape[1], covariance), ClassStatistics(C, x.shape[1], covariance)
    for i in (0, 1):
        found[i].update(x[i::2], y[i::2])
    return found


def draw(C=3, n=20, D=6, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(C * n) // 2 % C
    scale = torch.arange(1, D + 1).double() ** -decay
    spread = 0.5 + torch.rand(C, D, generator=generator, dtype=torch.float64)  # classes differ
    x = torch.randn(C * n, D, generator=generator, dtype=torch.float64) * scale * spread[y]
    return x + 5 * torch.randn(C, D, generator=generator, dtype=torch.float64)[y], y


def held_out_mean(x, y, C, r, target):
    """The mean over classes and halves of the log-likelihood of a half's rows under the other's fit, row by row."""
    D, values = x.shape[1], []
    for fit, other in ((0, 1), (1, 0)):
        parts = [x[fit::2][y[fit::2] == c] for c in range(C)]
        freedom = sum(len(part) - 1 for part in parts)
        within = sum((p - p.mean(0)).T @ (p - p.mean(0)) for p in parts) / freedom
        floor = FLOOR * within.trace() / D * torch.eye(D, dtype=torch.float64)
        T = shrinkage_target(within, target)
        for c, part in enumerate(parts):
            normal = MultivariateNormal(part.mean(0), (1 - r) * torch.cov(part.T) + r * T + floor)
            rows = x[other::2][y[other::2] == c]
            # The floor also blurs the held-out rows: E log p(x + e) is log p(x) - tr(Sigma^-1 floor) / 2.
            blur = 0.5 * (torch.linalg.inv(normal.covariance_matrix) @ floor).trace()
            values.append(normal.log_prob(rows).mean() - blur)
    return torch.stack(values)


def full(r):
    return r / (2 - r)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_most_probable_on_a_grid_of_its_own(seed):
    x, y = draw(seed=seed, decay=0.5 * seed)
    found = held_out_shrinkage(*halves(x, y, 3))
    grid = [1 / (1 + math.exp(-logit / 4)) for logit in range(-40, 41)]
    best = {}
    for target in TARGETS:
        values = [held_out_mean(x, y, 3, r, target) for r in grid]
        i = max(range(len(grid)), key=lambda i: float(values[i].mean()))
        best[target] = values[i], grid[i]
    chosen = "identity"
    for target in TARGETS[1:]:
        gain = best[target][0] - best[chosen][0]
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            chosen = target
    assert found.target == chosen
    assert found.intensity == pytest.approx(full(best[chosen][1]), rel=0.3, abs=1e-4)  # a step of the grid
    mine = held_out_mean(x, y, 3, 2 * found.intensity / (1 + found.intensity), chosen).mean()
    assert mine >= best[chosen][0].mean() - 1e-9


def test_a_diagonal_model_is_the_same_of_independent_features():
    x, y = draw(decay=2.0)
    found = held_out_shrinkage(*halves(x, y, 3, "diagonal"))
    assert found.target in ("identity", "diagonal")
    for r in (0.5 * full(found.intensity), min(1.0, 3 * found.intensity)):
        values = []
        for fit, other in ((0, 1), (1, 0)):
            parts = [x[fit::2][y[fit::2] == c] for c in range(3)]
            within = sum((p - p.mean(0)).square().sum(0) for p in parts) / sum(len(p) - 1 for p in parts)
            T = shrinkage_target(within, found.target)
            for c, part in enumerate(parts):
                for q in (r, 2 * found.intensity / (1 + found.intensity)):
                    variance = (1 - q) * part.var(0) + q * T + FLOOR * within.mean()
                    rows = x[other::2][y[other::2] == c]
                    values.append(
                        torch.distributions.Normal(part.mean(0), variance.sqrt()).log_prob(rows).sum(1).mean()
                    )
        others, mine = torch.stack(values[0::2]).mean(), torch.stack(values[1::2]).mean()
        assert mine >= others - 1e-4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_neither_the_unit_nor_the_origin_matters(seed, power):
    x, y = draw(seed=seed)
    base, moved = held_out_shrinkage(*halves(x, y, 3)), held_out_shrinkage(*halves(10**power * x + 7, y, 3))
    assert moved.target == base.target
    assert moved.intensity == pytest.approx(base.intensity, rel=1e-3)


def test_equal_classes_take_one_covariance_and_many_rows_their_own():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(200) // 2 % 4
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64) @ mixing
    found = held_out_shrinkage(*halves(x, y, 4))
    assert found.target == "tied"
    assert found.intensity > 0.5
    x, y = draw(C=2, n=20_000, D=4)
    assert held_out_shrinkage(*halves(x, y, 2)).intensity < 0.01


def test_features_that_are_always_the_same_change_nothing():
    x, y = draw()
    dead = torch.cat([x, torch.full((len(x), 5), 3.0, dtype=torch.float64)], 1)
    base, found = (held_out_shrinkage(*halves(rows, y, 3)) for rows in (x, dead))
    assert found.target in (base.target, "diagonal")  # which keeps them apart from the others
    assert 0.1 * base.intensity < found.intensity < 10 * base.intensity
    assert held_out_shrinkage(*halves(torch.zeros_like(x), y, 3)) is None


def test_too_few_rows_give_none():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert held_out_shrinkage(*halves(x, torch.tensor([0, 1, 2, 3]), 4)) is None
    one = held_out_shrinkage(*halves(torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long), 1))
    assert isinstance(one, Shrinkage)
    assert 0 <= one.intensity <= 1


def test_a_spectrum_that_falls_fast_is_not_drowned():
    """What the error of the covariance hides and that of its inverse shows: noise as large as the least variance."""
    from lightning_uq.functional.ood import auroc
    from lightning_uq.networks.density import GaussianDensity

    D, C, n, generator = 64, 3, 400, torch.Generator().manual_seed(0)
    scale = torch.arange(1, D + 1).double() ** -1.5
    y = torch.arange(C * n) % C
    centers = 2 * torch.randn(C, D, generator=generator, dtype=torch.float64) * scale
    inside, train = (
        centers[y] + torch.randn(C * n, D, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    outside = inside + torch.randn(C * n, D, generator=generator, dtype=torch.float64) * scale[-1]
    which = torch.arange(2 * C * n) >= C * n

    def detected(**fit):
        return float(auroc(GaussianDensity.fit_features(train, y, **fit).score(torch.cat([inside, outside])), which))

    assert detected() > detected(covariance="tied") - 0.01
    assert detected() > detected(regularization="oas") + 0.1

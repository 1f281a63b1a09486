"""Intervals of one model's numbers lie in the range of the number, and hold as often as they say."""

import math

import pytest
import torch

from benchmarks.seed_differences_rows import nll, t_half_width
from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.value_intervals import mean_interval, value_intervals
from lightning_uq.compare.uncertainty_report.results import make_own_verdict
from lightning_uq.functional import weighted_auroc


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def record(rows, outside=None):
    num = len(next(iter(rows.values())))
    return Record("net", 0, {}, rows, torch.arange(num), {} if outside is None else {"ood_score": outside})


def losses(num, large):
    """Small positive losses of which one is large: the t interval of their mean reaches below 0."""
    found = 0.01 * torch.rand(num, generator=draw(), dtype=torch.float64)
    found[3] = large
    assert found.mean() < t_half_width(found[None], 0.95)
    return found


def test_numbers_that_are_never_negative_have_positive_intervals():
    rare = losses(35, 2.0)
    classes = value_intervals(record({"nll": rare, "brier": rare.clamp_max(2), "correct": rare < 1}))
    numbers = value_intervals(
        record({"squared_error": rare, "absolute_error": rare, "crps": rare, "interval_score_90": rare})
    )
    assert set(classes) == {"nll", "brier", "accuracy"}
    assert set(numbers) == {"rmse", "mae", "crps", "interval_score"}
    values = {**dict.fromkeys((*classes, *numbers), rare.mean()), "accuracy": 34 / 35, "rmse": rare.mean().sqrt()}
    for key, (lower, upper) in (classes | numbers).items():
        assert 0 < lower < values[key] < upper, key
    assert classes["nll"][0] * classes["nll"][1] == pytest.approx(rare.mean().item() ** 2)


def test_a_log_density_may_be_negative():
    rare = losses(35, 2.0)
    lower, upper = value_intervals(record({"nll": rare, "absolute_error": rare}))["nll"]
    assert lower < 0
    assert (lower + upper) / 2 == pytest.approx(rare.mean().item())


def test_missing_targets_keep_the_range():
    rare, counts = losses(35, 2.0), torch.ones(35)
    counts[0], rare[0] = 0, math.nan
    found = value_intervals(record({"absolute_error": rare, "num_targets": counts}))
    assert 0 < found["mae"][0] < rare.nanmean() < found["mae"][1]


def test_a_perfect_detector_of_few_rows_may_have_been_lucky():
    found = value_intervals(record({"ood_score": torch.arange(20.0)}, 100 + torch.arange(30.0)))
    lower, upper = found["ood_auroc"]
    assert upper == 1
    assert 0.8 < lower < 0.87  # Wilson's interval of 20 hits in 20


def test_the_interval_of_an_auroc_holds():
    """Of normal scores, 1.8 apart: the AUROC is 0.898."""
    truth, inside, clipped = torch.special.ndtr(torch.tensor(1.8 / math.sqrt(2))).item(), 0, 0
    for seed in range(100):
        scores = torch.randn(70, generator=draw(seed)) + 1.8 * (torch.arange(70) >= 35)
        lower, upper = value_intervals(record({"ood_score": scores[:35]}, scores[35:]))["ood_auroc"]
        inside += lower <= truth <= upper
        value = weighted_auroc(scores, torch.arange(70) >= 35, torch.ones(1, 70)).item()
        assert lower < value < upper <= 1
        clipped += upper == 1
    assert inside >= 90
    assert clipped == 0


@pytest.mark.parametrize(("mean", "low"), [(1, 0.94), (3, 0.915)])
def test_means_of_skewed_losses_are_covered_more_often_than_by_t(mean, low):
    loss = nll(mean, 2)
    expected = loss((torch.arange(10**5, dtype=torch.float64) + 0.5) / 10**5).mean()
    x = loss(torch.rand(1000, 36, generator=draw(), dtype=torch.float64))
    ends = torch.tensor([mean_interval(one, is_positive=True) for one in x], dtype=torch.float64)
    covered = ((ends[:, 0] <= expected) & (expected <= ends[:, 1])).double().mean()
    by_t = ((x.mean(1) - expected).abs() <= t_half_width(x, 0.95)).double().mean()
    assert covered >= max(low, by_t + 0.02)


def test_rows_that_are_all_right_do_not_prove_underconfidence():
    """Of 35 rows with a confidence of 95 %, all are right with a probability of 17 %."""
    confidence = 0.95 + 0.001 * torch.rand(35, generator=draw())
    one = record({"confidence": confidence, "correct": torch.ones(35, dtype=torch.bool)})
    verdict = make_own_verdict({"method": "net"}, one, {}, "max_softmax")
    assert any("is consistent with a calibrated module" in sentence for sentence in verdict)
    assert "rest on only 35 rows" in verdict[-1]

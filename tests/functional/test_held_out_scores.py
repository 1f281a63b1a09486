"""Thresholds of calibration scores, with groups, weights and missing targets."""

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional import conformal_quantile, group_quantiles, weighted_conformal_quantile
from lightning_uq.functional.held_out_scores import HeldOutScores, rows_needed

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(60, 3, 2, generator=GENERATOR, dtype=torch.float64)
GROUPS = torch.arange(60) % 4
WEIGHTS = torch.rand(60, generator=GENERATOR)


def test_each_column_has_the_quantile_of_its_known_scores():
    scores = SCORES.clone()
    scores[:30, 1, 0] = torch.nan
    found = HeldOutScores(scores).threshold(0.1)
    assert found.shape == (3, 2)
    assert found[1, 0] == conformal_quantile(SCORES[30:, 1, 0], 0.1)
    assert torch.equal(found[0], conformal_quantile(SCORES, 0.1)[0])


def test_new_rows_have_the_threshold_of_their_group():
    held_out = HeldOutScores(SCORES, groups=GROUPS)
    found = held_out.threshold(0.2, groups=torch.tensor([3, 0, 9, -1]))
    expected = group_quantiles(SCORES, GROUPS, 4, 0.2)
    assert torch.equal(found[:2], expected[[3, 0]])
    assert bool((found[2:] == torch.inf).all())  # no calibration row has these groups
    assert torch.equal(held_out.of_groups(0.2, 6)[4:], torch.full((2, 3, 2), torch.inf, dtype=torch.float64))


def test_small_integers_are_groups_too():
    groups = torch.arange(60) * 2  # up to 118, below int8's largest number, and the table is longer
    held_out = HeldOutScores(SCORES[:, 0, 0], groups=torch.cat([groups[:59], torch.tensor([300])]))
    assert held_out.threshold(0.9, groups=torch.tensor([-1], dtype=torch.int8)) == torch.inf


def test_new_rows_have_the_threshold_of_their_weight():
    new = torch.tensor([0.1, 2.0, torch.nan, torch.inf])
    found = HeldOutScores(SCORES, weights=WEIGHTS).threshold(0.2, weights=new)
    assert found.shape == (4, 3, 2)
    assert torch.equal(found[:2, 2, 1], weighted_conformal_quantile(SCORES[:, 2, 1], WEIGHTS, new[:2], 0.2))
    assert bool((found[2:] == torch.inf).all())  # an input with NaN has no density


def test_a_threshold_is_computed_once(monkeypatch):
    held_out, calls = HeldOutScores(SCORES, groups=GROUPS), []
    monkeypatch.setattr(
        "lightning_uq.functional.held_out_scores.group_quantiles",
        lambda *args: (calls.append(args), group_quantiles(*args))[1],
    )
    for _ in range(3):
        held_out.threshold(0.2, groups=GROUPS[:5])
    assert len(calls) == 6  # one for each column
    assert not torch.equal(held_out.of_groups(0.2), held_out.of_groups(0.3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"groups": GROUPS, "weights": WEIGHTS}, "`groups` and `weights` exclude each other"),
        ({"groups": GROUPS.float()}, "`groups` must be integers, but their dtype is torch.float32"),
        ({"groups": GROUPS - 1}, "`groups` must be numbered from 0"),
        ({"groups": GROUPS + 3_000_000_000}, "`groups` must be numbered from 0 and at most"),
        ({"groups": GROUPS[:5]}, "`groups` must have shape"),
        ({"weights": GROUPS}, "`weights` must be a floating-point tensor"),
        ({"weights": -WEIGHTS}, "`weights` must be finite and non-negative"),
        ({"weights": WEIGHTS / 0}, "`weights` must be finite and non-negative"),
        ({"weights": WEIGHTS[:5]}, "`weights` must have shape"),
    ],
)
def test_what_does_not_fit_together_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        HeldOutScores(SCORES, **kwargs)


def test_new_rows_must_have_what_the_calibration_rows_have():
    with pytest.raises(
        InputError, match="`groups` of the new rows were given, but the calibration rows have none. Leave out `groups`"
    ):
        HeldOutScores(SCORES).threshold(0.1, groups=GROUPS)
    with pytest.raises(
        InputError, match="`weights` of the new rows are missing, but the calibration rows have them. Pass `weights`"
    ):
        HeldOutScores(SCORES, weights=WEIGHTS).threshold(0.1)
    with pytest.raises(InputError, match="`groups` must be integers"):
        HeldOutScores(SCORES, groups=GROUPS).threshold(0.1, groups=GROUPS.float())


def test_the_rows_needed_are_the_fewest_with_a_finite_threshold():
    for alpha in (0.5, 0.1, 1 - 0.9, 0.03, 0.001):
        num = rows_needed(alpha)
        assert conformal_quantile(torch.zeros(num), alpha).isfinite()
        assert conformal_quantile(torch.zeros(num - 1), alpha).isinf()

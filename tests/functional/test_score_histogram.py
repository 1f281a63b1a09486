"""Histograms of scores against the exact numbers of the scores themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import auroc, average_precision, fpr_at_tpr
from lightning_uq.functional.score_histogram import (
    NUM_BINS,
    histogram_auroc,
    histogram_average_precision,
    histogram_fpr95,
    score_histogram,
)

# Numbers of a few bits, so that no two different ones share a bin.
grid = st.integers(-40, 40).map(lambda k: k / 8) | st.sampled_from([math.inf, -math.inf, -0.0, 1e-30, 2.0**100])
scores = st.lists(grid, min_size=1, max_size=30).map(torch.tensor)


@given(inside=scores, outside=scores)
@settings(max_examples=60)
def test_scores_that_share_no_bin_give_the_exact_numbers(inside, outside):
    both = torch.cat([inside, outside])
    is_ood = torch.arange(len(both)) >= len(inside)
    histograms = score_histogram(inside), score_histogram(outside)
    assert histograms[0].shape == (NUM_BINS,)
    assert histograms[0].sum() == len(inside)
    torch.testing.assert_close(histogram_auroc(*histograms), auroc(both, is_ood))
    for positive in ("out", "in"):
        found = histogram_fpr95(*histograms, positive)
        torch.testing.assert_close(found, fpr_at_tpr(both, is_ood, positive=positive))
        exact = average_precision(both, is_ood, positive)
        torch.testing.assert_close(histogram_average_precision(*histograms, positive), exact)


@given(scores=scores)
def test_bins_ascend_and_histograms_add_up(scores):
    bins = torch.stack([score_histogram(one).argmax() for one in scores])
    assert torch.equal(bins[scores.argsort()], bins.sort().values)
    parts = [score_histogram(part) for part in scores.split(3)]
    assert torch.equal(torch.stack(parts).sum(0), score_histogram(scores))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_real_scores_lose_less_than_a_thousandth(scale, shift):
    generator = torch.Generator().manual_seed(0)
    inside, outside = (scale * (shift + m + torch.randn(4000, generator=generator)) for m in (0.0, 1.0))
    both, is_ood = torch.cat([inside, outside]), torch.arange(8000) >= 4000
    histograms = score_histogram(inside), score_histogram(outside)
    assert float(histogram_auroc(*histograms)) == pytest.approx(float(auroc(both, is_ood)), abs=1e-3)
    assert float(histogram_fpr95(*histograms)) == pytest.approx(float(fpr_at_tpr(both, is_ood)), abs=5e-3)


def test_half_precision_and_empty_ones():
    assert score_histogram(torch.zeros(2, 3).bfloat16()).sum() == 6
    empty, one = score_histogram(torch.zeros(0)), score_histogram(torch.ones(1))
    assert empty.sum() == 0
    for value in (histogram_auroc(empty, one), histogram_fpr95(one, empty), histogram_average_precision(empty, empty)):
        assert math.isnan(value)
    with pytest.raises(InputError, match="`score` must hold numbers, but it holds NaN"):
        score_histogram(torch.tensor([math.nan]))

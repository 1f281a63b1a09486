"""Isotonic calibration: least squares under an order, by its definition and by its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.isotonic import apply_isotonic, fit_isotonic
from tests.counting import peak_bytes


def rows(seed, n, c):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return 3 * logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def min_max(scores, hits):
    """The isotonic regression by the min-max formula: at x, max over starts <= x of the min over ends >= x of the mean between."""
    points = scores.unique()
    means = [
        [hits[(scores >= low) & (scores <= high)].mean() if low <= high else math.nan for high in points]
        for low in points
    ]
    return points, torch.tensor([
        max(min(float(means[i][j]) for j in range(k, len(points))) for i in range(k + 1)) for k in range(len(points))
    ])  # fmt: skip


@pytest.mark.filterwarnings("ignore:No row is of class")
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.booleans())
def test_it_is_the_least_squares_fit_of_a_monotone_function(seed, n, ties):
    logits, target = rows(seed, n, 3)
    logits = logits.round() if ties else logits
    curves = fit_isotonic(logits, target)
    scores = logits.log_softmax(1).float()
    for c in range(3):
        points, expected = min_max(scores[:, c], (target == c).float())
        at = torch.searchsorted(curves[0, c].contiguous(), points.double()).clamp_max(curves.shape[2] - 1)
        left = (at - 1).clamp_min(0)
        width = (curves[0, c, at] - curves[0, c, left]).clamp_min(1e-300)
        share = ((points - curves[0, c, left]) / width).clamp(0, 1)
        found = curves[1, c, left] + share * (curves[1, c, at] - curves[1, c, left])
        torch.testing.assert_close(found, (n * expected.double() + 1 / 3) / (n + 1), rtol=1e-6, atol=1e-6)


def test_the_curves_keep_the_order_and_no_probability_is_zero():
    logits, target = rows(0, 800, 4)
    curves = fit_isotonic(logits, target)
    assert (curves.diff(dim=2) >= 0).all()
    extreme = 1e4 * torch.eye(4, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        out = apply_isotonic(torch.cat([logits, extreme]).to(dtype).log_softmax(1), curves.to(dtype))
        assert out.isfinite().all()
        torch.testing.assert_close(out.exp().sum(1), torch.ones_like(out[:, 0]))
    pair, labels = rows(1, 800, 2)  # of two classes, more probable before is no less probable after
    log_probs = pair.log_softmax(1)
    after = apply_isotonic(log_probs, fit_isotonic(pair, labels))[log_probs[:, 0].argsort(), 0]
    assert (after.diff() >= -1e-12).all()


def test_it_repairs_what_a_temperature_cannot():
    logits, target = rows(2, 20_000, 2)
    bent = torch.where(logits[:, :1] > logits[:, 1:], 4 * logits, logits)  # overconfident in class 0 alone
    test, labels = rows(3, 20_000, 2)
    bent_test = torch.where(test[:, :1] > test[:, 1:], 4 * test, test)
    out = apply_isotonic(bent_test.log_softmax(1), fit_isotonic(bent, target))
    best = torch.nn.functional.cross_entropy(test / 3, labels)
    assert torch.nn.functional.nll_loss(out, labels) < best + 0.003


def test_a_class_that_is_ruled_out_stays_so_and_nan_stays_nan():
    curves = fit_isotonic(*rows(4, 400, 3))
    row = torch.tensor([[0.5, 0.5, 0.0], [math.nan, 0.5, 0.5]], dtype=torch.float64).log()
    out = apply_isotonic(row, curves)
    assert out[0, 2] == -math.inf
    assert out[0, :2].isfinite().all()
    assert out[1].isnan().all()


def test_pixels_are_rows_and_rows_have_no_order():
    logits, target = rows(5, 240, 3)
    image = logits.reshape(10, 24, 3).movedim(-1, 1).reshape(10, 3, 4, 6)
    curves = fit_isotonic(logits, target)
    torch.testing.assert_close(fit_isotonic(image, target.reshape(10, 4, 6)), curves)
    order = torch.randperm(240)
    torch.testing.assert_close(fit_isotonic(logits[order], target[order]), curves)
    expected = apply_isotonic(logits.log_softmax(1), curves)
    torch.testing.assert_close(apply_isotonic(image.log_softmax(1), curves).movedim(1, -1).reshape(-1, 3), expected)


def test_classes_are_fitted_a_few_at_a_time(monkeypatch):
    logits, target = rows(6, 2000, 20)
    logits = logits.float()
    expected = fit_isotonic(logits, target)
    monkeypatch.setattr("lightning_uq.functional.isotonic._PART_ELEMENTS", 4000)
    found = []
    assert peak_bytes(lambda: found.append(fit_isotonic(logits, target))) < 8 * logits.nbytes
    assert torch.equal(found[0], expected)


@pytest.mark.filterwarnings("ignore:No row is of class")
def test_one_row_and_bad_arguments():
    curves = fit_isotonic(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert apply_isotonic(torch.tensor([[0.5, 0.5]]).log(), curves.float()).isfinite().all()
    with pytest.raises(InputError, match="at least one row"):
        fit_isotonic(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match=r"class indices in \[0, 2\)"):
        fit_isotonic(torch.zeros(3, 2), torch.full((3,), 2))

"""Weighted metrics against the plain ones: of the rows themselves, and of repeated rows."""

import importlib
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import auroc, average_precision, expected_calibration_error, fpr_at_tpr
from lightning_uq.functional.calibration import bin_statistics, calibration_error
from lightning_uq.functional.weighted_metrics import (
    weighted_auroc,
    weighted_average_precision,
    weighted_ece,
    weighted_fpr_at_tpr,
    weighted_mean,
    weighted_rmse,
)

PAIRS = {
    "mean": (weighted_mean, lambda value, label: value.double().mean()),
    "rmse": (weighted_rmse, lambda value, label: value.double().mean().sqrt()),
    "ece": (weighted_ece, lambda value, label: calibration_error(bin_statistics(value, label, 15))),
    "auroc": (weighted_auroc, auroc),
    "average precision": (weighted_average_precision, average_precision),
    "average precision, in": (
        lambda *args: weighted_average_precision(*args, positive="in"),
        lambda *args: average_precision(*args, positive="in"),
    ),
    "fpr": (weighted_fpr_at_tpr, fpr_at_tpr),
    "fpr, out": (
        lambda *args: weighted_fpr_at_tpr(*args, tpr=0.5, positive="out"),
        lambda *args: fpr_at_tpr(*args, 0.5, "out"),
    ),
}
OF_VALUES = {"mean", "rmse"}


def call(name, value, label, weights):
    return PAIRS[name][0](*((value,) if name in OF_VALUES else (value, label)), weights)


# Values on the edges of bins, ties, 0 and 1; and each row's label and how often it is repeated, perhaps never.
ROWS = st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([torch.float32, torch.float64, torch.float16]))
@pytest.mark.parametrize("name", PAIRS)
def test_weights_count_rows(name, rows, dtype):
    value, label, counts = (torch.tensor(column) for column in zip(*rows, strict=True))
    value = (value.double() / 30).to(dtype)
    weights = torch.stack([torch.ones(len(rows)), counts.float()])
    found = call(name, value, label, weights)
    repeated = value.repeat_interleave(counts), label.repeat_interleave(counts)
    expected = torch.stack([PAIRS[name][1](value, label), PAIRS[name][1](*repeated)])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    # The unit of the weights does not matter, even if it is no binary fraction.
    if "fpr" not in name:
        torch.testing.assert_close(
            call(name, value, label, weights * 0.3), expected, rtol=1e-6, atol=1e-9, equal_nan=True
        )


def test_the_calibration_error_is_that_of_rows_of_probabilities():
    probs = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    probs[:3] = torch.tensor([1.0, 0.0])
    target = torch.arange(200) % 2
    confidence, label = probs.max(1)
    found = weighted_ece(confidence, label == target, torch.ones(1, 200), num_bins=7)
    torch.testing.assert_close(found[0], expected_calibration_error(probs, target, num_bins=7))


@pytest.mark.parametrize("name", PAIRS)
def test_the_memory_is_bounded(name, monkeypatch):
    module = importlib.import_module("lightning_uq.functional.weighted_metrics")
    draw = torch.Generator().manual_seed(0)
    value, label, weights = (
        torch.rand(40, generator=draw),
        torch.arange(40) % 3 == 0,
        torch.rand(17, 40, generator=draw),
    )
    expected = call(name, value, label, weights)
    monkeypatch.setattr(module, "_ELEMENTS", 100)
    torch.testing.assert_close(call(name, value, label, weights), expected)


@pytest.mark.parametrize("name", PAIRS)
def test_many_rows_and_resamples_are_fast(name):
    draw = torch.Generator().manual_seed(0)
    value, label = torch.rand(10_000, generator=draw), torch.rand(10_000, generator=draw) < 0.3
    weights = torch.rand(200, 10_000, generator=draw, dtype=torch.float64)
    start = time.perf_counter()
    call(name, value, label, weights)
    assert time.perf_counter() - start < 2  # a tenth of the resamples; 0.1 s on a quiet core


X, ONES = torch.rand(4), torch.ones(2, 4)
LABEL = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighted_mean([1.0], ONES), "`value` must be a tensor [N], but it is a list."),
        (lambda: weighted_rmse(ONES, ONES), "`squared_error` must be a tensor of real numbers [N]"),
        (lambda: weighted_mean(X, ONES[0]), "`weights` must be a floating-point tensor [R, N]"),
        (lambda: weighted_mean(X, ONES[:, :3]), "`weights` must have shape [R, 4], a weight for each row"),
        (lambda: weighted_ece(2 + X, LABEL, ONES), "`confidence` must hold probabilities in [0, 1]"),
        (lambda: weighted_ece(X, LABEL[:3], ONES), "`correct` must have shape [4]"),
        (lambda: weighted_ece(X, LABEL, ONES, num_bins=0), "`num_bins` must be an integer of at least 1"),
        (lambda: weighted_auroc(X, LABEL[:3], ONES), "`is_ood` must have shape [4]"),
        (lambda: weighted_auroc(X / 0, LABEL - 5, ONES), "`is_ood` must hold only 0 and 1"),
        (lambda: weighted_average_precision(X, LABEL, ONES, "both"), "`positive` must be one of 'out', 'in'"),
        (lambda: weighted_fpr_at_tpr(X, LABEL, ONES, tpr=95), "`tpr` must be a number in (0, 1), but it is 95."),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value).startswith(message)

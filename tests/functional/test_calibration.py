"""Calibration errors against their definitions, reference numbers and the edges of their bins."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import expected_calibration_error, smooth_calibration_error
from lightning_uq.functional.calibration import (
    adaptive_bin_statistics,
    bin_statistics,
    calibration_error,
    uniform_bins,
)
from tests.counting import peak_bytes

REFERENCE = Path(__file__).parents[1] / "reference"


def bins_by_loop(confidence, num_bins):
    """The bin of each confidence, by comparing it with every edge in exact arithmetic of the dtype."""
    found = []
    for c in confidence.tolist():
        k = 1
        while k < num_bins and c > torch.tensor(k / num_bins, dtype=confidence.dtype).item():
            k += 1
        found.append(k - 1)
    return found


def ece_by_loop(confidence, correct, bins, num_bins, norm="l1", debiased=False):
    total, terms = len(bins), []
    for b in range(num_bins):
        rows = [i for i, found in enumerate(bins) if found == b]
        if not rows:
            continue
        accuracy = sum(float(correct[i]) for i in rows) / len(rows)
        gap = abs(sum(float(confidence[i]) for i in rows) / len(rows) - accuracy)
        if debiased:
            squared = gap**2 - accuracy * (1 - accuracy) / (len(rows) - 1) if len(rows) > 1 else 0.0
            terms.append((len(rows) / total, squared))
        else:
            terms.append((len(rows) / total, gap))
    if norm == "max":
        return max(gap for _, gap in terms)
    if norm == "l1":
        return sum(w * gap for w, gap in terms)
    if debiased:
        return math.sqrt(max(0.0, sum(w * squared for w, squared in terms)))
    return math.sqrt(sum(w * gap**2 for w, gap in terms))


def random_problem(seed, rows=300, classes=4, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    probs = (scale * torch.randn(rows, classes, generator=generator)).softmax(1)
    return probs, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("num_bins", [1, 2, 10, 15, 97])
def test_uniform_bins_equal_the_definition(norm, num_bins):
    probs, target = random_problem(num_bins)
    confidence, label = probs.max(1)
    expected = ece_by_loop(confidence, label == target, bins_by_loop(confidence, num_bins), num_bins, norm)
    assert expected_calibration_error(probs, target, num_bins, norm).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_bins", [3, 15])
def test_debiased_equals_the_definition(num_bins):
    probs, target = random_problem(7, rows=60)
    confidence, label = probs.max(1)
    bins = bins_by_loop(confidence, num_bins)
    expected = ece_by_loop(confidence, label == target, bins, num_bins, "l2", debiased=True)
    value = expected_calibration_error(probs, target, num_bins, "l2", debiased=True)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert 0 < value < expected_calibration_error(probs, target, num_bins, "l2")


def test_debiased_square_has_mean_zero_for_a_calibrated_model():
    """The unclamped sum behind the root is unbiased: over many samples its mean is within three standard errors of 0."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.tensor([0.6, 0.8]).repeat(20)
    squares, plug_in = [], []
    for _ in range(400):
        correct = torch.rand(40, generator=generator) < confidence
        count, hits, total = bin_statistics(confidence, correct, 5)
        accuracy, gap = hits / count, (hits - total) / count
        shown = count > 0
        squares.append(((count / 40) * (gap.square() - accuracy * (1 - accuracy) / (count - 1)))[shown].sum().item())
        plug_in.append(calibration_error(torch.stack([count, hits, total]), "l2").item() ** 2)
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares)) < 3 * error
    assert np.mean(plug_in) > 10 * error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [1, 3, 7, 10, 15, 30, 49])
def test_a_confidence_on_an_edge_is_in_the_bin_below(dtype, num_bins):
    edges = (torch.arange(num_bins + 1, dtype=torch.float64) / num_bins).to(dtype)
    above = torch.nextafter(edges[:-1], torch.ones_like(edges[:-1]))
    for k in range(num_bins):
        assert bin_statistics(edges[k + 1, None], torch.ones(1), num_bins)[0].argmax() == k
        assert bin_statistics(above[k, None], torch.ones(1), num_bins)[0].argmax() == k
    assert bin_statistics(edges[:1], torch.ones(1), num_bins)[0].argmax() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_that_is_none_is_in_an_end_bin(dtype):
    """As rounding leaves it above 1, or as it comes without checks."""
    values = [-2.0, -1e-7, 5e-324, 1 + 1e-6, 2.0]
    assert uniform_bins(torch.tensor(values, dtype=dtype), 15).tolist() == [0, 0, 0, 14, 14]
    for value in (math.nan, math.inf, -math.inf):  # any bin will do, since the sum of the confidences shows it
        statistics = bin_statistics(torch.tensor([value, 0.5], dtype=dtype), torch.ones(2), 15)
        assert not calibration_error(statistics).isfinite()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200))
def test_bins_of_float32_are_found_as_by_a_search(seed, num_bins):
    confidence = torch.rand(1000, generator=torch.Generator().manual_seed(seed))
    edges = (torch.arange(1, num_bins, dtype=torch.float64) / num_bins).float()
    assert torch.equal(uniform_bins(confidence, num_bins), torch.bucketize(confidence, edges))


@pytest.mark.parametrize("shape", [(), (4,), (100,)], ids=str)
def test_memory_of_the_sums_does_not_grow_with_the_rows(shape):
    def peak(numbers):
        confidence = torch.rand(numbers // math.prod(shape), *shape)
        correct = torch.rand_like(confidence) < 0.5
        return peak_bytes(lambda: bin_statistics(confidence, correct, 15))

    assert peak(100_000) < 3e6
    assert peak(400_000) < 1.1 * peak(100_000)


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_adaptive_sums_take_few_bytes_per_number(shape):
    confidence = torch.rand(200_000 // math.prod(shape), *shape)
    correct = torch.rand_like(confidence) < 0.5
    assert peak_bytes(lambda: adaptive_bin_statistics(confidence, correct, 15)) < 36 * confidence.numel()


@pytest.mark.parametrize("shape", [(), (3,)], ids=["top label", "classes"])
@pytest.mark.parametrize("rows", [32_768, 32_769, 100_000])
def test_sums_of_many_rows_are_those_of_numpy(rows, shape):
    confidence = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(1))
    correct = torch.rand_like(confidence) < 0.5
    found = bin_statistics(confidence, correct, 15).reshape(3, -1, 15)
    columns = zip(confidence.reshape(rows, -1).T.double().numpy(), correct.reshape(rows, -1).T.numpy(), strict=True)
    for k, (values, hits) in enumerate(columns):
        for row, weights in enumerate([None, hits.astype(float), values]):
            expected = np.histogram(values, bins=15, range=(0, 1), weights=weights)[0]
            np.testing.assert_allclose(found[row, k], expected, rtol=1e-12)


def test_bins_of_the_reference_edges():
    """Each k/15 in float32 is in bin k - 1, as in the original's counting form; 0 is in the first, where it raised."""
    data = np.load(REFERENCE / "ddu_ece.npz")
    confidence, expected = torch.tensor(data["bin_edges/conf"]), data["bin_edges/ceil_bin"].clip(min=0)
    found = [int(bin_statistics(c[None], torch.ones(1), 15)[0].argmax()) for c in confidence]
    assert found == expected.tolist()


# A float32 softmax misses the edges k / 15 by a few units in the last place, and the misses depend on the processor. A row
# falls into the bin below its edge or into the one above, so the stored counts are those of these misses, one per edge.
EDGE_MISSES = np.array([0, -2, 4, 1, 3, 1, 4, 0, -5, 1, -1, -8, -11, 0, 0])


def probabilities(case, logits):
    """The softmax in float64, rounded to float32: the same numbers on every processor."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probs = exponentials / exponentials.sum(1, keepdims=True)
    rows, top, edge = np.arange(len(probs)), probs.argmax(1), np.rint(15 * probs.max(1)).astype(int)
    probs = probs.astype(np.float32)
    if case == "edges_C15":
        exact = (edge / 15).astype(np.float32)
        probs[rows, top] = exact + EDGE_MISSES[edge - 1] * np.spacing(exact)
    return torch.from_numpy(probs)


@pytest.mark.parametrize(
    "case", ["N1_C10", "N7_C2", "N100_C10", "N1000_C10", "edges_C15", "saturated_C4", "ties_uniform_C10"]
)
@pytest.mark.parametrize("num_bins", [10, 15])
def test_reference_ece(case, num_bins):
    """The original's value; on edges its two functions differ (.24667, .25111) and the (lo, hi] one is the first."""
    data = np.load(REFERENCE / "ddu_ece.npz")
    probs, labels = probabilities(case, data[f"{case}/logits"]), torch.tensor(data[f"{case}/labels"])
    value = expected_calibration_error(probs, labels, num_bins).item()
    assert value == pytest.approx(float(data[f"{case}/ece{num_bins}"]), abs=1e-6)
    if num_bins == 15:
        statistics = bin_statistics(*_pairs(probs, labels), 15)
        assert statistics[0].tolist() == data[f"{case}/bin_count15"].tolist()


def _pairs(probs, target):
    confidence, label = probs.max(1)
    return confidence, label == target


@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_reference_enn(num_bins):
    data = np.load(REFERENCE / "enn_metrics_ece.npz")
    probs, labels = torch.tensor(data["logits"]).softmax(2).mean(0), torch.tensor(data["labels"]).long()[:, 0]
    assert expected_calibration_error(probs, labels, num_bins).item() == pytest.approx(
        float(data[f"ece_{num_bins}"]), abs=1e-6
    )
    count, correct, confidence = bin_statistics(*_pairs(probs, labels), num_bins)
    np.testing.assert_array_equal(count, data[f"ece_{num_bins}/counts"])
    np.testing.assert_array_equal(correct, data[f"ece_{num_bins}/correct_sums"])
    np.testing.assert_allclose(confidence, data[f"ece_{num_bins}/prob_sums"], rtol=1e-6)


def test_confidence_of_exactly_one_is_counted():
    """ENN's own metric drops such rows (its counts sum to 2 of 4); ours agrees with its single-batch form, which keeps them."""
    data = np.load(REFERENCE / "enn_metrics_ece.npz")
    probs, labels = torch.tensor(data["sat/logits"]).softmax(2).mean(0), torch.tensor(data["sat/labels"]).long()[:, 0]
    value = expected_calibration_error(probs, labels, 10).item()
    assert data["sat/counts"].sum() == 2
    assert value == pytest.approx(float(data["sat/single_ece_10"]), abs=1e-6)
    assert abs(value - float(data["sat/ece_10"])) > 0.03


def test_saturated_rows_share_the_last_bin_with_their_neighbours():
    """torchmetrics 1.9 gives a confidence of 1.0 a bin of its own, and 0.525 here."""
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05], [1.0, 0.0], [0.95, 0.05]])
    target = torch.tensor([1, 0, 0, 1])
    assert bin_statistics(*_pairs(probs, target), 10)[0].tolist() == [0.0] * 9 + [4.0]
    assert expected_calibration_error(probs, target, 10).item() == pytest.approx(0.475, abs=1e-7)


@pytest.mark.parametrize("binning", ["uniform", "adaptive"])
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_classwise_is_the_mean_over_classes(norm, binning):
    probs, target = random_problem(3)
    value = expected_calibration_error(probs, target, 10, norm, binning, classwise=True).item()
    statistics = bin_statistics if binning == "uniform" else adaptive_bin_statistics
    each = [calibration_error(statistics(probs[:, c], target == c, 10), norm).item() for c in range(4)]
    pooled = {"l1": np.mean(each), "l2": math.sqrt(np.mean(np.square(each))), "max": max(each)}
    assert value == pytest.approx(pooled[norm], abs=1e-12)


def test_adaptive_bins_have_equal_mass_and_the_definition():
    probs, target = random_problem(5, rows=103)
    confidence, label = probs.max(1)
    count, correct, total = adaptive_bin_statistics(confidence, label == target, 10)
    assert set(count.tolist()) == {10.0, 11.0}
    order = confidence.argsort()
    start = 0
    for size, hits, mass in zip(count.int().tolist(), correct.tolist(), total.tolist(), strict=True):
        rows = order[start : start + size]
        assert (label == target)[rows].sum().item() == hits
        assert confidence[rows].double().sum().item() == pytest.approx(mass)
        start += size


def test_adaptive_ties_share_a_bin_in_any_order():
    confidence = torch.tensor([0.5] * 7 + [0.9] * 3)
    correct = torch.tensor([1, 0, 1, 0, 1, 0, 0, 1, 1, 0])
    values = set()
    for seed in range(20):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        statistics = adaptive_bin_statistics(confidence[order], correct[order], 5)
        assert sorted(statistics[0].tolist()) == [0, 0, 0, 3, 7]
        values.add(round(calibration_error(statistics).item(), 12))
    assert len(values) == 1


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_adaptive_with_fewer_rows_than_bins(rows):
    confidence = torch.linspace(0.6, 0.9, rows)
    statistics = adaptive_bin_statistics(confidence, torch.ones(rows), 15)
    assert statistics[0].sum() == rows
    assert calibration_error(statistics).item() == pytest.approx((1 - confidence).mean().item(), abs=1e-7)


def test_no_rows_is_nan():
    for norm in ("l1", "l2", "max"):
        assert calibration_error(torch.zeros(3, 15), norm).isnan()
        empty = expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), norm=norm)
        assert empty.isnan()
    adaptive = expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), binning="adaptive")
    assert adaptive.isnan()
    assert smooth_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["uniform", "adaptive"]))
def test_order_of_rows_is_irrelevant(seed, rows, num_bins, binning):
    probs, target = random_problem(seed, rows)
    probs = (probs * 8).round() + 1  # many ties
    probs = probs / probs.sum(1, keepdim=True)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    for norm in ("l1", "l2", "max"):
        value = expected_calibration_error(probs, target, num_bins, norm, binning)
        again = expected_calibration_error(probs[order], target[order], num_bins, norm, binning)
        assert again.item() == pytest.approx(value.item(), abs=1e-12)
        assert 0 <= value <= 1
    assert value >= expected_calibration_error(probs, target, num_bins, "l2", binning) - 1e-12
    assert (
        expected_calibration_error(probs, target, num_bins, "l2", binning)
        >= expected_calibration_error(probs, target, num_bins, "l1", binning) - 1e-12
    )


def test_batches_add_up():
    probs, target = random_problem(1)
    pairs = _pairs(probs, target)
    parts = sum(bin_statistics(pairs[0][i : i + 7], pairs[1][i : i + 7], 15) for i in range(0, 300, 7))
    torch.testing.assert_close(parts, bin_statistics(*pairs, 15), rtol=1e-12, atol=1e-12)


def test_segmentation_is_flattened():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(2, 3, 4, 5, generator=generator).softmax(1)
    target = torch.randint(3, (2, 4, 5), generator=generator)
    rows = probs.permute(0, 2, 3, 1).reshape(-1, 3)
    for options in ({}, {"classwise": True}, {"binning": "adaptive"}):
        assert torch.equal(
            expected_calibration_error(probs, target, **options),
            expected_calibration_error(rows, target.reshape(-1), **options),
        )


# Smooth calibration error


def test_debiased_exists_for_l2_alone():
    probs, target = random_problem(0)
    for norm in ("l1", "max"):
        with pytest.raises(InputError, match=r"`debiased` must be False with norm='(l1|max)'"):
            expected_calibration_error(probs, target, norm=norm, debiased=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 0}, "`num_bins` must be an integer of at least 1, but it is 0"),
        ({"num_bins": True}, "`num_bins` must be an integer of at least 1, but it is True"),
        ({"num_bins": 2.0}, "`num_bins` must be an integer"),
        ({"norm": "l3"}, "`norm` must be one of 'l1', 'l2', 'max', but it is 'l3'"),
        ({"binning": "mass"}, "`binning` must be one of 'uniform', 'adaptive', but it is 'mass'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        expected_calibration_error(*random_problem(0), **options)


@pytest.mark.parametrize(
    ("probs", "target", "message"),
    [
        (
            torch.tensor([[0.5, 0.6]]),
            torch.tensor([0]),
            r"`probs` must sum to one .*, but a sum is 1.1.*from_logits=True",
        ),
        (
            torch.tensor([[2.0, -1.0]]),
            torch.tensor([0]),
            r"`probs` must hold probabilities in \[0, 1\].* but it holds -1",
        ),
        (torch.tensor([[0.5, float("nan")]]), torch.tensor([0]), "`probs` must hold probabilities, but it holds NaN"),
        (torch.tensor([[1, 0]]), torch.tensor([0]), r"`probs` must be a floating-point tensor \[B, C, ...\]"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0]), r"floating-point tensor .* it is torch.float32 of shape \[2\]"),
        ([[0.5, 0.5]], torch.tensor([0]), "`probs` must be a tensor .* but it is a list"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"class indices in \[0, 2\), but it holds 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), r"class indices in \[0, 2\), but it holds -1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "integer dtype, but its dtype is torch.float32"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([True]), "integer dtype, but its dtype is torch.bool"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([[0]]), r"`target` must have shape \[1\], but its shape is \[1, 1\]"),
        (torch.tensor([[0.5, 0.5]]), [0], "`target` must be a tensor of class indices, but it is a list"),
    ],
)
def test_bad_values(probs, target, message):
    with pytest.raises(InputError, match=message):
        expected_calibration_error(probs, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_softmax_of_any_dtype_is_accepted(dtype):
    probs = (4 * torch.randn(200, 100, generator=torch.Generator().manual_seed(0))).to(dtype).softmax(1)
    assert 0 < expected_calibration_error(probs, torch.zeros(200, dtype=torch.int32)) < 1
    # ... and so is one that was widened afterwards
    assert 0 < expected_calibration_error(probs.float(), torch.zeros(200, dtype=torch.uint8)) < 1

"""Streamed class statistics against definitions and brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import background_moments, fit_gaussian
from lightning_uq.networks.class_statistics import ClassStatistics
from tests.functional.class_rows import KINDS, brute_scatter, rows, stream


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 70), st.booleans())
def test_streaming_equals_the_definition_whatever_the_batches(seed, kind, size, tiny_blocks):
    x, y = rows(seed)
    statistics = ClassStatistics(3, 4, kind)
    if tiny_blocks:
        statistics._block = 7  # otherwise all these rows are one block
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        statistics.update(part, labels)
    assert statistics.count.tolist() == torch.bincount(y, minlength=3).tolist()
    torch.testing.assert_close(
        statistics.mean, torch.stack([x[y == c].mean(0) for c in range(3)]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(statistics.scatter, brute_scatter(x, y, kind), rtol=1e-11, atol=1e-10)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(0, 60), st.integers(0, 60))
def test_merging_in_any_order_and_reducing_over_ranks_give_one_rank(seed, kind, a, b):
    x, y = rows(seed)
    a, b = sorted((a, b))
    parts = [slice(0, a), slice(a, b), slice(b, 60)]  # some ranks may have no row at all
    one = stream(x, y, kind)

    def merged(order):
        total = ClassStatistics(3, 4, kind)
        for i in order:
            total.merge(stream(x[parts[i]], y[parts[i]], kind) if len(x[parts[i]]) else ClassStatistics(3, 4, kind))
        return total

    for other in (merged([0, 1, 2]), merged([2, 0, 1]), reduce_ranks([(x[p], y[p]) for p in parts], kind)[1]):
        for name in ("count", "mean", "scatter"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-11, atol=1e-10)


def reduce_ranks(parts, kind, d=4):
    """Every rank's statistics after `reduce`, run in lock step on threads as ranks would."""
    import threading

    ranks = []
    for x, y in parts:
        statistics = ClassStatistics(3, d, kind)
        if len(x):
            statistics.update(x, y)
        ranks.append(statistics)
    barrier, slots = threading.Barrier(len(ranks)), [None] * len(ranks)

    def run(rank):
        def all_sum(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = sum(slots[1:], slots[0])
            barrier.wait()
            return total

        ranks[rank].reduce(all_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_hold_the_same_bits_after_a_reduction(kind):
    x, y = rows(0)
    ranks = reduce_ranks([(x[:13], y[:13]), (x[13:], y[13:])], kind)
    for name in ("count", "mean", "scatter"):
        assert torch.equal(getattr(ranks[0], name), getattr(ranks[1], name))


@pytest.mark.parametrize("kind", KINDS)
def test_features_a_million_from_the_origin_keep_their_precision(kind):
    x, y = rows(1, n=3000)
    far = x + 1e6
    exact = far - 1e6  # what the addition rounded is not the statistics' fault
    statistics = stream(far, y, kind, 128)
    torch.testing.assert_close(statistics.scatter, brute_scatter(exact, y, kind), rtol=1e-9, atol=1e-6)
    halves = reduce_ranks([(far[:1001], y[:1001]), (far[1001:], y[1001:])], kind)[0]
    torch.testing.assert_close(halves.scatter, statistics.scatter, rtol=1e-10, atol=1e-7)
    # A sum of squares less a squared sum is off by far more.
    if kind == "diagonal":
        part = far[y == 0]
        naive = part.square().sum(0) - len(part) * part.mean(0).square()
        assert (naive - brute_scatter(exact, y, kind)[0]).abs().max() > 0.01


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0.01, 100), st.floats(-50, 50))
def test_scatter_follows_a_change_of_scale_and_ignores_a_shift(seed, kind, scale, shift):
    x, y = rows(seed)
    changed = stream(scale * x + shift, y, kind)
    base = stream(x, y, kind)
    torch.testing.assert_close(changed.scatter, scale**2 * base.scatter, rtol=1e-8, atol=1e-8 * scale**2)
    torch.testing.assert_close(changed.mean, scale * base.mean + shift, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicated_rows_double_the_scatter_and_relabelled_classes_permute_it(kind):
    x, y = rows(2)
    base = stream(x, y, kind)
    double = stream(torch.cat([x, x]), torch.cat([y, y]), kind)
    torch.testing.assert_close(double.mean, base.mean)
    torch.testing.assert_close(double.scatter, 2 * base.scatter)
    order = torch.tensor([2, 0, 1])
    permuted = stream(x, order[y], kind)
    expected = base.scatter if kind == "tied" else base.scatter[order.argsort()]
    torch.testing.assert_close(permuted.scatter, expected)
    torch.testing.assert_close(permuted.mean, base.mean[order.argsort()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_background_is_the_scatter_of_all_rows(kind):
    x, y = rows(3)
    center, spread = background_moments(stream(x, y, kind))
    offset = x - x.mean(0)
    expected = offset.T @ offset
    torch.testing.assert_close(center, x.mean(0))
    torch.testing.assert_close(spread, expected.diagonal() if kind == "diagonal" else expected)


def test_memory_is_that_of_the_scatter_whatever_the_number_of_rows():
    def elements(statistics):
        held = [statistics._count, statistics._mean, statistics._scatter, *sum(statistics._pending, ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    shapes = {"full": (3, 4, 4), "tied": (4, 4), "diagonal": (3, 4)}
    for kind, shape in shapes.items():
        statistics = ClassStatistics(3, 4, kind)
        peaks = []
        for step in range(3000):
            x, y = rows(step % 5, n=10)
            statistics.update(x, y)
            peaks.append(elements(statistics))
        assert max(peaks[1500:]) <= max(peaks[:1500]) <= 8 * (3 + 12 + math.prod(shape)) + 1024 * (4 + 1) * 8 + 400
        assert statistics.scatter.shape == shape
        assert int(statistics.count.sum()) == 30000


def test_a_buffer_that_the_caller_reuses_is_copied():
    x, y = rows(4)
    buffer, labels = x.clone(), y.clone()
    statistics = ClassStatistics(3, 4)
    statistics.update(buffer, labels)
    buffer.zero_()
    labels.zero_()
    torch.testing.assert_close(statistics.scatter, brute_scatter(x, y, "full"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_comes(dtype):
    x, y = rows(5, dtype=dtype)
    statistics = stream(x.requires_grad_(), y)
    assert statistics.mean.dtype == statistics.scatter.dtype == torch.float64
    assert not statistics.mean.requires_grad
    torch.testing.assert_close(
        statistics.scatter, brute_scatter(x.detach().double(), y, "full"), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_autocast_leave_the_sums_as_they_are(kind):
    x, y = rows(5, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        statistics = ClassStatistics(3, 4, kind)
        statistics._block = 16
        statistics.update(x[:40], y[:40])
    statistics.update(x[40:], y[40:])
    expected = stream(x, y, kind)
    torch.testing.assert_close(statistics.scatter, expected.scatter, rtol=1e-11, atol=1e-11)
    assert fit_gaussian(statistics).log_det.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :3], y), r"floating-point tensor \[N, 4\], but it is torch.float64 of shape \[60, 3\]"),
        (lambda x, y: (x.long(), y), r"floating-point tensor \[N, 4\], but it is torch.int64"),
        (
            lambda x, y: (x, y[:5]),
            r"`labels` must be class indices of shape \[60\], but it is torch.int64 of shape \[5\]",
        ),
        (
            lambda x, y: (x, y.double()),
            r"`labels` must be class indices of shape \[60\], but it is torch.float64",
        ),
        (lambda x, y: (x, y + 1), r"`labels` must hold class indices in \[0, 3\), but it holds 3"),
        (lambda x, y: (x, y - 1), r"`labels` must hold class indices in \[0, 3\), but it holds -1"),
        (
            lambda x, y: (x.index_fill(0, torch.tensor([1]), math.nan), y),
            r"must be finite, but it holds nan in a row of class 1",
        ),
        (lambda x, y: (x.index_fill(0, torch.tensor([2]), -math.inf), y), r"it holds -inf in a row of class 2"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing_behind(change, message):
    x, y = rows(6)
    statistics = ClassStatistics(3, 4)
    with pytest.raises(InputError, match=message):
        statistics.update(*change(x, y))
    assert statistics.count.sum() == 0


def test_finite_rows_whose_sum_overflows_are_accepted():
    x, y = rows(6, dtype=torch.float32)
    x = x.sign() * 3e38
    x[0], x[1] = 3e38, 3e38
    assert not x.sum().isfinite()
    statistics = ClassStatistics(3, 4)
    statistics.update(x, y)
    torch.testing.assert_close(statistics.scatter, brute_scatter(x.double(), y, "full"), rtol=1e-9, atol=0)


def test_the_memory_budget_is_checked_before_anything_is_allocated():
    with pytest.raises(
        InputError, match=r'1e\+06 classes of|1000000 classes of 100000 .*7.45e\+07 GiB.*covariance="tied"'
    ):
        ClassStatistics(10**6, 10**5)  # 80 PB
    with pytest.raises(InputError, match='covariance="diagonal"'):
        ClassStatistics(10, 10**6, "tied")
    with pytest.raises(InputError, match="fewer features"):
        ClassStatistics(10**6, 10**6, "diagonal")
    ClassStatistics(10, 64, memory_budget=8 * 10 * 64 * 64)
    with pytest.raises(InputError, match="memory_budget"):
        ClassStatistics(10, 64, memory_budget=8 * 10 * 64 * 64 - 1)


def test_constructor_and_merge_refuse_what_does_not_fit():
    with pytest.raises(
        InputError, match="`covariance` must be one of 'full', 'tied', 'diagonal', but it is 'low-rank'"
    ):
        ClassStatistics(2, 2, "low-rank")
    with pytest.raises(InputError, match="`num_classes`"):
        ClassStatistics(0, 2)
    with pytest.raises(InputError, match="`num_features`"):
        ClassStatistics(2, 0)
    with pytest.raises(InputError, match=r"`other` must hold .*\('full', 2, 2\), but it holds \('full', 3, 2\)"):
        ClassStatistics(2, 2).merge(ClassStatistics(3, 2))
    with pytest.raises(InputError, match="but it holds \\('tied', 2, 2\\)"):
        ClassStatistics(2, 2).merge(ClassStatistics(2, 2, "tied"))

import math
from functools import partial

import pytest
import torch
from scipy import stats

from benchmarks.seed_differences import (
    PAIRS,
    PARTS,
    draw_differences,
    draw_errors,
    draw_resplits,
    own_coverage,
    resplit_coverage,
)
from benchmarks.seed_differences_rows import DIFFERENCES, LEVELS, own_half_width
from lightning_uq.errors import InputError
from lightning_uq.functional.half_widths import crossed_half_width, resplit_half_width
from lightning_uq.functional.paired_difference import paired_difference, seed_difference
from lightning_uq.functional.seed_rows import SeedRows

REPETITIONS = 2000
CASES = {
    **{f"Gaussian, {name}": partial(draw_differences, parts, "Gaussian") for name, parts in PARTS.items()},
    "t3, 0 : 1 : 0.2": partial(draw_differences, PARTS["0 : 1 : 0.2"], "t3"),
    "t3, 5 : 1 : 9": partial(draw_differences, PARTS["5 : 1 : 9"], "t3"),
    "lognormal, 0 : 1 : 0.2": partial(draw_differences, PARTS["0 : 1 : 0.2"], "lognormal"),
    "lognormal, 2 : 1 : 1": partial(draw_differences, PARTS["2 : 1 : 1"], "lognormal"),
    "0/1 errors": draw_errors,
}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=draw(seed), dtype=torch.float64)


def assert_covered(flags, low=0.93, high=0.97):
    """The coverage lies within the bounds, by at most one standard error of its measurement outside of them."""
    coverage = float(flags.double().mean())
    error = math.sqrt(coverage * (1 - coverage) / len(flags))
    assert low - error <= coverage <= high + error, f"{coverage:.4f} +- {error:.4f}"


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_intervals_contain_the_difference_as_often_as_they_say(make, num_seeds):
    generator = draw(num_seeds)
    bound = 1.0 if make is draw_errors else None
    chunks = [own_coverage(*make(500, num_seeds, 200, generator), bound) for _ in range(REPETITIONS // 500)]
    assert_covered(torch.cat(chunks))


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("name", ["Gaussian, 5 : 1 : 9", "lognormal, 2 : 1 : 1"])
def test_with_many_rows_too(name, num_seeds):
    generator = draw(num_seeds)
    chunks = [own_coverage(*CASES[name](250, num_seeds, 1000, generator)) for _ in range(REPETITIONS // 250)]
    assert_covered(torch.cat(chunks))


@pytest.mark.parametrize("level", [0.8, 0.99])
def test_other_levels_are_kept(level):
    differences, _ = draw_differences(PARTS["2 : 1 : 1"], "Gaussian", REPETITIONS, 5, 100, draw())
    inside = differences.mean((1, 2)).abs() <= crossed_half_width(differences, level)
    assert_covered(inside, level - 0.015, level + 0.015 * (1 - level) / 0.2 + 0.002)


def test_rows_alone_miss_what_seeds_change():
    differences, means = draw_differences(PARTS["20 : 1 : 1"], "Gaussian", 500, 3, 200, draw())
    inside = differences.mean((1, 2)).abs() <= crossed_half_width(differences, 0.95)
    assert inside.double().mean() < 0.7  # of the difference over all seeds
    assert_covered(own_coverage(differences, means))


def test_the_variance_is_that_of_an_analysis_of_variance():
    S, N = 6, 40
    a, b = normal(S, N), normal(S, N, seed=1) + normal(1, N, seed=2) + 0.3 * normal(S, 1, seed=3)
    d = (a - b).numpy()
    rows, seeds, mean = d.mean(0), d.mean(1), d.mean()
    ms_seeds = N * ((seeds - mean) ** 2).sum() / (S - 1)
    ms_rows = S * ((rows - mean) ** 2).sum() / (N - 1)
    ms_rest = ((d - rows - seeds[:, None] + mean) ** 2).sum() / ((S - 1) * (N - 1))
    assert ms_rows > ms_rest
    total = ms_seeds + ms_rows - ms_rest
    df = total**2 / (ms_seeds**2 / (S - 1) + (ms_rows - ms_rest) ** 2 / (N - 1))
    z = stats.norm.ppf(0.95)
    skewness = ((rows - mean) ** 3).mean() / N**2 / (total / (S * N)) ** 1.5
    excess = skewness**2 * (z**4 + 2 * z**2 - 3) / 18
    wider = 1 + excess / (1 + excess)
    half_width = wider * stats.t.ppf(0.95, df) * math.sqrt(total / (S * N))
    interval = paired_difference(a, b, level=0.9)
    assert interval.difference == pytest.approx(mean)
    assert (interval.lower, interval.upper) == pytest.approx((mean - half_width, mean + half_width))


def test_few_seeds_give_the_t_interval_of_the_rows():
    x = normal(1, 50)
    symmetric = torch.cat([x, -x], 1)  # no skewness
    interval = paired_difference(symmetric + 2, torch.zeros_like(symmetric))
    expected = stats.t.interval(0.95, 99, loc=2, scale=symmetric.std().item() / 10)
    assert (interval.lower, interval.upper) == pytest.approx(expected)
    assert interval.rows_only
    assert not paired_difference(normal(5, 20), normal(5, 20, seed=1)).rows_only


def test_skewed_rows_give_the_width_of_the_symmetric_bootstrap_t():
    x = normal(400).exp()
    weights = torch.zeros(20_000, 400, dtype=torch.float64)
    drawn = torch.randint(400, weights.shape, generator=draw())
    weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / 400, dtype=torch.float64))
    means = weights @ (x - x.mean())
    errors = ((weights @ (x - x.mean()).square() - means.square()) / 399).sqrt()
    bootstrap = (means / errors).abs().quantile(0.95)
    found = crossed_half_width(x[None], 0.95) / (x.std() / 20)
    plain = stats.t.ppf(0.975, 399)
    assert (found - plain).item() == pytest.approx((bootstrap - plain).item(), rel=0.4)
    assert found > plain + 0.02


def test_a_swap_of_methods_changes_the_sign():
    a, b = normal(5, 30), normal(5, 30, seed=1)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.lower, one.upper) == pytest.approx((-other.upper, -other.lower))


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_the_unit_of_the_loss_does_not_matter(scale):
    a, b = normal(5, 30).exp(), normal(5, 30, seed=1).exp()
    assert paired_difference(a * scale, b * scale).upper == pytest.approx(
        paired_difference(a, b).upper * scale, rel=1e-9
    )


def test_skewness_is_measured_against_the_rows_where_seeds_agree_by_chance():
    losses = normal(5, 300).exp()
    losses += 1e-3 * normal(5, 1, seed=1) - losses.mean(1, keepdim=True)
    interval = paired_difference(losses, torch.zeros_like(losses))
    assert interval.upper - interval.lower < 0.01


@pytest.mark.parametrize("num_seeds", [1, 5])
def test_equal_losses_have_no_difference(num_seeds):
    losses = normal(num_seeds, 20)
    interval = paired_difference(losses, losses)
    assert (interval.lower, interval.upper) == (0, 0)


@pytest.mark.parametrize("num_seeds", [1, 3, 6])
def test_equal_errors_leave_room_for_rows_that_differ(num_seeds):
    errors = torch.arange(20).expand(num_seeds, 20) % 3 == 0  # bool
    interval = paired_difference(errors, errors)
    variance = (
        2 / num_seeds / 21 / 22
    )  # of the mean of 20 rows with a difference of 0, and two of 1 and -1 over the root of S
    expected = stats.t.ppf(0.975, 21) * math.sqrt(variance)
    assert (interval.lower, interval.upper) == pytest.approx((-expected, expected))
    resplit = paired_difference(
        errors[:3], errors[:3], rows=SeedRows([torch.arange(20) + s for s in range(num_seeds)][:3])
    )
    assert resplit.upper == pytest.approx(
        expected if num_seeds < 5 else stats.t.ppf(0.975, 21) * math.sqrt(2 / 3 / 21 / 22)
    )


def test_one_wrong_row_of_a_small_test_set_does_not_make_the_interval_absurd():
    wrong, right = torch.zeros(1, 36), torch.zeros(1, 36)
    wrong[0, 3] = 1
    for level, low, high in (
        (0.95, 0.08, 0.11),
        (1 - 0.05 / 13, 0.14, 0.17),
    ):  # exact intervals of score type: 0.12 and 0.19
        interval = paired_difference(wrong, right, level=level)
        assert low < interval.upper - interval.difference < high
        assert interval.lower < 0
    loss = normal(1, 36).abs() * 1e-3 + 3 * wrong
    for level in (0.95, 0.9999):
        half_width = crossed_half_width(loss[None], level).item()
        plain = stats.t.ppf((1 + level) / 2, 35) * loss.std().item() / 6
        assert 1.4 * plain < half_width < 2 * plain


def test_a_difference_of_errors_lies_between_minus_one_and_one():
    interval = paired_difference(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 0, 0]]), level=0.999)
    assert (interval.lower, interval.upper) == (-1, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("num_rows", [36, 100])
@pytest.mark.parametrize("name", [name for name in DIFFERENCES if name != "log-normal"])
def test_few_rows_are_covered_without_absurd_widths(name, num_rows, level):
    make, truth, bound = DIFFERENCES[name]
    x = make(REPETITIONS, num_rows, draw(num_rows))
    error, half_width = (x.mean(1) - truth).abs(), own_half_width(x, level, bound)
    coverage = (error <= half_width + 1e-12).double().mean()
    assert coverage >= level - 0.015
    assert half_width.mean() < 1.9 * error.quantile(level)


def test_with_the_same_rows_in_all_seeds_the_interval_of_splits_is_that_of_the_rows():
    errors = (normal(3, 30) > 1).double() - (normal(3, 30, seed=1) > 1.2).double()
    for bound in (None, 1.0):
        rows = SeedRows([torch.arange(30)] * 3)
        found = resplit_half_width(list(errors), rows, 0.95, bound)
        assert found.item() == pytest.approx(crossed_half_width(errors, 0.95, bound).item())


@pytest.mark.parametrize("num_seeds", [3, 10])
def test_splits_that_share_rows_are_corrected_for(num_seeds):
    differences = draw_resplits(PAIRS["zero and least squares"], REPETITIONS, num_seeds, 80, 20, draw(num_seeds))
    corrected, plain = resplit_coverage(differences, 80)
    assert_covered(corrected)
    assert plain.double().mean() < corrected.double().mean() - 0.02


def test_the_corrected_interval_is_that_of_nadeau_and_bengio():
    a, b = normal(6, 25), normal(6, 25, seed=1)
    d = (a - b).mean(1).numpy()
    expected = stats.t.interval(0.95, 5, loc=d.mean(), scale=math.sqrt((1 / 6 + 25 / 75) * d.var(ddof=1)))
    splits = [torch.arange(25) + 3 * seed for seed in range(6)]
    interval = paired_difference(a, b, rows=SeedRows(splits, num_train=75))
    assert (interval.lower, interval.upper) == pytest.approx(expected)
    assert interval.over == "rows and seeds"


@pytest.mark.parametrize("num_seeds", [3, 6])
def test_the_order_of_the_rows_does_not_matter(num_seeds):
    a, b = normal(num_seeds, 30).exp(), normal(num_seeds, 30, seed=1)
    orders = [torch.randperm(30, generator=draw(seed)) for seed in range(num_seeds)]
    shuffled = [[one[order] for one, order in zip(losses, orders, strict=True)] for losses in (a, b)]
    found, expected = paired_difference(*shuffled, rows=SeedRows(orders)), paired_difference(a, b)
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper))
    assert found.over == expected.over


def test_few_resplits_give_the_interval_of_clusters():
    """One row appears in two splits and its differences are correlated; the splits differ in size."""
    a, b = [normal(20), normal(25, seed=1), normal(22, seed=2)], [normal(20, seed=3), normal(25, seed=4), normal(22)]
    ids = [torch.arange(20), torch.arange(10, 35), torch.arange(30, 52)]
    found = paired_difference(a, b, rows=SeedRows(ids))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    effect = {}
    for d, one in zip(differences, ids, strict=True):
        for row, value in zip(one.tolist(), (d - d.mean()) / len(d) / 3, strict=True):
            effect[row] = effect.get(row, 0) + value.item()
    variance = 20 / 19 * sum(g**2 for g in effect.values())
    skewness = sum(g**3 for g in effect.values()) / variance**1.5
    z = stats.norm.ppf(0.975)
    excess = skewness**2 * (z**4 + 2 * z**2 - 3) / 18
    wider = 1 + excess / (1 + excess)
    half_width = wider * stats.t.ppf(0.975, 19) * math.sqrt(variance)
    assert found.difference == pytest.approx(sum(d.mean().item() for d in differences) / 3)
    assert found.upper - found.difference == pytest.approx(half_width)
    assert found.rows_only


def test_rows_that_two_seeds_share_are_one_row():
    """Twice the same split is one split; as if they were other rows, the interval would be shorter by the root of 2."""
    a, b = normal(1, 40).expand(2, 40), torch.zeros(2, 40)
    ids = torch.arange(40)
    shared = paired_difference(a, b, rows=SeedRows([ids, torch.cat([ids[:-1], torch.tensor([40])])]))
    apart = paired_difference(a, b, rows=SeedRows([ids, ids + 40]))
    one, two = shared.upper - shared.lower, apart.upper - apart.lower
    assert one / two == pytest.approx(math.sqrt(2), rel=0.05)


def test_values_per_seed_give_a_paired_t_interval():
    a, b = normal(4), normal(4, seed=1)
    expected = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval()
    interval = seed_difference(a, b)
    assert (interval.lower, interval.upper) == pytest.approx((expected.low, expected.high))
    assert interval.over == "seeds"


ONES = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([1.0], ONES), "`losses_a` must be a tensor [S, N], but it is a list."),
        (lambda: paired_difference(ONES, ONES[0]), "`losses_b` must be a tensor of real numbers [S, N]"),
        (lambda: paired_difference(ONES, ONES[:3]), "`losses_b` must have shape [5, 4], but its shape is [3, 4]."),
        (lambda: paired_difference(ONES[:, :1], ONES[:, :1]), "`losses_a` has 1 test row."),
        (lambda: paired_difference(ONES[:0], ONES[:0]), "`losses_a` must be a tensor of real numbers [S, N]"),
        (lambda: paired_difference(ONES, ONES, level=95), "`level` must be a number in (0, 1), but it is 95."),
        (lambda: paired_difference(ONES, ONES / 0), "`losses_b` must be finite, but 20 of 20 numbers"),
        (
            lambda: paired_difference(ONES, ONES, rows=SeedRows([torch.arange(4) + s for s in range(5)])),
            "Pass `num_train`, the number of training rows of a split",
        ),
        (
            lambda: paired_difference(ONES, ONES[:3], rows=SeedRows([torch.arange(4)] * 5)),
            "`losses_a` has 5 seeds, `losses_b` 3 and `rows` 5.",
        ),
        (
            lambda: paired_difference(ONES, ONES, rows=SeedRows([torch.arange(3)] * 5)),
            "`losses_a` must have shape [3], but its shape is [4]. `rows` has another number of rows for this seed.",
        ),
        (lambda: seed_difference(ONES, ONES), "`values_a` must be a tensor of real numbers [S]"),
        (lambda: seed_difference(ONES[0, :1], ONES[0, :1]), "`values_a` has 1 seed."),
        (
            lambda: seed_difference(ONES[0], ONES[0], num_test=3),
            "`num_test` and `num_train` describe re-splits together.",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)

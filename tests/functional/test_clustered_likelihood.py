import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    Projection,
    clustered_log_likelihood,
    joint_log_likelihood,
    log_sum_product,
    random_projection,
    true_class_log_probs,
)

INF = math.inf


def draw(members, draws, tau, classes=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, draws * tau, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (draws, tau), generator=generator)


def planes(tau, classes, num_planes=7, seed=0):
    return random_projection(tau, classes, num_planes, generator=torch.Generator().manual_seed(seed))


def exact(logits, target):
    return joint_log_likelihood(true_class_log_probs(logits.unflatten(1, target.shape), target))


def by_definition(logits, target, projection):
    """One draw, one hypothesis and one cell at a time."""
    result = []
    for s, labels in enumerate(target):
        tau = len(labels)
        rows = (
            logits[:, s * tau : (s + 1) * tau]
            .softmax(-1)
            .clamp(*torch.special.ndtr(torch.tensor([-5.0, 5.0]).double()))
        )
        points = Normal(0, 1).icdf(rows)
        cells: dict = {}
        for row, point in zip(rows, points, strict=True):
            sides = tuple(
                float((weight * point).sum() + offset) > 0
                for weight, offset in zip(projection.weight, projection.offset, strict=True)
            )
            cells.setdefault(sides, []).append(row[torch.arange(tau), labels])
        weights = torch.tensor([len(members) / len(logits) for members in cells.values()])
        centres = torch.stack([torch.stack(members).mean(0) for members in cells.values()])
        result.append(log_sum_product(weights, centres))
    return torch.stack(result)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    members=st.integers(1, 12),
    tau=st.integers(1, 5),
    num_planes=st.integers(1, 4),
    scale=st.floats(0.1, 20),
)
def test_clusters_are_their_definition(seed, members, tau, num_planes, scale):
    logits, target = draw(members, 3, tau, seed=seed, scale=scale)
    projection = planes(tau, 3, num_planes, seed)
    clustered = clustered_log_likelihood(logits, target, projection)
    torch.testing.assert_close(clustered, by_definition(logits, target, projection), rtol=1e-5, atol=1e-5)
    # In parts of any size, in any order of members, and with each twice, it is the same.
    order = torch.randperm(members)
    for parts in (logits.split(2), [logits[order]], [logits, logits], [logits[:0], logits]):
        torch.testing.assert_close(clustered_log_likelihood(iter(parts), target, projection), clustered)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), members=st.integers(1, 40), num_planes=st.integers(1, 7))
def test_one_label_is_exact_whatever_the_planes(seed, members, num_planes):
    logits, target = draw(members, 4, 1, seed=seed)
    clustered = clustered_log_likelihood(logits, target, planes(1, 3, num_planes, seed))
    torch.testing.assert_close(clustered, exact(logits, target))


def test_hypotheses_that_agree_in_their_cell_are_exact():
    # Twelve planes part three hypotheses, each drawn many times, as a finite index set is.
    logits, target = draw(3, 5, 30)
    repeated = logits[torch.tensor([0] * 5 + [1] * 3 + [2] * 9)]
    projection = planes(30, 3, 12)
    torch.testing.assert_close(clustered_log_likelihood(repeated, target, projection), exact(repeated, target))
    # A single hypothesis is exact with any.
    torch.testing.assert_close(
        clustered_log_likelihood(logits[:1], target, planes(30, 3, 1)), exact(logits[:1], target)
    )


def test_one_cell_is_the_product_of_marginals():
    logits, target = draw(6, 4, 10)
    far = Projection(torch.zeros(1, 10, 3), torch.ones(1))  # all stand on one side
    marginal = true_class_log_probs(logits.unflatten(1, target.shape), target).logsumexp(0) - math.log(6)
    torch.testing.assert_close(clustered_log_likelihood(logits, target, far), marginal.sum(1))


def test_draws_that_share_inputs_name_them():
    logits, _ = draw(20, 1, 4)
    position = torch.randint(4, (50, 12), generator=torch.Generator().manual_seed(1))
    target = torch.randint(3, (50, 12), generator=torch.Generator().manual_seed(2))
    projection = planes(12, 3)
    torch.testing.assert_close(
        clustered_log_likelihood(logits, target, projection, position),
        clustered_log_likelihood(logits[:, position.flatten()], target, projection),
    )


def log_beta_ratio(concentration, ones, count):
    a = torch.tensor(concentration, dtype=torch.float64)
    both = [torch.lgamma(a + ones), torch.lgamma(a + count - ones), -torch.lgamma(2 * a + count)]
    return sum(both) - 2 * torch.lgamma(a) + torch.lgamma(2 * a)


@pytest.mark.parametrize(("inputs", "clusters_win"), [(2, False), (100, True)])
def test_against_a_joint_probability_that_is_known(inputs, clusters_win):
    """Probabilities are Beta at each input, and 100 labels are drawn: the exact value is a ratio of Beta functions."""
    generator = torch.Generator().manual_seed(0)
    draws, tau = 100, 100

    def uniform(*shape):  # Beta(1, 1)
        return torch.rand(*shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)

    position = torch.randint(inputs, (draws, tau), generator=generator)
    target = (uniform(draws, tau) < uniform(draws, inputs).gather(1, position)).long()
    ones, count = (
        torch.zeros(draws, inputs, dtype=torch.float64).scatter_add_(1, position, value.double())
        for value in (target, torch.ones_like(target))
    )
    truth = log_beta_ratio(1.0, ones, count).sum(1)
    p = uniform(1000, inputs)
    logits = torch.stack([(1 - p).log(), p.log()], -1)
    plain = joint_log_likelihood(true_class_log_probs(logits[:, position], target))
    clustered = clustered_log_likelihood(logits, target, planes(tau, 2), position)
    plain_error, clustered_error = ((estimate - truth).mean().item() for estimate in (plain, clustered))
    if clusters_win:  # a thousand hypotheses are far too few for the plain mean
        assert plain_error < -4
        assert -4 < clustered_error < 0
    else:
        assert abs(plain_error) < 0.2
        assert -3 < clustered_error < -0.5


def test_no_probability_is_none_in_clusters():
    logits = torch.tensor([0.0, -INF]).expand(3, 8, 2)
    target = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]])
    right, wrong = clustered_log_likelihood(logits, target, planes(4, 2)).tolist()
    assert right == pytest.approx(0, abs=2e-6)
    assert wrong == pytest.approx(math.log(2.866515718791946e-07), rel=1e-4)


def test_nan_stays_nan_in_clusters():
    logits, target = draw(3, 2, 4)
    logits[1, 0, 0] = math.nan
    result = clustered_log_likelihood(logits, target, planes(4, 3))
    assert result.isnan().tolist() == [True, False]


def test_hyperplanes_follow_their_generator():
    first, again, other = (planes(10, 2, seed=seed) for seed in (0, 0, 1))
    assert first.weight.shape == (7, 10, 2)
    assert first.offset.shape == (7,)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert random_projection(1000, 5, 16).weight.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "`tau` must be an integer of at least 1, but it is 0"),
        ((10, 2, 17), "`num_planes` must be at most 16, but it is 17"),
        ((10, 2, 2.5), "`num_planes` must be an integer of at least 1, but it is 2.5"),
    ],
)
def test_hyperplanes_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        random_projection(*arguments)


def test_clusters_that_cannot_be():
    logits, target = draw(3, 2, 4)
    projection = planes(4, 3)
    for bad, message in (
        (logits[:, :7], r"`logits` must be \[Z, N, 3\] with N of at least 8, but its shape is \[3, 7, 3\]"),
        (logits[..., :2], r"`logits` must be \[Z, N, 3\]"),
        (logits[:0], "`logits` must hold at least one index z, but it holds none"),
        (logits[0], r"`logits` must be a floating-point tensor \[Z, N, C\]"),
    ):
        with pytest.raises(InputError, match=message):
            clustered_log_likelihood(bad, target, projection)
    with pytest.raises(InputError, match=r"`target` must have shape \[2, 4\], but its shape is \[2, 3\]"):
        clustered_log_likelihood(logits, target[:, :3], projection)
    with pytest.raises(InputError, match="`target` must hold at least one draw, but it holds none"):
        clustered_log_likelihood(logits, target[:0], projection)
    with pytest.raises(InputError, match=r"`position` must have shape \[2, 4\], but its shape is \[8\]"):
        clustered_log_likelihood(logits, target, projection, torch.arange(8))

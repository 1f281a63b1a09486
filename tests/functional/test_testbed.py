import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from lightning_uq.data.environments import polyadic_inputs
from lightning_uq.errors import InputError
from lightning_uq.functional import expected_calibration_error, joint_log_loss
from lightning_uq.functional.testbed import (
    Projection,
    categorical_kl,
    clustered_log_likelihood,
    gaussian_kl,
    gaussian_log_likelihood,
    gaussian_sample_kl,
    joint_log_likelihood,
    kl_estimate,
    log_sum_product,
    random_projection,
    true_label_log_probs,
    uniform_kl,
)

INF = math.inf


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "reference" / "enn_testbed_kl.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file.files}


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the original's numbers


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_divergence(reference, tau):
    logits = reference[f"tau{tau}/enn_logits"].movedim(1, 0)  # seed first there
    target = reference[f"tau{tau}/y_test"][..., 0]
    true = reference[f"tau{tau}/true_ll"]
    model = joint_log_likelihood(true_label_log_probs(logits, target))
    close(true - model, reference[f"tau{tau}/kl_per_seed"])
    estimate = kl_estimate(true, model)
    close(estimate.mean, reference[f"tau{tau}/kl_estimate"])
    close(estimate.std, reference[f"tau{tau}/kl_std"])
    assert (estimate.num_infinite, estimate.num_draws) == (0, 12)


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_environment(reference, tau):
    target = reference[f"tau{tau}/y_test"][..., 0]
    log_probs = true_label_log_probs(reference[f"tau{tau}/true_probs"].log().unsqueeze(0), target)
    close(log_probs.sum(2)[0], reference[f"tau{tau}/true_ll"])
    # Each of the indices is one of six linear members. (Those of its test accuracy, and its test ECE's, are not in the file.)
    members = torch.einsum("std,mdc->smtc", reference[f"tau{tau}/x_test"], reference["net_W"])
    members = members + reference["net_b"][:, None]
    distance = (reference[f"tau{tau}/enn_logits"].unsqueeze(2) - members.unsqueeze(1)).abs().amax((3, 4))
    assert distance.amin(2).max() < 1e-5


def test_the_originals_polyadic_draw(reference, monkeypatch):
    draws = {"randn": reference["polyadic_anchors"], "randint": reference["polyadic_idx"].long()}
    for name, draw in draws.items():
        monkeypatch.setattr(torch, name, lambda *size, generator=None, draw=draw: draw.unsqueeze(0))
    close(polyadic_inputs(1, 10, 2, kappa=2)[0], reference["polyadic_x"])


def test_the_originals_infinite_draw(reference):
    draws = reference["parse_kl/in"]
    estimate = kl_estimate(draws, torch.zeros(4))
    close(estimate.mean, reference["parse_kl/out"])
    assert estimate.num_infinite == 1


def test_the_originals_smaller_functions(reference):
    close(log_sum_product(reference["lsp/nu"], reference["lsp/q"]), reference["lsp/out"])
    close(categorical_kl(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.6, 0.3])), reference["discrete_kl"])
    error, covariance = reference["reg/err"][:, 0], reference["reg/cov"]
    close(gaussian_log_likelihood(error, covariance), reference["reg/gaussian_ll"][0])
    close(gaussian_log_likelihood(error, error.square().mean() * torch.eye(4)), reference["reg/optimized_ll"][0])
    close(gaussian_kl(*map(torch.tensor, (0.3, 0.5, -0.1, 0.9))), reference["reg/kl_gaussian"])


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_random_projection(reference, tau):
    # Its hyperplanes are those that its random key gives; three of them.
    planes = Projection(reference[f"tau{tau}/projection_weight"], reference[f"tau{tau}/projection_offset"])
    logits = reference[f"tau{tau}/enn_logits"].movedim(1, 0).flatten(1, 2)
    model = clustered_log_likelihood(logits, reference[f"tau{tau}/y_test"][..., 0], planes)
    estimate = kl_estimate(reference[f"tau{tau}/true_ll"], model)
    close(estimate.mean, reference[f"tau{tau}/cluster_randproj"])
    if tau == 10:  # which is not the plain estimate of the same draws
        assert abs(estimate.mean - reference["tau10/kl_estimate"]) > 0.02


def test_the_originals_accuracy_and_calibration(reference):
    probs, target = reference["train_logits"].softmax(-1).mean(0), reference["y_train"][:, 0].long()
    close((probs.argmax(1) == target).double().mean(), reference["train_acc"])
    close(expected_calibration_error(probs, target, num_bins=10), reference["train_ece"])


# ------------------------------------------------------------------ joint likelihood


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), members=st.integers(1, 7), tau=st.integers(1, 6), scale=st.floats(0.1, 30))
def test_joint_likelihood_is_its_definition(seed, members, tau, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, 4, tau, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (4, tau), generator=generator)
    log_probs = true_label_log_probs(logits, target)
    probs = logits.softmax(-1).gather(-1, target.expand(members, -1, -1).unsqueeze(-1)).squeeze(-1)
    expected = probs.prod(2).mean(0)
    torch.testing.assert_close(joint_log_likelihood(log_probs).exp(), expected)
    # In parts of any size, in any order of members, and with each twice, it is the same.
    order = torch.randperm(members, generator=generator)
    for parts in (log_probs.split(2), [log_probs[order]], [log_probs, log_probs], [log_probs[:0], log_probs]):
        torch.testing.assert_close(joint_log_likelihood(iter(parts)), joint_log_likelihood(log_probs))
    # It is the joint log-loss of the draws, one after the other.
    loss = joint_log_loss(logits.flatten(1, 2), target.flatten(), tau, sampling="consecutive")
    torch.testing.assert_close(-joint_log_likelihood(log_probs).mean(), loss)


def test_extreme_logits_neither_underflow_nor_hide():
    logits = torch.tensor([[[[1e5, 0.0]] * 10], [[[0.0, 1e5]] * 10]])  # tau = 10, one draw, two members
    right = joint_log_likelihood(true_label_log_probs(logits, torch.zeros(1, 10, dtype=torch.long)))
    assert right.item() == pytest.approx(math.log(0.5))
    mixed = joint_log_likelihood(true_label_log_probs(logits, torch.arange(10).remainder(2).unsqueeze(0)))
    assert mixed.item() == pytest.approx(-5e5)  # each member is wrong five times


def test_no_probability_at_all_is_infinite_not_nan():
    logits = torch.tensor([0.0, -INF]).expand(3, 2, 4, 2)
    log_probs = true_label_log_probs(logits, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]))
    assert joint_log_likelihood(log_probs.split(1)).tolist() == [pytest.approx(0), -INF]


def test_half_precision_is_read_in_float64():
    log_probs = true_label_log_probs(
        torch.zeros(2, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    )
    assert log_probs.dtype == torch.float64
    assert joint_log_likelihood(log_probs).item() == pytest.approx(-math.log(2))


def test_no_index_is_an_error():
    with pytest.raises(InputError, match="`log_probs` to hold at least one index z, but got none"):
        joint_log_likelihood(iter([]))
    with pytest.raises(InputError, match=r"`log_probs` to be a floating-point tensor \[Z, S, tau\]"):
        joint_log_likelihood(torch.zeros(3, 4))
    with pytest.raises(InputError, match="`target` to be of shape"):
        true_label_log_probs(torch.zeros(1, 3, 2), torch.zeros(4, dtype=torch.long))


# ------------------------------------------------------------------ random projection


def draw(members, draws, tau, classes=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, draws * tau, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (draws, tau), generator=generator)


def planes(tau, classes, num_planes=7, seed=0):
    return random_projection(tau, classes, num_planes, generator=torch.Generator().manual_seed(seed))


def exact(logits, target):
    return joint_log_likelihood(true_label_log_probs(logits.unflatten(1, target.shape), target))


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


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=15, deadline=None)
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
    marginal = true_label_log_probs(logits.unflatten(1, target.shape), target).logsumexp(0) - math.log(6)
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
    plain = joint_log_likelihood(true_label_log_probs(logits[:, position], target))
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
        ((0, 2), "`tau` to be an integer of at least 1, but got 0"),
        ((10, 2, 17), "`num_planes` to be at most 16, but got 17"),
        ((10, 2, 2.5), "`num_planes` to be an integer of at least 1, but got 2.5"),
    ],
)
def test_hyperplanes_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        random_projection(*arguments)


def test_clusters_that_cannot_be():
    logits, target = draw(3, 2, 4)
    projection = planes(4, 3)
    for bad, message in (
        (logits[:, :7], r"`logits` to be \[Z, N, 3\] with N of at least 8, but got shape \[3, 7, 3\]"),
        (logits[..., :2], r"`logits` to be \[Z, N, 3\]"),
        (logits[:0], "`logits` to hold at least one index z, but got none"),
        (logits[0], r"`logits` to be a floating-point tensor \[Z, N, C\]"),
    ):
        with pytest.raises(InputError, match=message):
            clustered_log_likelihood(bad, target, projection)
    with pytest.raises(InputError, match=r"`target` to be of shape \[2, 4\], but got \[2, 3\]"):
        clustered_log_likelihood(logits, target[:, :3], projection)
    with pytest.raises(InputError, match="`target` to hold at least one draw, but got none"):
        clustered_log_likelihood(logits, target[:0], projection)
    with pytest.raises(InputError, match=r"`position` to be of shape \[2, 4\], but got \[8\]"):
        clustered_log_likelihood(logits, target, projection, torch.arange(8))


# ------------------------------------------------------------------ the estimate


def test_infinite_draws_are_counted_and_clipped():
    estimate = kl_estimate(torch.zeros(4), torch.tensor([-1.0, -INF, -3.0, -INF]))
    assert (estimate.mean.item(), estimate.num_infinite) == (2.5, 2)
    assert not estimate.std.isfinite()


def test_all_infinite_is_infinite_and_nan_is_nan():
    assert kl_estimate(torch.zeros(2), torch.tensor([-INF, -INF])).mean == INF
    assert kl_estimate(torch.zeros(2), torch.tensor([math.nan, -1.0])).mean.isnan()
    assert kl_estimate(torch.tensor([math.nan, 0.0]), torch.tensor([-INF, -1.0])).mean.isnan()


def test_shapes_that_do_not_fit_are_errors():
    for shape in (3, 0):
        with pytest.raises(InputError, match="one number for each of the"):
            kl_estimate(torch.zeros(2 if shape else 0), torch.zeros(shape))
    with pytest.raises(InputError, match=r"`true_log_likelihood` to be a floating-point tensor \[S\]"):
        kl_estimate(torch.zeros(2, dtype=torch.long), torch.zeros(2))


@settings(max_examples=10, deadline=None)
@given(classes=st.integers(2, 9), tau=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_uniform_is_the_estimate_of_equal_probabilities(classes, tau, seed):
    true = -torch.rand(5, generator=torch.Generator().manual_seed(seed))
    target = torch.randint(classes, (5, tau))
    model = joint_log_likelihood(true_label_log_probs(torch.zeros(3, 5, tau, classes), target))
    torch.testing.assert_close(uniform_kl(true, classes, tau), kl_estimate(true, model).mean)


def test_the_environment_itself_has_no_divergence():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 1, 3, generator=generator).softmax(-1)
    target = torch.multinomial(probs[:, 0], 1, generator=generator)
    true = true_label_log_probs(probs.log().unsqueeze(0), target)
    assert kl_estimate(true[0, :, 0], joint_log_likelihood(true)).mean.abs() < 1e-9


# ------------------------------------------------------------------ categories and Gaussians


def test_a_term_without_weight_or_probability_adds_nothing():
    assert log_sum_product(torch.tensor([1.0, 0.0]), torch.tensor([[0.5], [0.0]])).item() == pytest.approx(
        math.log(0.5)
    )
    assert categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert categorical_kl(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])) == INF


def test_gaussian_density_is_torchs():
    root = torch.randn(5, 5, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(5)
    error = torch.randn(3, 5, dtype=torch.float64)
    expected = MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(error)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance), expected)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance.expand(3, 5, 5)), expected)


def test_gaussian_kl_is_torchs():
    mean, std, other_mean, other_std = torch.rand(4, 6, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(other_mean, other_std))
    torch.testing.assert_close(gaussian_kl(mean, std, other_mean, other_std), expected)


def test_regression_divergence_is_its_definition():
    samples, target = torch.randn(7, 5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    true = torch.randn(5, dtype=torch.float64)
    density = Normal(samples, 0.4).log_prob(target).sum(2).exp().mean(0)
    torch.testing.assert_close(gaussian_sample_kl(samples, target, 0.4, true).mean, (true - density.log()).mean())
    with pytest.raises(InputError, match="`noise_std` to be above 0, but got 0"):
        gaussian_sample_kl(samples, target, 0.0, true)
    with pytest.raises(InputError, match=r"`target` to be of shape \[5, 3\], but got \[3\]"):
        gaussian_sample_kl(samples, target[0], 0.4, true)

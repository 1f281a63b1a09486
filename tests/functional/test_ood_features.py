"""Feature scores by definition and brute force, and with the orientation that all scores share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import ood_features as module
from lightning_uq.functional.ood_features import fit_vim, gen, knn_distance, vim_score
from tests.no_float64 import device_without_float64


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- generalised entropy


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.05, 0.95), st.integers(1, 8))
def test_gen_is_its_definition(seed, z, gamma, top):
    logits = 3 * normal(seed, z, 6, 5)
    probs = logits.softmax(2).mean(0).sort(1, descending=True).values[:, :top]
    expected = (probs * (1 - probs)).pow(gamma).sum(1)
    torch.testing.assert_close(gen(logits, gamma, top), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gen(logits.flip(0), gamma, top), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gen(logits + 5, gamma, top), expected, rtol=1e-9, atol=1e-12)


def test_gen_is_higher_further_out_and_finite_when_saturated():
    logits = torch.tensor(
        [[[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [9.0, 0.0, 0.0], [1e4, 0.0, 0.0], [0.0, -math.inf, -math.inf]]]
    )
    score = gen(logits)
    assert (score[:4].diff() < 0).all()
    assert score[3:].tolist() == [0, 0]
    assert gen(logits.to(torch.bfloat16)).dtype == torch.float32
    assert gen(torch.zeros(2, 3, 4, 5, 6)).shape == (3, 5, 6)


# --- nearest neighbours


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 30), st.booleans())
def test_knn_is_its_definition(seed, k, normalize):
    features, bank = normal(seed, 7, 4), normal(seed + 1, 30, 4)
    rows, stored = features, bank
    if normalize:
        rows, stored = features / features.norm(dim=1, keepdim=True), bank / bank.norm(dim=1, keepdim=True)
    expected = (rows[:, None] - stored).norm(dim=2).sort(1).values[:, k - 1]
    torch.testing.assert_close(knn_distance(features, bank, k, normalize), expected)
    torch.testing.assert_close(knn_distance(features, bank.flip(0), k, normalize), expected)
    if normalize:
        torch.testing.assert_close(knn_distance(7 * features, bank, k), expected)


def test_a_row_of_the_bank_is_its_own_neighbour_to_the_last_bit():
    bank = normal(0, 500, 64, dtype=torch.float32)
    assert torch.equal(knn_distance(bank, bank, k=1), torch.zeros(500))


def kth_nearest(features, bank, k, normalize):
    """The definition in float64, difference by difference."""
    rows, stored = features.double(), bank.double()
    if normalize:
        rows, stored = (x / x.norm(dim=1, keepdim=True) for x in (rows, stored))
    return (rows[:, None] - stored).norm(dim=2).sort(1).values[:, k - 1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("centers", [[0.0], [1e3], [1e5], [-1e4, 3e4], [0.0, 1e2, 1e5]], ids=str)
def test_knn_far_from_the_origin_and_in_far_clusters(centers, k, normalize):
    offset = torch.tensor(centers)[torch.arange(300) % len(centers), None]
    bank, features = normal(3, 300, 32).float() + offset, normal(4, 20, 32).float() + offset[:20]
    expected = kth_nearest(features, bank, k, normalize)
    torch.testing.assert_close(knn_distance(features, bank, k, normalize).double(), expected, rtol=1e-6, atol=0.0)


def test_knn_of_float64_features_that_share_a_large_part():
    bank, features = normal(3, 300, 32) + 1e9, normal(4, 20, 32) + 1e9
    expected = kth_nearest(features, bank, 3, False)
    torch.testing.assert_close(knn_distance(features, bank, 3, False), expected)


def test_knn_on_a_device_without_float64_ranks_on_the_cpu(monkeypatch):
    bank, features = normal(3, 300, 32).float() + 1e3, normal(4, 20, 32).float() + 1e3
    expected = knn_distance(features, bank, 3)
    with device_without_float64(monkeypatch):
        found = knn_distance(features, bank, 3)
    assert torch.equal(found, expected)


def test_knn_has_a_gradient_and_raises_an_alarm_for_rows_that_are_not_finite():
    bank, features = normal(3, 30, 4), normal(4, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: knn_distance(x, bank, 2), features)
    bad = torch.tensor([[math.nan, 0.0, 0.0, 0.0], [math.inf, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for normalize in (True, False):
        assert knn_distance(bad, torch.cat([bank.float(), bad]), 2, normalize).isfinite().tolist() == [
            False,
            False,
            True,
        ]


def test_knn_chunks_change_nothing(monkeypatch):
    features, bank = normal(1, 40, 4), normal(2, 60, 4)
    expected = knn_distance(features, bank, 3)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 200)
    torch.testing.assert_close(knn_distance(features, bank, 3), expected)
    assert knn_distance(features[:0], bank, 3).shape == (0,)
    assert knn_distance(torch.zeros(1, 4), bank, 3).item() == pytest.approx(1)  # a zero vector has no direction
    assert knn_distance(features.half(), bank.half(), 3).dtype == torch.float32


# --- virtual-logit matching


def linear(seed, n=200, d=6, c=3):
    features = normal(seed, n, d) * torch.tensor([3.0, 2, 1.5, 0.3, 0.2, 0.1], dtype=torch.float64) + 1
    weight, bias = normal(seed + 1, c, d), normal(seed + 2, c)
    return features, features @ weight.T + bias, weight, bias


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_vim_is_its_definition(seed, dim):
    features, logits, weight, bias = linear(seed)
    fit = fit_vim(features, logits, weight, bias, dim)
    origin = -weight.T @ torch.linalg.solve(weight @ weight.T, bias)  # the least solution of W o + b = 0
    torch.testing.assert_close(fit.origin, origin, rtol=1e-7, atol=1e-8)
    centered = features - origin
    principal = torch.linalg.svd(centered, full_matrices=False).Vh[:dim]

    def residual(x):
        return (x - origin - (x - origin) @ principal.T @ principal).norm(dim=1)

    alpha = logits.amax(1).mean() / residual(features).mean()
    torch.testing.assert_close(fit.alpha, alpha, rtol=1e-6, atol=1e-8)
    points = normal(seed + 3, 9, 6)
    scores = points @ weight.T + bias
    expected = alpha * residual(points) - scores.exp().sum(1).log()
    torch.testing.assert_close(vim_score(points, scores, fit), expected, rtol=1e-6, atol=1e-6)


def test_vim_is_higher_outside_the_subspace():
    features, logits, weight, bias = linear(0)
    fit = fit_vim(features.float(), logits.float(), weight.float(), bias.float())
    assert fit.residual.shape == (6, 3)  # half by default
    assert fit.residual.dtype == torch.float64
    point = features[:1]
    away = point + 5 * fit.residual[:, 0]
    assert vim_score(away, logits[:1], fit) > vim_score(point, logits[:1], fit)
    assert torch.equal(fit_vim(features, logits, weight, None).origin, torch.zeros(6, dtype=torch.float64))


def test_bad_arguments_are_named():
    features, logits, weight, bias = linear(0)
    for call, message in (
        (lambda: gen(torch.zeros(2, 3)), r"`logits` must be a floating-point tensor \[Z, B, C, ...\]"),
        (lambda: gen(torch.zeros(1, 2, 3), gamma=1.0), r"`gamma` must be a number in \(0, 1\)"),
        (lambda: gen(torch.zeros(1, 2, 3), top=0), "`top` must be an integer of at least 1"),
        (
            lambda: knn_distance(features, features, k=201),
            "`k` must be an integer from 1 to the 200 rows of `bank`, but it is 201",
        ),
        (lambda: knn_distance(features, features, k=0), "but it is 0"),
        (
            lambda: knn_distance(features, features[:, :2]),
            r"`features` must have shape \[N, 2\], but its shape is \[200, 6\]",
        ),
        (
            lambda: fit_vim(features, logits[:3], weight, bias),
            r"`logits` must have shape \[200, 3\].*but its shape is \[3, 3\]",
        ),
        (lambda: fit_vim(features, logits, weight, bias, dim=6), "`dim` must be an integer from 1 to 5, but it is 6"),
        (lambda: fit_vim(features[:, :4], logits, weight, bias), r"`features` must have shape \[N, 6\]"),
        (
            lambda: vim_score(features[:, :2], logits, fit_vim(features, logits, weight, bias)),
            r"\[N, 6\], but its shape is \[200, 2\]",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
    flat = features.clone()
    flat[:, 3:] = 0
    with pytest.raises(InputError, match="must vary outside a principal subspace of `dim` = 3 dimensions"):
        fit_vim(flat, logits, weight, None, dim=3)

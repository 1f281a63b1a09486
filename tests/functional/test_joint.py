"""Joint log-loss against enumeration, ENN's numbers and its own invariances."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional import (
    consecutive_joint_log_loss,
    dyadic_joint_log_loss,
    joint_log_loss,
    sampled_joint_log_loss,
)
from lightning_uq.functional import joint as module
from lightning_uq.functional.hashing import mix
from lightning_uq.metrics import JointLogLoss
from lightning_uq.predictions import CategoricalPrediction

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "enn_metrics_joint.npz")
LOGITS = torch.tensor(REFERENCE["logits"])
LABELS = torch.tensor(REFERENCE["labels"]).long()[:, 0]


def random_log_probs(seed, members=5, rows=6):
    return -3 * torch.rand(members, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tau", [1, 2, 5, 10])
def test_reference_consecutive(tau):
    value = joint_log_loss(LOGITS, LABELS, tau, sampling="consecutive").item()
    assert value == pytest.approx(float(REFERENCE[f"joint_nll_tau{tau}"]), rel=1e-6)


def test_reference_all_rows_at_once():
    value = joint_log_loss(LOGITS, LABELS, len(LABELS), sampling="consecutive").item()
    assert value == pytest.approx(-float(REFERENCE["joint_ll_all"]), rel=1e-6)


@pytest.mark.parametrize(("tau", "kappa"), [(10, 2), (5, 3), (1, 2)])
def test_reference_sampled(tau, kappa):
    """The original with its stored draws, whole and block by block; not divided by tau."""
    name = f"tau{tau}_kappa{kappa}"
    selected = torch.tensor(REFERENCE[f"polyadic_selected_{name}"])
    value = joint_log_loss(LOGITS, LABELS, tau, kappa, "sampled", selected=selected).item()
    assert value == pytest.approx(float(REFERENCE[f"polyadic_nll_{name}"]), rel=1e-6)
    log_probs = module.joint_log_probs(LOGITS, LABELS)[:, : kappa * len(selected)]
    np.testing.assert_allclose(
        sampled_joint_log_loss(log_probs, selected), REFERENCE[f"polyadic_per_batch_nll_{name}"], rtol=1e-6
    )


def test_one_label_at_a_time_is_the_marginal():
    marginal = joint_log_loss(LOGITS, LABELS, 1, sampling="consecutive").item()
    assert marginal == pytest.approx(float(REFERENCE["marginal_nll"]), rel=1e-6)
    pairs = LABELS[:22]
    even = joint_log_loss(LOGITS[:, :22], pairs, 1, sampling="consecutive").item()
    assert joint_log_loss(LOGITS, LABELS, 1).item() == pytest.approx(even, rel=1e-12)


def test_reference_log_mean():
    values = torch.tensor(REFERENCE["logmeanexp_in"]).unsqueeze(1)
    assert module._log_mean(values).item() == pytest.approx(float(REFERENCE["logmeanexp_out"]), rel=1e-6)
    impossible = torch.full((3, 1), -math.inf)
    assert module._log_mean(impossible).item() == float(REFERENCE["logmeanexp_allneginf"])


def test_reference_accuracy():
    correct = CategoricalPrediction(LOGITS).label == LABELS
    assert correct.double().mean().item() == pytest.approx(float(REFERENCE["accuracy"]), rel=1e-6)


def test_reference_mean_over_batches():
    """The original averages batches of 10 and 13 rows alike; a metric here counts every row once."""
    metric, values = JointLogLoss(tau=1, sampling="consecutive"), []
    for rows in (slice(0, 10), slice(10, 23)):
        values.append(joint_log_loss(LOGITS[:, rows], LABELS[rows], 1, sampling="consecutive").item())
        metric.update(CategoricalPrediction(LOGITS[:, rows]), LABELS[rows])
    assert np.mean(values) == pytest.approx(float(REFERENCE["aggregator_value"]), rel=1e-6)
    assert float(metric.compute()) == pytest.approx(float(REFERENCE["marginal_nll"]), rel=1e-6)
    assert abs(float(metric.compute()) - float(REFERENCE["aggregator_value"])) > 1e-4


@pytest.mark.parametrize("tau", [1, 2, 3, 6])
def test_dyadic_is_the_mean_over_all_draws(tau):
    log_probs = random_log_probs(tau)
    draws = [torch.tensor(draw) for draw in itertools.product((0, 1), repeat=tau)]
    expected = torch.stack([sampled_joint_log_loss(log_probs, draw.expand(3, -1)) for draw in draws]).mean(0)
    torch.testing.assert_close(dyadic_joint_log_loss(log_probs, tau), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [1024, 1100, 3000])
def test_dyadic_takes_many_labels(tau):
    log_probs = torch.tensor([[-0.5, -2.0], [-1.0, -1.2]], dtype=torch.float64)
    k = np.arange(tau + 1)
    members = np.outer([-0.5, -1.0], k) + np.outer([-2.0, -1.2], tau - k)
    expected = -(stats.binom(tau, 0.5).pmf(k) * (np.logaddexp(*members) - np.log(2))).sum()
    assert dyadic_joint_log_loss(log_probs, tau).item() == pytest.approx(expected, rel=1e-11)


def test_sampled_is_dyadic_on_average():
    logits, labels = LOGITS[:, :2], LABELS[:2]
    exact = joint_log_loss(logits, labels).item()
    generator = torch.Generator().manual_seed(0)
    drawn = [joint_log_loss(logits, labels, sampling="sampled", generator=generator).item() for _ in range(500)]
    assert abs(np.mean(drawn) - exact) < 3 * np.std(drawn) / math.sqrt(len(drawn))
    again = [
        joint_log_loss(logits, labels, sampling="sampled", generator=torch.Generator().manual_seed(0)).item()
        for _ in range(2)
    ]
    assert again[0] == again[1] == drawn[0]


def test_one_member_cannot_gain_from_jointness():
    """Z = 1: the joint is the product of marginals, and the value tau times their mean."""
    log_probs = random_log_probs(0, members=1)
    expected = -10 * log_probs[0].reshape(-1, 2).mean(1)
    torch.testing.assert_close(dyadic_joint_log_loss(log_probs, 10), expected)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 7))
def test_invariances(seed, tau, members):
    log_probs = random_log_probs(seed, members)
    value = dyadic_joint_log_loss(log_probs, tau)
    order = torch.randperm(members, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dyadic_joint_log_loss(log_probs[order], tau), value)
    torch.testing.assert_close(dyadic_joint_log_loss(log_probs.repeat(3, 1), tau), value)
    swapped = log_probs.reshape(members, -1, 2).flip(2).reshape(members, -1)
    torch.testing.assert_close(dyadic_joint_log_loss(swapped, tau), value)
    # Jensen: pooling members never does worse than their mean loss.
    alone = torch.stack([dyadic_joint_log_loss(log_probs[z : z + 1], tau) for z in range(members)]).mean(0)
    assert (value <= alone + 1e-9).all()


def test_extreme_log_probs():
    """One member rules a label out: it drops from the mean; if all do, the loss is infinite, never NaN."""
    log_probs = torch.tensor([[0.0, -1.0], [-math.inf, -1.0]], dtype=torch.float64)
    value = dyadic_joint_log_loss(log_probs, 2)
    # k = 0: both members; k = 1, 2: the first alone.
    expected = 0.25 * 2 + 0.5 * (1 + math.log(2)) + 0.25 * math.log(2)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert dyadic_joint_log_loss(torch.full((2, 2), -math.inf), 2).item() == math.inf
    assert consecutive_joint_log_loss(torch.tensor([[-5000.0] * 10]).double()).item() == pytest.approx(50000)


def test_gradients():
    log_probs = random_log_probs(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dyadic_joint_log_loss(x, 4), log_probs)
    logits = LOGITS[:, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: joint_log_loss(x, LABELS[:4], 3), logits)


def test_half_precision_is_upcast():
    value = joint_log_loss(LOGITS.bfloat16(), LABELS)
    assert torch.equal(value, joint_log_loss(LOGITS.bfloat16().double(), LABELS))


def test_hash_is_splitmix64():
    """The first output of SplitMix64 seeded with 0, and the same by unbounded integers elsewhere."""

    def reference(x):
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert reference(0) == 0xE220A8397B1DCDAF
    for x in (0, 1, 2**40, 2**62, -1, -(2**63)):
        assert int(mix(torch.tensor(x))) % 2**64 == reference(x % 2**64)


def test_hashed_draws_are_uniform_and_do_not_depend_on_the_batch():
    cpu = torch.device("cpu")
    draws = module.hashed_draws(0, 3000, 10, 3, 0, cpu)
    assert draws.shape == (3000, 10)
    counts = torch.bincount(draws.reshape(-1)).double()
    assert len(counts) == 3
    assert ((counts - 10000).abs() < 4 * math.sqrt(30000 * 2 / 9)).all()
    # neighbours in a block and in a column are independent
    pairs = torch.bincount((3 * draws[:, :-1] + draws[:, 1:]).reshape(-1)).double()
    assert ((pairs - 3000).abs() < 5 * math.sqrt(3000)).all()
    parts = [module.hashed_draws(first, 100, 10, 3, 0, cpu) for first in range(0, 3000, 100)]
    assert torch.equal(torch.cat(parts), draws)
    assert not torch.equal(module.hashed_draws(0, 3000, 10, 3, 1, cpu), draws)


def test_no_full_block_is_nan():
    assert joint_log_loss(LOGITS[:, :1], LABELS[:1]).isnan()
    assert joint_log_loss(LOGITS[:, :9], LABELS[:9], sampling="consecutive").isnan()
    assert joint_log_loss(LOGITS[:, :1], LABELS[:1], sampling="sampled").isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": 3}, r"`kappa` must be 2 with sampling='dyadic'.* it is 3. Use sampling='sampled'"),
        ({"tau": 0}, "`tau` must be an integer of at least 1, but it is 0"),
        ({"sampling": "random"}, "`sampling` must be one of 'dyadic', 'sampled', 'consecutive', but it is 'random'"),
        ({"selected": torch.zeros(11, 10)}, "`selected` requires sampling='sampled', but sampling is 'dyadic'"),
        ({"sampling": "sampled", "selected": torch.full((11, 10), 2)}, r"hold rows in \[0, 2\)"),
        ({"sampling": "sampled", "selected": torch.zeros(5, 10)}, r"`selected` must be \[G, tau\] with G blocks in 22"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(InputError, match=message):
        joint_log_loss(LOGITS, LABELS, **arguments)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (LOGITS[0], LABELS, r"`logits` must be a floating-point tensor \[Z, B, C\]"),
        (LOGITS[None], LABELS, r"`logits` must be \[Z, B, C\] with Z > 0, but its shape is \[1, 6, 23, 4\]"),
        (LOGITS[:0], LABELS, r"with Z > 0, but its shape is \[0, 23, 4\]"),
        (LOGITS, LABELS[:, None], r"`target` must have shape \[23\], but its shape is \[23, 1\]"),
        (LOGITS, LABELS + 1, r"class indices in \[0, 4\), but it holds 4"),
        (LOGITS * math.nan, LABELS, "`logits` must hold numbers, but it holds NaN"),
    ],
)
def test_bad_values(logits, target, message):
    with pytest.raises(InputError, match=message):
        joint_log_loss(logits, target)

"""A class that minus infinity rules out counts for nothing: values and gradients are those without it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq import BernoulliPrediction, CategoricalPrediction, functional, losses
from lightning_uq.active_learning.scores import ACQUISITION_SCORES, LABELLED
from lightning_uq.functional import entropy
from lightning_uq.functional.vector_scaling import fit_vector_scaling
from lightning_uq.tasks import Classification

T = torch.tensor(2.0)


def prediction(logits, **fields):
    return CategoricalPrediction(logits, **fields)


def class_scaling(logits):
    scale = torch.linspace(0.5, 1.5, 4, dtype=logits.dtype)[: logits.shape[2]]
    return torch.stack([scale, scale - 1])


def class_matrix(logits, floor=-3.0):
    scale, bias = class_scaling(logits)
    return torch.cat([scale.diag(), torch.stack([bias, torch.full_like(bias, floor), torch.full_like(bias, 0.7)])])


def class_curves(logits):
    knots = torch.tensor([-2.0, -1.0, -0.1], dtype=logits.dtype)
    return torch.stack([knots, knots.exp()])[:, None].repeat(1, logits.shape[2], 1)


# Of logits [Z, B, C], whose last class may be ruled out, labels [B] of the others, and probabilities [B, C].
OF_LOGITS = {
    **functional.SCORES,
    "mean_probs": lambda logits: entropy.mean_log_probs(logits).exp().sum(1),
    "calibrated_entropy": lambda logits: prediction(logits, temperature=T).predictive_entropy,
    "scaled_entropy": lambda logits: prediction(logits, class_scaling=class_scaling(logits)).predictive_entropy,
    "matrix_entropy": lambda logits: prediction(logits, class_matrix=class_matrix(logits)).predictive_entropy,
    "matrix_entropy_at_a_temperature": lambda logits: (
        prediction(logits, class_matrix=class_matrix(logits, -1e4)).predictive_entropy
    ),
    "isotonic_entropy": lambda logits: prediction(logits, class_curves=class_curves(logits)).predictive_entropy,
    "distill_the_mean": lambda logits: losses.distill_mean_classification(logits, logits[0].detach()),
    "distilled": lambda logits: losses.distill_mean_classification(logits.detach(), logits[0]),
    **{
        f"acquire_{name}": score
        for name, score in ACQUISITION_SCORES.items()
        if name not in LABELLED | {"uniform"} | set(functional.SCORES)
    },
}
OF_LABELS = {
    "log_prob": lambda logits, y: prediction(logits).log_prob(y),
    "calibrated_log_prob": lambda logits, y: prediction(logits, temperature=T).log_prob(y),
    "scaled_log_prob": lambda logits, y: prediction(logits, class_scaling=class_scaling(logits)).log_prob(y),
    "joint_dyadic": lambda logits, y: functional.joint_log_loss(logits, y, tau=3),
    "joint_consecutive": lambda logits, y: functional.joint_log_loss(logits, y, tau=3, sampling="consecutive"),
    "joint_nll_loss": lambda logits, y: losses.joint_nll_loss(logits, y),
    "cross_entropy_loss": lambda logits, y: losses.cross_entropy_loss(logits, y),
    "task_loss": lambda logits, y: Classification().sample_losses(logits[0], y)[0],
    "task_focal": lambda logits, y: Classification(loss="focal").sample_losses(logits[0], y)[0],
    **{f"acquire_{name}": ACQUISITION_SCORES[name] for name in sorted(LABELLED)},
}
OF_SOFT_TARGETS = {
    "soft": lambda logits, t: Classification().sample_losses(logits[0], t)[0],
    "soft_focal": lambda logits, t: Classification(loss="focal").sample_losses(logits[0], t)[0],
}


def value_and_gradient(function, logits, *target):
    logits = logits.clone().requires_grad_()
    value = function(logits, *target)
    weights = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    (gradient,) = torch.autograd.grad((weights * value).sum(), logits)
    return value, gradient


def check_excluded(function, Z, C, seed, *target, without=()):
    generator = torch.Generator().manual_seed(seed)
    rest = 2 * torch.randn(Z, 4, C - 1, generator=generator, dtype=torch.float64)
    logits = torch.cat([rest, torch.full((Z, 4, 1), -math.inf, dtype=torch.float64)], 2)
    value, gradient = value_and_gradient(function, logits, *target)
    expected, others = value_and_gradient(function, rest, *(without or target))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient[..., :-1], others, rtol=1e-9, atol=1e-12)
    assert (gradient[..., -1] == 0).all()


sizes = st.integers(2, 4), st.integers(3, 4), st.integers(0, 1000)


@pytest.mark.parametrize("name", [name for name in OF_LOGITS if name != "variation_ratio"])
@settings(max_examples=10)
@given(*sizes)
def test_of_logits(name, Z, C, seed):
    check_excluded(OF_LOGITS[name], Z, C, seed)


@pytest.mark.parametrize("name", OF_LABELS)
@settings(max_examples=10)
@given(*sizes)
def test_of_labels(name, Z, C, seed):
    check_excluded(OF_LABELS[name], Z, C, seed, torch.arange(4) % (C - 1))


@pytest.mark.parametrize("name", OF_SOFT_TARGETS)
@settings(max_examples=10)
@given(*sizes)
def test_of_soft_targets(name, Z, C, seed):
    t = torch.rand(4, C - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    check_excluded(OF_SOFT_TARGETS[name], Z, C, seed, torch.cat([t, torch.zeros(4, 1)], 1), without=(t,))


# Energies follow the class that is left; the standard deviation of equal values has no gradient, excluded class or not.
NOT_OF_ONE_CLASS = {"variation_ratio", "energy", "max_logit", "acquire_ucb", "acquire_scaled_std"}


@pytest.mark.parametrize("name", sorted(OF_LOGITS.keys() - NOT_OF_ONE_CLASS))
def test_one_class_left_has_a_gradient_of_zero(name):
    logits = torch.tensor([[[1.0, -math.inf]], [[2.0, -math.inf]]])
    _, gradient = value_and_gradient(OF_LOGITS[name], logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["predictive_entropy", "mutual_information", "expected_entropy", "max_softmax"])
def test_a_class_that_one_member_rules_out_is_the_limit_of_an_improbable_one(name):
    logits = torch.tensor([[[1.0, 0.5, -math.inf]], [[0.0, -0.5, 1.0]]], dtype=torch.float64)
    found = value_and_gradient(functional.SCORES[name], logits)
    limit = value_and_gradient(functional.SCORES[name], logits.clamp_min(-300.0))
    torch.testing.assert_close(found, limit)


@pytest.mark.parametrize("of_prediction", ["probs", "predictive_entropy", "mutual_information", "expected_entropy"])
@pytest.mark.parametrize("off", [-math.inf, math.inf])
def test_a_label_that_is_certain(of_prediction, off):
    logits = torch.tensor([[[0.5, off]], [[-1.0, off]]], dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: getattr(BernoulliPrediction(x), of_prediction), logits)
    expected, others = value_and_gradient(lambda x: getattr(BernoulliPrediction(x), of_prediction), logits[..., :1])
    torch.testing.assert_close(value[:, :1], expected)
    torch.testing.assert_close(gradient[..., :1], others)
    assert value[0, 1] == (1.0 if of_prediction == "probs" and off > 0 else 0.0)
    assert (gradient[..., 1] == 0).all()


def test_vector_scaling_is_fitted_as_without_the_class():
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    y = (rest @ torch.tensor([-1.0, 1.0], dtype=torch.float64) + torch.randn(400, generator=generator) > 0.3).long()
    logits = torch.cat([rest, torch.full((400, 1), -math.inf, dtype=torch.float64)], 1)
    fit, without = fit_vector_scaling(logits, y), fit_vector_scaling(rest, y)
    torch.testing.assert_close(fit.scale[:2], without.scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.bias[:2], without.bias, rtol=1e-3, atol=1e-3)

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.data.environments import polyadic_inputs
from lightning_uq.functional import (
    Projection,
    categorical_kl,
    clustered_log_likelihood,
    expected_calibration_error,
    gaussian_kl,
    gaussian_log_likelihood,
    joint_log_likelihood,
    kl_estimate,
    log_sum_product,
    true_class_log_probs,
)

INF = math.inf


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "reference" / "enn_testbed_kl.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file.files}


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_divergence(reference, tau):
    logits = reference[f"tau{tau}/enn_logits"].movedim(1, 0)  # seed first there
    target = reference[f"tau{tau}/y_test"][..., 0]
    true = reference[f"tau{tau}/true_ll"]
    model = joint_log_likelihood(true_class_log_probs(logits, target))
    close(true - model, reference[f"tau{tau}/kl_per_seed"])
    estimate = kl_estimate(true, model)
    close(estimate.mean, reference[f"tau{tau}/kl_estimate"])
    close(estimate.std, reference[f"tau{tau}/kl_std"])
    assert (estimate.num_infinite, estimate.num_draws) == (0, 12)


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_environment(reference, tau):
    target = reference[f"tau{tau}/y_test"][..., 0]
    log_probs = true_class_log_probs(reference[f"tau{tau}/true_probs"].log().unsqueeze(0), target)
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

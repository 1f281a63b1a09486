import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from lightning_uq.functional import smooth_calibration_error
from lightning_uq.functional.smooth_calibration import residual_grid, smooth_bandwidth


def random_problem(seed, rows=300, classes=4, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    probs = (scale * torch.randn(rows, classes, generator=generator)).softmax(1)
    return probs, torch.randint(classes, (rows,), generator=generator)


def smece_at(bandwidth, confidence, residual, nodes=20001):
    """The definition: the integral of the absolute smoothed residual, images of the Gaussian summed one by one."""
    t = np.linspace(0, 1, nodes)[:, None]
    kernel = 0.0
    for mirror in range(-6, 7):
        for image in (confidence + 2 * mirror, -confidence + 2 * mirror):
            kernel = kernel + np.exp(-0.5 * ((t - image) / bandwidth) ** 2)
    kernel = kernel / (bandwidth * math.sqrt(2 * math.pi))
    return np.trapezoid(np.abs((kernel * residual).mean(1)), t[:, 0])


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 4.0), (2, 12.0)])
def test_smooth_error_equals_the_definition(seed, scale):
    probs, target = random_problem(seed, rows=40, scale=scale)
    confidence, label = probs.double().max(1)
    residual = (label == target).double() - confidence
    c, r = confidence.numpy(), residual.numpy()
    expected = brentq(lambda s: smece_at(s, c, r) - s, 1e-3, 1.0, xtol=1e-7)
    assert smooth_calibration_error(probs.double(), target).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("confidence", [1.0, 0.75, 0.5])
def test_smooth_error_of_one_atom_is_its_gap(confidence):
    """All mass at one point: smoothing moves it about, so the integral is the gap at any bandwidth."""
    probs = torch.tensor([[confidence, 1 - confidence]]).expand(10, 2)
    target = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert smooth_calibration_error(probs, target).item() == pytest.approx(confidence - 0.1, abs=1e-5)


def test_smooth_error_of_a_perfect_model_is_zero_and_of_a_calibrated_one_small():
    sure = torch.tensor([[1.0, 0.0]]).expand(50, 2)
    assert smooth_calibration_error(sure, torch.zeros(50, dtype=torch.long)) < 1e-9
    generator = torch.Generator().manual_seed(0)
    p = 0.5 + 0.5 * torch.rand(20000, generator=generator)
    probs = torch.stack([p, 1 - p], 1)
    target = (torch.rand(20000, generator=generator) > p).long()
    calibrated = smooth_calibration_error(probs, target)
    assert calibrated < 0.02
    assert smooth_calibration_error(probs, torch.ones(20000, dtype=torch.long)) > 0.5


def test_residual_grid_keeps_mass_and_mean():
    confidence = torch.rand(100, generator=torch.Generator().manual_seed(0))
    correct = confidence > 0.5
    residual, count = residual_grid(confidence, correct)
    node = torch.linspace(0, 1, len(count), dtype=torch.float64)
    assert count.sum().item() == pytest.approx(100)
    assert (count * node).sum().item() == pytest.approx(confidence.double().sum().item(), abs=1e-9)
    assert residual.sum().item() == pytest.approx((correct.double() - confidence.double()).sum().item(), abs=1e-9)
    assert 0 < smooth_bandwidth(torch.stack([residual, count])) < 1


# Bad input

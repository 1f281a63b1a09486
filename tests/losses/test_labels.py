"""Losses of labels that are on or off, against torch and torchvision, with their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from lightning_uq.errors import InputError
from lightning_uq.losses import label_losses

LOGITS = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = (torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.5).double()


def gradients(loss, logits):
    logits = logits.clone().requires_grad_()
    loss(logits).sum().backward()
    return logits.grad


@pytest.mark.parametrize("weight", [None, 3.0, [0.5, 1.0, 4.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torch_s(weight, smoothing):
    def ours(logits):
        return label_losses(logits, TARGET, pos_weight=weight, label_smoothing=smoothing)

    def theirs(logits):
        smooth = TARGET * (1 - smoothing) + smoothing / 2
        w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=w, reduction="none")

    torch.testing.assert_close(ours(LOGITS), theirs(LOGITS))
    torch.testing.assert_close(gradients(ours, LOGITS), gradients(theirs, LOGITS))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_torchvision_s(gamma):
    def ours(logits):
        return label_losses(logits, TARGET, "focal", focal_gamma=gamma)

    def theirs(logits):
        return sigmoid_focal_loss(logits, TARGET, alpha=-1, gamma=gamma)

    torch.testing.assert_close(ours(LOGITS), theirs(LOGITS))
    torch.testing.assert_close(gradients(ours, LOGITS), gradients(theirs, LOGITS))
    # alpha = w / (1 + w) weighs as a positive weight w, up to the factor 1 + w.
    weighted = label_losses(LOGITS, TARGET, "focal", pos_weight=3.0, focal_gamma=gamma)
    torch.testing.assert_close(weighted / 4, sigmoid_focal_loss(LOGITS, TARGET, alpha=0.75, gamma=gamma))


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_an_unknown_label_adds_nothing_even_if_its_logit_is_nan(loss):
    target, logits = TARGET.clone(), LOGITS.clone()
    target[1, 2], logits[1, 2] = math.nan, math.nan
    found = label_losses(logits, target, loss)
    assert found[1, 2] == 0
    gradient = gradients(lambda values: label_losses(values, target, loss), logits)
    assert gradient[1, 2] == 0
    assert gradient.isfinite().all()


def test_a_sure_label_has_a_finite_gradient():
    logits = torch.tensor([200.0, -200.0])
    gradient = gradients(
        lambda values: label_losses(values, torch.tensor([1.0, 0.0]), "focal", focal_gamma=0.5), logits
    )
    assert gradient.isfinite().all()


def test_dtypes_and_names():
    assert label_losses(LOGITS.bfloat16(), TARGET.bool()).dtype == torch.float32
    torch.testing.assert_close(label_losses(LOGITS, TARGET.long()), label_losses(LOGITS, TARGET))
    with pytest.raises(InputError, match="`loss` must be one of 'bce', 'focal', but it is 'hinge'"):
        label_losses(LOGITS, TARGET, "hinge")

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_uq.functional import (
    categorical_kl,
    gaussian_kl,
    log_sum_product,
)

INF = math.inf


def test_a_term_without_weight_or_probability_adds_nothing():
    assert log_sum_product(torch.tensor([1.0, 0.0]), torch.tensor([[0.5], [0.0]])).item() == pytest.approx(
        math.log(0.5)
    )
    assert categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert categorical_kl(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])) == INF


def test_gaussian_kl_is_torchs():
    mean, std, other_mean, other_std = torch.rand(4, 6, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(other_mean, other_std))
    torch.testing.assert_close(gaussian_kl(mean, std, other_mean, other_std), expected)

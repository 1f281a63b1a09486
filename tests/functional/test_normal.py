import math

import torch
from torch.distributions import MultivariateNormal

from lightning_uq.functional import (
    gaussian_log_likelihood,
)

INF = math.inf


def test_gaussian_density_is_torchs():
    root = torch.randn(5, 5, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(5)
    error = torch.randn(3, 5, dtype=torch.float64)
    expected = MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(error)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance), expected)
    torch.testing.assert_close(gaussian_log_likelihood(error, covariance.expand(3, 5, 5)), expected)

import pytest
import torch

from lightning_uq.functional.shrinkage import oas_intensity


def test_the_intensity_comes_close_to_the_oracles():
    # The oracle minimises the expected squared error over draws; the estimate from one draw should be near it.
    generator = torch.Generator().manual_seed(0)
    D, n = 20, 15
    sigma = torch.linspace(0.5, 4, D, dtype=torch.float64)
    draws = torch.randn(400, n, D, generator=generator, dtype=torch.float64) * sigma.sqrt()
    centered = draws - draws.mean(1, keepdim=True)
    S = centered.mT @ centered / (n - 1)
    eye = torch.eye(D, dtype=torch.float64)
    for estimate, truth, target in (
        (S, torch.diag(sigma), eye * (S.diagonal(dim1=1, dim2=2).mean(1))[:, None, None]),
        (variances := S.diagonal(dim1=1, dim2=2), sigma, variances.mean(1, keepdim=True).expand(-1, D)),
    ):
        gap = target - estimate
        oracle = float(((truth - estimate) * gap).sum() / gap.square().sum())
        mean = torch.stack([oas_intensity(one, n - 1) for one in estimate]).mean()
        assert float(mean) == pytest.approx(oracle, abs=0.1), estimate.ndim


def test_intensities_at_the_edges():
    assert oas_intensity(torch.eye(5), 10) == 1  # already a multiple of the identity
    assert oas_intensity(torch.zeros(5, 5), 10) == 1
    assert oas_intensity(torch.ones(5), 10) == 1
    assert oas_intensity(torch.ones(1, 1), 10) == 0
    assert oas_intensity(torch.ones(1), 10) == 0
    assert oas_intensity(torch.diag(torch.tensor([1.0, 1e6])), 10**6) < 1e-5

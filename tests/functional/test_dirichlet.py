import mpmath  # it comes with torch, by way of sympy
import pytest
import torch
from torch.distributions import Dirichlet

from lightning_uq.functional import dirichlet

ALPHA = torch.tensor([[1.0, 1.0, 1.0], [10.0, 2.0, 0.5], [0.1, 0.1, 5.0]], dtype=torch.float64)


def test_expected_entropy_is_the_mean_entropy_of_draws():
    torch.manual_seed(0)
    draws = Dirichlet(ALPHA).sample((200_000,))
    monte_carlo = torch.special.entr(draws).sum(-1).mean(0)
    torch.testing.assert_close(dirichlet.dirichlet_expected_entropy(ALPHA), monte_carlo, rtol=0, atol=4e-3)


def test_mutual_information_is_what_the_mean_has_above_it():
    mean = ALPHA / ALPHA.sum(1, keepdim=True)
    torch.testing.assert_close(
        dirichlet.dirichlet_mutual_information(ALPHA) + dirichlet.dirichlet_expected_entropy(ALPHA),
        torch.special.entr(mean).sum(1),
    )


def test_differential_entropy_is_torchs():
    torch.testing.assert_close(dirichlet.dirichlet_differential_entropy(ALPHA), Dirichlet(ALPHA).entropy())


def test_float32_evidence_is_worked_on_in_float64():
    # With S large the mutual information tends to (C - 1) / (2 S).
    alpha = torch.full((1, 4), 5e6)
    assert dirichlet.dirichlet_mutual_information(alpha).item() == pytest.approx(3 / (2 * 2e7), rel=1e-2)


def test_a_map_keeps_its_axes():
    maps = torch.rand(2, 3, 4, 5) + 0.5
    assert dirichlet.dirichlet_expected_entropy(maps).shape == (2, 4, 5)
    assert dirichlet.dirichlet_differential_entropy(maps).shape == (2, 4, 5)


@pytest.mark.parametrize(
    "alpha",
    [[1.0, 2.0, 3.0], [1e-3, 1e-6], [1.0, 1e9], [1e6, 2e6, 3e6], [1e15, 3e15], [63.0, 65.0], [1e20, 1.0, 1e-8]],
)
def test_the_mutual_information_keeps_its_digits_at_any_evidence(alpha):
    with mpmath.workdps(60):
        a = [mpmath.mpf(x) for x in alpha]
        total = sum(a)
        expected = sum(x / total * (mpmath.digamma(x + 1) - mpmath.digamma(total + 1)) for x in a)
        expected -= sum(x / total * mpmath.log(x / total) for x in a)
    value = dirichlet.dirichlet_mutual_information(torch.tensor([alpha], dtype=torch.float64))
    assert float(value) == pytest.approx(float(expected), rel=1e-11)


def test_the_mutual_information_has_a_gradient_on_both_sides_of_its_series():
    alpha = torch.tensor([[0.5, 3.0, 63.0], [65.0, 1e3, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dirichlet.dirichlet_mutual_information, alpha)

"""A prior's factor follows its measured spread, however the spread came there."""

import copy

import pytest
import torch

from lightning_uq.networks.priors.scale import PriorScale
from tests.counting import operators

PRIOR = torch.tensor([[[-3.0, 1.0]], [[3.0, 1.0]]])  # variances over z of 18 and 0


def measured():
    scale = PriorScale(2.0)
    torch.testing.assert_close(scale(PRIOR), 2 * PRIOR)
    scale.measure(PRIOR)
    return scale


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_spread_gives_the_same_factor(assign):
    before, after = measured(), PriorScale(2.0)
    torch.testing.assert_close(before(PRIOR), 2 * PRIOR / 3)
    assert list(before.state_dict()) == ["running_spread"]
    after.load_state_dict(before.state_dict(), assign=assign)
    assert after.measured
    assert torch.equal(after(PRIOR), before(PRIOR))
    assert torch.equal(copy.deepcopy(before)(PRIOR), before(PRIOR))
    after.load_state_dict(PriorScale(2.0).state_dict())  # never measured
    assert not after.measured
    assert torch.equal(after(PRIOR), 2 * PRIOR)


def test_a_prior_without_spread_keeps_its_values():
    scale = PriorScale(2.0)
    scale.measure(torch.ones(4, 1, 2))
    torch.testing.assert_close(scale(torch.ones(4, 1, 2)), torch.full((4, 1, 2), 2.0))


def test_it_is_one_operator():
    scale = measured()
    assert operators(lambda: scale(PRIOR)) == 1
    assert scale.half()(PRIOR.half()).dtype == torch.float16
    assert scale.running_factor.dtype == torch.float32

"""The outputs of members, compiled and exported ensembles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks import (
    MLP,
)
from tests.networks.ensemble.members import (
    KINDS,
    assert_same,
    build,
    gradients,
    state_of,
)
from tests.versions import VMAP_EXPORT, skip_on_torch_2_6


@pytest.mark.parametrize("execution", KINDS)
def test_what_a_member_returns_is_read(execution):
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "features": x}

    x = torch.randn(4, 2)
    network = build(Dictionary, execution, output=lambda out: out["logits"][:, :2].log_softmax(1))
    expected = torch.stack([F.log_softmax(network.member(i).layer(x)[:, :2], 1) for i in range(3)])
    torch.testing.assert_close(network(x), expected)
    network = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)), execution, output="probs")
    torch.testing.assert_close(network(x).exp().sum(-1), torch.ones(3, 4))


def test_an_output_that_is_no_tensor_is_reported():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(
        UnsupportedError, match="the members return a tuple, not one tensor; argument `output` can select it"
    ):
        build(Pair, "stacked")
    with pytest.warns(UserWarning, match="The network returns a tuple of 2, whose first part"):
        outputs = [build(Pair, execution)(torch.zeros(1, 2)) for execution in ("loop", "vmap", "auto")]
    assert all(output.shape == (3, 1, 3) for output in outputs)


@pytest.mark.parametrize("execution", KINDS)
def test_compiled(execution):
    network, x = build(lambda: MLP(12, 3, hidden_sizes=(4,), norm="batch"), execution), torch.randn(6, 12)
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    torch.testing.assert_close(compiled(x, torch.arange(3)), network(x, torch.arange(3)))
    compiled(x).sum().backward()
    network(x).sum().backward()
    assert_same(state_of(network), state_of(compiled._orig_mod))
    assert_same(gradients(network), gradients(compiled._orig_mod))
    torch.compiler.reset()


@pytest.mark.parametrize("execution", KINDS)
def test_exported(execution):
    skip_on_torch_2_6(VMAP_EXPORT, execution == "vmap")
    network, x = build(lambda: MLP(12, 3, hidden_sizes=(4,), norm="batch"), execution).eval(), torch.randn(6, 12)
    exported = torch.export.export(network, (x, torch.tensor([2, 0])), strict=False).module()
    torch.testing.assert_close(exported(x, torch.tensor([1, 1])), network(x, torch.tensor([1, 1])))

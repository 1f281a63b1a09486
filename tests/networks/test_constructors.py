"""The constructors of networks: what may be given by position."""

import inspect

import pytest
import torch
from torch import nn

from lightning_uq import networks
from lightning_uq.networks import BayesByBackpropNetwork, DropoutNetwork, HypermodelNetwork

CLASSES = sorted(name for name in networks.__all__ if inspect.isclass(getattr(networks, name)))


@pytest.mark.parametrize("name", [*CLASSES, "index_mlp_with_gp_prior"])
def test_options_are_given_by_name(name):
    parameters = list(inspect.signature(getattr(networks, name)).parameters.values())
    positional = [p.name for p in parameters[2:] if p.default is not p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert not positional, f"{name} takes {positional} by position."


@pytest.mark.parametrize("cls", [BayesByBackpropNetwork, DropoutNetwork, HypermodelNetwork])
def test_only_the_network_is_given_by_position(cls):
    with pytest.raises(TypeError, match="positional"):
        cls(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3)), torch.tensor(10))

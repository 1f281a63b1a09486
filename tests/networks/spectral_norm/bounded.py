"""A small bounded network, and the true norms of its layers."""

import copy
import io
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_uq.networks import spectral_normalize


def norm_of(layer):
    """The parametrization of a bounded layer."""
    return layer.parametrizations.weight[0]


def original(layer):
    return layer.parametrizations.weight.original


def dense(layer, weight, size):
    """The linear operator of ``layer`` with ``weight`` as a matrix, one column an input element."""
    plain = copy.deepcopy(layer)
    if parametrize.is_parametrized(plain):
        parametrize.remove_parametrizations(plain, "weight", leave_parametrized=False)
        plain._forward_pre_hooks.clear()
    plain = plain.double()
    plain.bias = None
    with torch.no_grad():
        plain.weight.copy_(weight)
        shape = (layer.in_channels, *size)
        basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        return plain(basis).flatten(1).T


def true_norm(layer, size, weight=None):
    return torch.linalg.matrix_norm(dense(layer, layer.weight if weight is None else weight, size), 2).item()


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1, stride=2),
        nn.Flatten(),
        nn.Linear(27, 5),
    )


X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(net=None, coefficient=0.3, steps=3, **kwargs):
    net = spectral_normalize(small_net() if net is None else net, coefficient=coefficient, **kwargs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    return net


def saved(obj):
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()

"""Gradients, clipping and optimizers act on each member separately."""

import copy
import functools

import pytest
import torch
from torch import nn

from tests.networks.ensemble.members import (
    ARCHITECTURES,
    AT_ONCE,
    KINDS,
    Functional,
    assert_same,
    build,
    gradients,
    state_of,
)


@pytest.mark.parametrize("execution", KINDS)
def test_parameter_groups(execution):
    network = build(lambda: nn.Linear(2, 3), execution, 4)
    groups = network.parameter_groups()
    assert network.is_stacked == (execution != "loop")
    assert [p for group in groups for p in group] == list(network.parameters()) if execution != "loop" else True
    if execution == "loop":
        assert [[tuple(p.shape) for p in group] for group in groups] == [[(3, 2), (3,)]] * 4
        assert all(
            a is b
            for i, group in enumerate(groups)
            for a, b in zip(group, network.members[i].parameters(), strict=True)
        )
    else:
        assert [[tuple(p.shape) for p in group] for group in groups] == [[(4, 3, 2), (4, 3)]]


@pytest.mark.parametrize("execution", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "limit", "norm_type"),
    [("norm", 0.5, 2.0), ("norm", 0.1, float("inf")), ("norm", 1.0, 1.0), ("norm", 1e6, 2.0), ("value", 0.05, 2.0)],
)
def test_clipping_is_each_member_s_own(execution, algorithm, limit, norm_type):
    network = build(Functional, execution, 4).double()
    alone = [copy.deepcopy(network.member(i)) for i in range(4)]
    x = torch.randn(6, 12, dtype=torch.float64)
    scale = torch.tensor([1e-3, 1.0, 100.0, 0.0]).double().view(-1, 1, 1)  # members with very different gradients
    (network(x) * scale).sum().backward()
    norms = network.clip_gradients_per_member(limit, algorithm, norm_type=norm_type)
    expected, expected_norms = {}, []
    for i, member in enumerate(alone):
        (member(x) * scale[i]).sum().backward()
        if algorithm == "norm":
            expected_norms.append(nn.utils.clip_grad_norm_(member.parameters(), limit, norm_type))
        else:
            nn.utils.clip_grad_value_(member.parameters(), limit)
        expected |= {f"members.{i}.{name}": p.grad for name, p in member.named_parameters()}
    actual = gradients(network)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
    if algorithm == "norm":
        torch.testing.assert_close(norms, torch.stack(expected_norms), rtol=1e-9, atol=1e-12)
    else:
        assert norms is None


@pytest.mark.parametrize("execution", KINDS)
def test_clipping_without_gradients_and_with_lightning_s_enumeration(execution):
    from lightning.pytorch.utilities import GradClipAlgorithmType

    network = build(lambda: nn.Linear(2, 3), execution)
    assert network.clip_gradients_per_member(1.0, GradClipAlgorithmType.NORM).tolist() == [0, 0, 0]
    assert network.clip_gradients_per_member(1.0, GradClipAlgorithmType.VALUE) is None


@pytest.mark.parametrize(
    "make_optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.Adam, lr=0.05, fused=True),
        functools.partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
    ],
)
@pytest.mark.parametrize("execution", AT_ONCE)
def test_optimizers_act_per_slice(execution, make_optimizer):
    x, y = torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    states = []
    for kind in ("loop", execution):
        network = build(ARCHITECTURES["batch"], kind).double()
        optimizer = make_optimizer(network.parameters())
        for _ in range(10):
            optimizer.zero_grad()
            (network(x) - y).square().mean((1, 2)).sum().backward()
            network.clip_gradients_per_member(0.3)
            optimizer.step()
        states.append(state_of(network))
    assert_same(*states, rtol=1e-8, atol=1e-8)

"""Autocast and convolutions give the numbers and types of the loop."""

import copy

import pytest
import torch
from torch import nn

from tests.networks.ensemble.members import (
    ARCHITECTURES,
    AT_ONCE,
    assert_same,
    build,
    inputs,
    run,
    state_of,
)


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.GroupNorm(2, 4),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3),
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of RMSNorm under autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "execution"), [*((name, kind) for name in ARCHITECTURES for kind in AT_ONCE), ("convolutions", "vmap")]
)
def test_autocast_gives_the_loop_s_types_and_numbers(name, execution, dtype):
    if name == "convolutions":
        make, x = Convolutions, torch.randn(5, 1, 8, 8)
    else:
        make, x = ARCHITECTURES[name], inputs(name)
    loop, other = build(make, "loop"), build(make, execution)
    with torch.autocast("cpu", dtype):
        expected, actual = loop(x), other(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.1, atol=0.1)
    for network, output in ((loop, expected), (other, actual)):
        output.float().square().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in network.parameters())
    assert_same(state_of(loop), state_of(other), rtol=0.05, atol=0.05)


class Scalar(nn.Module):
    """A scalar parameter, which does not widen the type of what it multiplies."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.layer(x) + self.layer.bias[0]


@pytest.mark.parametrize("execution", AT_ONCE)
def test_scalars_keep_the_type_of_their_operand(execution):
    loop, other, x = build(Scalar, "loop"), build(Scalar, execution), torch.randn(5, 4)
    torch.testing.assert_close(other(x), loop(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert loop(x).dtype == other(x).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_convolutions_under_vmap(training):
    loop, other = (build(Convolutions, kind).double().train(training) for kind in ("loop", "vmap"))
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    for each in (False, True):
        expected, actual = (run(copy.deepcopy(network), x, each) for network in (loop, other))
        torch.testing.assert_close(actual[:2], expected[:2])
        assert_same(expected[2], actual[2])
        assert_same(expected[3], actual[3])

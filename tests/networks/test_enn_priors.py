import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.priors.additive import AdditivePrior, cifar_conv_prior, imagenet_mlp_prior, mlp_prior
from lightning_uq.networks.priors.convolutions import ConvFunction, SameConv2d


def test_an_additive_prior_is_the_sum_and_linear_in_the_index():
    functions = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(4)]
    prior = AdditivePrior(functions)
    x, z, w = torch.randn(6, 3), torch.randn(7, 4), torch.randn(7, 4)
    expected = sum(z[:, k, None, None] * functions[k](x) for k in range(4))
    torch.testing.assert_close(prior(x, z), expected)
    torch.testing.assert_close(prior(x, 2 * z + w), 2 * prior(x, z) + prior(x, w), rtol=1e-4, atol=1e-5)


def test_it_is_frozen():
    prior = AdditivePrior([nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))])
    assert not list(prior.parameters())
    prior.train()
    assert not any(module.training for module in prior.modules())
    x, z = torch.randn(6, 3), torch.ones(1, 1)
    assert torch.equal(prior(x, z), prior(x, z))


def test_a_seed_decides_its_weights():
    first, again, other = (mlp_prior(3, 2, index_dim=4, seed=seed) for seed in (1, 1, 2))
    x, z = torch.randn(6, 3), torch.randn(2, 4)
    assert torch.equal(first(x, z), again(x, z))
    assert not torch.equal(first(x, z), other(x, z))


@settings(max_examples=25)
@given(st.integers(1, 13), st.integers(1, 6), st.integers(1, 4))
def test_same_padding_is_tensorflows(size, kernel, stride):
    convolution = SameConv2d(1, 1, kernel, stride=stride)
    x = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    missing = max((out - 1) * stride + kernel - size, 0)
    before = missing // 2  # the odd one goes behind
    padded = F.pad(x, (before, missing - before, before, missing - before))
    expected = F.conv2d(padded, convolution.weight, convolution.bias, stride=stride)
    assert expected.shape[-1] == out
    torch.testing.assert_close(convolution(x), expected)


def test_cifar_padding_is_asymmetric():
    convolution = SameConv2d(1, 1, 5, stride=2, bias=False)
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        convolution.weight[0, 0, 1, 1] = 1.0  # with one zero before, output (0, 0) sees input (0, 0) here
    x = torch.arange(1024.0).reshape(1, 1, 32, 32)
    assert torch.equal(convolution(x)[0, 0], x[0, 0, ::2, ::2])


def test_images_of_another_size_are_resized():
    prior = cifar_conv_prior(10, index_dim=2, seed=0)
    flat = torch.full((1, 3, 48, 64), 0.7)
    z = torch.randn(3, 2)
    torch.testing.assert_close(prior(flat, z), prior(torch.full((1, 3, 32, 32), 0.7), z))
    assert imagenet_mlp_prior(5, index_dim=2)(torch.zeros(1, 3, 224, 224), z).shape == (3, 1, 5)


def test_convolutions_are_drawn_by_their_fan_in():
    convolution = truncated_normal_init_(nn.Conv2d(16, 500, 5), torch.Generator().manual_seed(0))
    assert convolution.weight.std().item() == pytest.approx(0.8796 / 400**0.5, rel=0.01)
    assert convolution.weight.abs().max() <= 2 / 400**0.5


def test_bad_arguments():
    with pytest.raises(InputError, match="`functions`"):
        AdditivePrior([])
    with pytest.raises(InputError, match=r"\[Z, 2\]"):
        mlp_prior(3, 2, index_dim=2)(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        ConvFunction(2)(torch.zeros(2, 3))

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_leaves

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.mlp import MLP
from tests.counting import peak_bytes
from tests.versions import VMAP_EXPORT, skip_on_torch_2_6

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def base():
    return MLP(4, 3, hidden_sizes=(16,), norm="layer")


def test_its_weights_are_means_plus_noise():
    inner = base()
    own = {name: p.detach().clone() for name, p in inner.named_parameters()}
    network = BayesByBackpropNetwork(inner, initial_std=0.3)
    assert network.num_weights == sum(value.numel() for value in own.values())  # the norm's are among them
    z = network.sample_index(2)
    noise = network.noise(z)
    weights, start = network.weights(z), 0
    for name, value in own.items():
        expected = value + 0.3 * noise[:, start : start + value.numel()].reshape(2, *value.shape)
        torch.testing.assert_close(weights[name], expected)
        start += value.numel()
    expected = torch.stack(
        [torch.func.functional_call(inner, {n: w[i] for n, w in weights.items()}, (X,)) for i in range(2)]
    )
    torch.testing.assert_close(network(X, z), expected)


def test_without_noise_it_is_the_network():
    inner = base()
    expected = inner(X)
    network = BayesByBackpropNetwork(inner, temperature=0.5)
    weights = network.weights_of_noise(torch.zeros(1, network.num_weights))
    torch.testing.assert_close(network.call(X, weights)[0], expected / 0.5)


def test_frozen_parameters_are_shared_and_certain():
    inner = base()
    inner[0].requires_grad_(False)
    network = BayesByBackpropNetwork(inner)
    assert network.num_weights == 2 * 16 + 16 * 3 + 3
    network(X, network.sample_index(3)).sum().backward()
    assert inner[0].weight.grad is None
    assert network.spread.rho.grad.abs().sum() > 0
    assert inner[3].weight.grad.abs().sum() > 0


def test_the_divergences():
    network = BayesByBackpropNetwork(base(), initial_std=0.2)
    expected = kl_divergence(Normal(network.mean, network.std), Normal(0.0, 0.7)).sum()
    torch.testing.assert_close(network.kl(0.7), expected)
    weights = network.weights(network.sample_index(4000, torch.Generator().manual_seed(0)))
    estimates = network.kl(0.7, second_prior_std=0.7, weights=weights)
    assert estimates.shape == (4000,)
    assert abs(estimates.mean() - expected) < 5 * estimates.std() / 4000**0.5
    gradients = torch.autograd.grad(network.kl(), list(network.parameters()))
    assert sum(bool(g.any()) for g in gradients) == len(gradients) - 1  # but for the norm's bias, which is zero
    with pytest.raises(InputError, match="Pass `weights`"):
        network.kl(0.7, second_prior_std=0.1)


def test_the_divergence_does_not_lose_precision():
    network = BayesByBackpropNetwork(base())
    exact = copy.deepcopy(network).double().kl()
    half = copy.deepcopy(network).bfloat16().kl()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.kl().item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_shared_parameter_is_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    network = BayesByBackpropNetwork(Tied(), initial_std=0.5)
    assert network.num_weights == 16 + 8
    z = network.sample_index(1)
    weights = {name: value[0] for name, value in network.weights(z).items()}
    h = nn.functional.linear(X, weights["a.weight"], weights["a.bias"])
    torch.testing.assert_close(network(X, z)[0], nn.functional.linear(h, weights["a.weight"], weights["b.bias"]))


def test_indices():
    network = BayesByBackpropNetwork(base())
    index = network.evaluation_index(5)
    assert index.tolist() == [0, 1, 2, 3, 4]
    noise = network.noise(index)
    assert torch.equal(BayesByBackpropNetwork(base()).noise(index), noise)
    assert not (network.noise(network.evaluation_index(5, seed=1)) == noise).any()
    assert torch.equal(network.noise(index[[3, 0]]), noise[[3, 0]])  # a seed decides alone


def test_an_index_is_as_small_for_a_large_network():
    """An index of all weights' noise was 4.2 GB for resnet18, kept on the CPU, moved in every batch and copied by deepcopy."""
    network = BayesByBackpropNetwork(nn.Linear(300, 300)).eval()
    index = network.evaluation_index(100)
    assert (index.shape, index.dtype) == ((100,), torch.int64)
    network(torch.zeros(2, 300), index)
    kept = [
        t for module in (network, network.indexer) for t in tree_leaves(vars(module)) if isinstance(t, torch.Tensor)
    ]
    assert sum(t.numel() for t in kept if not isinstance(t, nn.Parameter)) < 1000


def test_an_index_drawn_in_inference_mode_serves_training_too():
    network = BayesByBackpropNetwork(base())
    with torch.inference_mode():
        network.eval()(X, network.evaluation_index(3))
    network(X, network.evaluation_index(3)).sum().backward()


def test_small_steps_of_the_spread_survive_bfloat16():
    network = BayesByBackpropNetwork(base()).bfloat16()
    before = network.std.detach().clone()
    assert before.dtype == torch.float32
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.kl().backward()
    optimizer.step()
    torch.testing.assert_close(network.std, before * (1 + 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("std", [1e-6, 0.01, 1.0, 30.0, 5000.0])
def test_any_spread_may_be_the_first(std):
    network = BayesByBackpropNetwork(nn.Linear(4, 3), initial_std=std)
    torch.testing.assert_close(network.std, torch.full((15,), std))


def test_a_state_brings_its_start():
    network, other = BayesByBackpropNetwork(base(), initial_std=0.2), BayesByBackpropNetwork(base())
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other.std, network.std)
    z = network.sample_index(2)
    assert torch.equal(other(X, z), network(X, z))


def test_chunks_make_no_difference(monkeypatch):
    network = BayesByBackpropNetwork(base()).eval()
    z = network.evaluation_index(11)
    whole = network(X, z)
    monkeypatch.setattr("lightning_uq.networks.generated.weights._MAX_WEIGHTS_CPU", 2 * network.num_weights)
    torch.testing.assert_close(network(X, z), whole)


def test_memory_does_not_grow_with_the_indices():
    network, x = BayesByBackpropNetwork(MLP(4, 3, hidden_sizes=(256, 256))).eval(), torch.randn(8, 4)
    few, many = network.evaluation_index(4), network.evaluation_index(64)

    def peak(index):
        with torch.no_grad():
            return peak_bytes(lambda: network(x, index))

    assert peak(many) < peak(few) + 1e5  # 270 kB of weights per index


def test_copies_compilation_export_and_precisions():
    network = BayesByBackpropNetwork(base())
    z = network.evaluation_index(4)
    assert torch.equal(copy.deepcopy(network)(X, z), network(X, z))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, z), network(X, z))
    compiled(X, z).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    output = network(X, z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(X, z).float(), output, atol=0.05, rtol=0.05)
    half = copy.deepcopy(network).bfloat16()(X.bfloat16(), z)
    assert half.dtype == torch.bfloat16
    assert copy.deepcopy(network).double()(X.double(), z).dtype == torch.float64
    skip_on_torch_2_6(VMAP_EXPORT)
    torch.testing.assert_close(torch.export.export(network, (X, z), strict=False).module()(X, z), output)


def test_bad_arguments():
    with pytest.raises(UnsupportedError, match=r"BayesByBackpropNetwork does not support '1' \(BatchNorm1d\)"):
        BayesByBackpropNetwork(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    with pytest.raises(InputError, match="parameters that require a gradient, but ReLU has none"):
        BayesByBackpropNetwork(nn.ReLU())
    with pytest.raises(InputError, match="LazyLinear is lazy"):
        BayesByBackpropNetwork(nn.LazyLinear(3))
    for name in ("initial_std", "temperature"):
        for value in (0, math.inf, math.nan):
            with pytest.raises(InputError, match=f"`{name}` must be positive and finite, but it is {value}"):
                BayesByBackpropNetwork(base(), **{name: value})
    network = BayesByBackpropNetwork(nn.Linear(4, 3))
    for index in (torch.randn(3), torch.randn(3, 15), torch.zeros(3, 15, dtype=torch.long)):
        with pytest.raises(InputError, match=r"`index` must be seeds, integers \[Z\], but it is"):
            network(X, index)

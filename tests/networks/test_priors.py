import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks import MLP, DeterministicNetwork, EnsembleNetwork, NetworkWithPrior, freeze_as_buffers
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork


def test_parameters_become_buffers_of_the_same_name_and_value():
    network = MLP(3, 2, hidden_sizes=(4,), norm="batch")
    before, x = copy.deepcopy(network.eval()), torch.randn(5, 3)
    network.train()
    assert freeze_as_buffers(network) is network
    assert list(network.parameters()) == []
    assert list(network.state_dict()) != []
    assert network.state_dict().keys() == before.state_dict().keys()
    assert dict(network.named_buffers()).keys() == before.state_dict().keys()
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(x), before(x), rtol=0, atol=0)
    assert network.double()(x.double()).dtype == torch.float64


def test_a_shared_parameter_stays_shared():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    freeze_as_buffers(network)
    assert network[0].weight is network[1].weight


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(3, 4), lambda: nn.MultiheadAttention(4, 2), lambda: nn.Linear(3, 4, bias=False)]
)
def test_layers_that_hold_their_weights_elsewhere(make):
    network = make().eval()
    x = torch.randn(5, 2, 4 if isinstance(network, nn.MultiheadAttention) else 3, requires_grad=True)
    args = (x, x, x) if isinstance(network, nn.MultiheadAttention) else (x,)
    first = (lambda out: out[0]) if not isinstance(network, nn.Linear) else (lambda out: out)
    expected = first(network(*args)).detach()
    output = first(freeze_as_buffers(network)(*args))
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert x.grad is not None
    assert not any(b.requires_grad or b.grad is not None for b in network.buffers())
    torch.testing.assert_close(first(network.double()(*(a.double() for a in args))).float(), expected)


def test_a_lazy_module_is_reported():
    with pytest.raises(InputError, match="`module` must be initialized, but LazyLinear is lazy"):
        freeze_as_buffers(nn.LazyLinear(3))


def test_output_is_network_plus_scaled_prior():
    network, prior, x = nn.Linear(2, 3), nn.Linear(2, 3), torch.randn(4, 2)
    expected = network(x) + 2.5 * prior(x)
    torch.testing.assert_close(NetworkWithPrior(network, prior, 2.5)(x), expected)


def test_no_optimizer_moves_the_prior_and_the_input_gradient_runs_through_it():
    network = NetworkWithPrior(nn.Linear(2, 1), MLP(2, 1, hidden_sizes=(4,), activation="tanh"), scale=1.0)
    before = copy.deepcopy(network.prior.state_dict())
    x = torch.randn(8, 2, requires_grad=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=1.0)
    network(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in network.prior.state_dict().items())
    through_prior = torch.autograd.grad(network.prior(x).sum(), x)[0]
    assert through_prior.abs().sum() > 0
    both = torch.autograd.grad(network(x).sum(), x)[0]
    torch.testing.assert_close(both, network.network.weight.expand(8, 2) + through_prior)


def test_prior_is_always_in_eval_mode():
    network = NetworkWithPrior(
        MLP(2, 1, hidden_sizes=(4,), dropout=0.5), MLP(2, 1, hidden_sizes=(4,), norm="batch", dropout=0.5), scale=1.0
    )
    for module in (network, nn.Sequential(network)):
        module.train()
        assert network.training
        assert network.network.training
        assert not any(m.training for m in network.prior.modules())
    statistics = network.prior[1].running_mean.clone()
    network(torch.randn(8, 2) + 5)
    assert torch.equal(network.prior[1].running_mean, statistics)
    assert not network.eval().training
    assert not network.network.training


def test_copies_and_checkpoints():
    network, x = (
        NetworkWithPrior(MLP(2, 1, hidden_sizes=(4,)), MLP(2, 1, hidden_sizes=(4,)), scale=0.5),
        torch.randn(3, 2),
    )
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(x), network(x), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = NetworkWithPrior(MLP(2, 1, hidden_sizes=(4,)), MLP(2, 1, hidden_sizes=(4,)), scale=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), network(x), rtol=0, atol=0)


def test_outputs_of_another_shape_are_reported():
    with pytest.raises(
        InputError, match=r"prior's output must have the network's shape \[4, 3\], but its shape is \[4, 1\]"
    ):
        NetworkWithPrior(nn.Linear(2, 3), nn.Linear(2, 1), 1.0)(torch.zeros(4, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda prior: HypermodelNetwork(torch.nn.Linear(4, 3), prior=prior),
        lambda prior: EpinetNetwork(torch.nn.Linear(4, 3), prior=prior),
    ],
)
def test_a_plain_network_is_no_prior_of_an_index(build):
    with pytest.raises(InputError, match=r"network g\(x, z\) of an input and an index, but Linear takes no index"):
        build(torch.nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"must be a module g\(x, z\), but it is 3"):
        build(3)


def test_a_second_freezing_changes_nothing():
    frozen = freeze_as_buffers(nn.Linear(2, 1))
    weight = frozen.weight
    assert freeze_as_buffers(frozen) is frozen
    assert frozen.weight is weight


@pytest.mark.parametrize("build", [DeterministicNetwork, lambda member: EnsembleNetwork([member])])
def test_priors_of_members_are_frozen_parts(build):
    member = NetworkWithPrior(nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3)), 1.0)
    network = build(member).train()
    assert network.frozen_parts() == [member.prior]
    assert network.num_frozen == 2
    assert member.network.training
    assert not member.prior.training

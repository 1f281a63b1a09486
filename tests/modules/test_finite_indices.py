"""One rule: a training step takes every index of a finite set, whatever the network and the module."""

import pytest
import torch
from torch import nn

from lightning_uq import (
    CategoricalRegressionModule,
    DeterministicModule,
    EnsembleModule,
    EpinetModule,
    UncertaintyModule,
)
from lightning_uq.networks import (
    CategoricalRegressionNetwork,
    CatMLPEnsemble,
    CenteredNetwork,
    ChoicePrior,
    DeterministicNetwork,
    EnsembleNetwork,
    EpistemicNetworkWithPrior,
    NetworkWithPrior,
    ScaledNetwork,
    StackedEnsembleNetwork,
    VmapEnsembleNetwork,
)
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.indexers import Indexer

X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1] * 4)
ATOMS = torch.linspace(-2, 2, 5)
M = 5


def members(outputs=2):
    return [nn.Linear(2, outputs) for _ in range(M)]


def functions():
    return ChoicePrior([nn.Linear(2, 2) for _ in range(M)])


NETWORKS = {
    "loop": lambda: EnsembleNetwork(members()),
    "stacked": lambda: StackedEnsembleNetwork(members()),
    "vmap": lambda: VmapEnsembleNetwork(members()),
    "members with priors": lambda: EnsembleNetwork([NetworkWithPrior(m, nn.Linear(2, 2), 1.0) for m in members()]),
    "prior on the index": lambda: EpistemicNetworkWithPrior(EnsembleNetwork(members()), functions()),
    "centered": lambda: CenteredNetwork.from_data(EnsembleNetwork(members()), X),
    "scaled": lambda: ScaledNetwork(EnsembleNetwork(members()), 2.0),
    "scaled, centered, stacked": lambda: ScaledNetwork(
        CenteredNetwork.from_data(StackedEnsembleNetwork(members()), X), 2.0
    ),
    "prior on atoms": lambda: CategoricalRegressionNetwork(EnsembleNetwork(members(5)), ATOMS),
    "cat_mlp": lambda: CatMLPEnsemble(2, ATOMS, num_members=M, hidden_sizes=(3,)),
}


def gradient_of_each_member(network):
    """The largest gradient of each of the members [M]: stacked leaves hold all, a loop's names hold the number."""
    largest = torch.zeros(M)
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        number = [part for part in name.split(".") if part.isdigit()] if "members." in name else []
        each = p.grad.flatten(1).abs().amax(1) if not number else p.grad.abs().max().expand(1)
        rows = torch.arange(M) if not number else torch.tensor([int(number[0])])
        largest[rows] = torch.maximum(largest[rows], each)
    return largest


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_train_samples", [None, 1, 9])
def test_every_member_gets_the_gradient_of_the_mean_over_all(name, num_train_samples):
    network = NETWORKS[name]()
    atoms = isinstance(network, CategoricalRegressionNetwork)
    module_class, y = (CategoricalRegressionModule, X[:, :1]) if atoms else (UncertaintyModule, LABELS)
    module = module_class(network, num_train_samples=num_train_samples)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loss = module.training_loss(X, y, (X, y))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    loss.backward()
    assert (gradient_of_each_member(network) > 0).all()
    if not atoms:
        outputs = network(X, torch.arange(M))
        expected = torch.stack([nn.functional.cross_entropy(output, LABELS) for output in outputs]).mean()
        torch.testing.assert_close(loss, expected)


def test_the_modules_built_around_plain_networks():
    ensemble = EnsembleModule(lambda: nn.Linear(2, 2), num_members=M)
    ensemble.training_loss(X, LABELS, (X, LABELS)).backward()
    assert (gradient_of_each_member(ensemble.network) > 0).all()
    single = DeterministicModule(nn.Linear(2, 2))
    loss = single.training_loss(X, LABELS, (X, LABELS))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(single.network.network(X), LABELS))


def test_an_infinite_set_is_drawn_from():
    module = EpinetModule(nn.Linear(2, 2), num_train_samples=3)
    drawn = []
    sample, module.network.sample_index = module.network.sample_index, lambda num: drawn.append(num) or sample(num)
    module.training_loss(X, LABELS, (X, LABELS))
    assert drawn == [3]


def test_the_number_of_indices_is_the_indexers():
    assert DeterministicNetwork(nn.Linear(2, 2)).num_indices == 1
    assert {NETWORKS[name]().num_indices for name in NETWORKS} == {M}


class OneOfSix(Indexer):
    """A finite set that a user wrote: nothing but its size and how it is drawn."""

    num_indices = 6

    def __call__(self, num_samples, generator=None):
        return torch.randint(6, (num_samples,), generator=generator)


class OffsetPerIndex(EpistemicNetwork):
    def __init__(self):
        super().__init__(OneOfSix())
        self.linear = nn.Linear(4, 2)
        self.offset = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x, index):
        return self.linear(x) + self.offset[index].unsqueeze(1)


def test_a_users_finite_set_is_enumerated():
    module = UncertaintyModule(OffsetPerIndex())
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    module.training_loss(x, y, (x, y)).backward()
    assert (module.network.offset.grad != 0).any(1).all()
    assert module.network.evaluation_index(100).tolist() == list(range(6))

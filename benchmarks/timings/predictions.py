"""Predictions of one batch of 1,000 rows: ensembles beside torch-uncertainty, and methods with an index beside one pass of their network."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Call, Contender, Work
from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    UncertaintyModule,
)
from lightning_uq.networks import MLP
from lightning_uq.networks.backbones import LeNet

TITLE = "Predictions of 1,000 rows"
ABOUT = """Probabilities [B, C] from inputs that are in memory. Z = 100 indices or M members; the perceptron has two hidden layers of 128 units, on
the 64 inputs of scikit-learn's digits. Ours are calls of `module.predict(x).probs`, with all checks. Predictions of few
members are the products of the plain loop, and the checks of the input and the output beside them. `products alone` are the products of matrices that no method can
leave out: with dropout each index has its own second and third layer, with Bayes by backprop all three."""

ROWS, INDICES = 1000, 100


def works(device: str) -> Iterator[Work]:
    """Each network, and each method with an index."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(ROWS, 64, generator=generator).to(device)
    images = torch.randn(ROWS, 1, 28, 28, generator=generator).to(device)
    perceptron, lenet = partial(MLP, 64, 10), partial(LeNet, num_classes=10)
    for name, network, x, members in [
        ("MLP, M = 5", perceptron, table, 5),
        ("MLP, M = 10", perceptron, table, 10),
        ("LeNet, M = 5", lenet, images, 5),
    ]:
        yield ensemble(name, network, x, members)
    one_pass = Contender(
        "one pass of the network", partial(ours, partial(DeterministicModule, perceptron()), table), agrees=False
    )
    with_dropout = MLP(64, 10, dropout=0.1)
    methods: dict[str, Callable[[], UncertaintyModule]] = {
        "epinet": partial(EpinetModule, perceptron(), num_eval_samples=INDICES),
        "dropout": partial(DropoutModule, with_dropout, num_eval_samples=INDICES),
        "Bayes by backprop": partial(BayesByBackpropModule, perceptron(), num_eval_samples=INDICES),
    }
    peers = {
        "dropout": Contender(
            "mc_dropout", partial(peer_dropout, with_dropout, table), "torch-uncertainty", agrees=False
        ),
        "Bayes by backprop": Contender("bayesian_mlp", partial(peer_bayes, table), "torch-uncertainty", agrees=False),
    }
    first = {"dropout": 1, "Bayes by backprop": 0}  # the first layer that differs between indices
    for name, build in methods.items():
        others = [peers[name]] if name in peers else []
        if name in first:
            others.append(Contender("products alone", partial(products, first[name], device), agrees=False))
        yield Work(
            f"MLP, {name}, Z = {INDICES}", [Contender("lightning-uq", partial(ours, build, table)), *others, one_pass]
        )


def ensemble(name: str, network: Callable[[], nn.Module], x: Tensor, members: int) -> Work:
    """Members with the same weights, by three implementations."""
    module = EnsembleModule(network, num_members=members, seed=0).to(x.device).eval()
    networks = module.network.unstacked().feature_networks()
    return Work(
        name,
        [
            Contender("lightning-uq", partial(ours, lambda: module, x)),
            Contender("deep_ensembles", partial(peer_ensemble, networks, x), "torch-uncertainty"),
            Contender("plain loop", partial(loop, networks, x)),
        ],
    )


def ours(build: Callable[[], UncertaintyModule], x: Tensor) -> Call:
    module = build().to(x.device)
    return lambda: module.predict(x).probs


def loop(networks: list[nn.Module], x: Tensor) -> Call:
    for network in networks:
        network.eval()
    return torch.no_grad()(lambda: torch.stack([network(x).softmax(-1) for network in networks]).mean(0))


def products(first: int, device: str) -> Call:
    """The products of a perceptron's layers from the one numbered ``first`` on, for all indices, eight at a time."""
    sizes, at_once = (64, 128, 128, 10), 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(at_once, ROWS, sizes[first], generator=generator).to(device)
    weights = [torch.randn(at_once, m, n, generator=generator).to(device) for m, n in itertools.pairwise(sizes[first:])]

    def call() -> Tensor:
        for start in range(0, INDICES, at_once):
            number = min(at_once, INDICES - start)
            values = x[:number]
            for weight in weights:
                values = values @ weight[:number]
        return torch.zeros(())

    return call


def peer_ensemble(networks: list[nn.Module], x: Tensor) -> Call:
    from torch_uncertainty.methods import deep_ensembles

    model = deep_ensembles(networks, task="classification").eval()
    return torch.no_grad()(lambda: pooled(model(x), len(networks)))


def peer_dropout(network: nn.Module, x: Tensor) -> Call:
    from torch_uncertainty.methods import mc_dropout

    model = mc_dropout(network, num_estimators=INDICES).to(x.device).eval()
    return torch.no_grad()(lambda: pooled(model(x), INDICES))


def peer_bayes(x: Tensor) -> Call:
    from torch_uncertainty.models.mlp import bayesian_mlp

    model = bayesian_mlp(64, 10, [128, 128], activation=torch.relu, num_samples=INDICES).to(x.device).eval()
    return torch.no_grad()(lambda: pooled(model(x), INDICES))


def pooled(outputs: Tensor, number: int) -> Tensor:
    """Mean probabilities [B, C] of outputs [Z B, C], as torch-uncertainty's routine makes them."""
    return outputs.unflatten(0, (number, -1)).softmax(-1).mean(0)

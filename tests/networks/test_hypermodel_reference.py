"""Hypermodels and Bayes by backprop held to the numbers of google-deepmind/enn: same weights, inputs and indices."""

from pathlib import Path

import pytest
import torch

from lightning_uq.compat.haiku import load_haiku, read_haiku
from lightning_uq.compat.haiku.generated import _haiku_order
from lightning_uq.errors import InputError
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.indexers import ScaledGaussianIndexer
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers

DATA = read_haiku(Path(__file__).parents[1] / "reference" / "enn_hypermodel.npz")
X, Z = DATA["x"], DATA["z"]


def under(prefix):
    return {name.removeprefix(prefix): value for name, value in DATA.items() if name.startswith(prefix)}


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def hypermodel(**kwargs):
    return HypermodelNetwork(MLP(3, 2, hidden_sizes=(4,)), indexer=ScaledGaussianIndexer(3), **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("lin", {}), ("lin_noscale", {"scale": False}), ("hid", {"hidden_sizes": (5,)})]
)
def test_hypermodels_and_the_weights_they_generate(name, kwargs):
    network = load_haiku(hypermodel(**kwargs), under(f"{name}/hyper_fn/"))
    weights = network.weights(Z)
    generated = under(f"{name}/generated_z0/mlp/~/")
    assert len(generated) == 4
    for i, layer in enumerate(("0", "2")):
        check(weights[f"{layer}.weight"][0], generated[f"linear_{i}/w"].T)
        check(weights[f"{layer}.bias"][0], generated[f"linear_{i}/b"])
    check(network(X, Z), DATA[f"{name}/out"])
    check(network.eval()(X, Z), DATA[f"{name}/out"])


def independent_layers():
    # The scalings are the file's, which does not name them: a fit of the four factors gives them to seven digits.
    prior = PriorIndependentLayers(3, 2, index_dim=3, hidden_sizes=(6,), weight_scaling=1.5, bias_scaling=0.7)
    return load_haiku(prior, under("indep_prior/"))


def test_the_prior_of_independent_layers():
    prior = independent_layers()
    assert not list(prior.parameters())
    check(2 * prior(X, Z), DATA["indep/prior_check"])


def test_a_hypermodel_with_it():
    network = hypermodel(scale=False, prior=independent_layers(), prior_scale=2.0, calibrate_prior=False)
    load_haiku(network, under("indep/hyper_fn/"))
    learned, scaled = network.learned_and_prior(X, Z)
    check(learned, DATA["indep/out_train"])
    check(scaled, DATA["indep/out_prior"])
    check(network(X, Z), DATA["indep/out_train"] + DATA["indep/out_prior"])


def test_bayes_by_backprop():
    network = BayesByBackpropNetwork(MLP(3, 2, hidden_sizes=(4,)), temperature=0.5)
    load_haiku(network, under("bbb/hyper_fn/"))
    # The file's index, and its draw, are in Haiku's order: the biases first, the weights [in, out].
    position = torch.cat([torch.arange(4, 16).reshape(3, 4).T.flatten(), torch.arange(4),
                          torch.arange(18, 26).reshape(4, 2).T.flatten(), torch.arange(16, 18)])  # fmt: skip
    index = DATA["bbb/z"][:, position]
    weights = network.weights_of_noise(index)
    check(torch.cat([part[0].flatten() for part in weights.values()]), DATA["bbb/u_z0"][position])
    check(network.call(X, weights), DATA["bbb/out"])


def test_bayes_by_backprop_starts_as_the_original():
    network = BayesByBackpropNetwork(MLP(3, 2, hidden_sizes=(4,)))
    check(network.std, torch.full((26,), 0.01))
    check(DATA["bbb/hyper_fn/diagonal_linear/w"], torch.full((26,), network.spread.start))


def test_haiku_sorts_layers_by_name():
    names = [f"{i}.{leaf}" for i in range(12) for leaf in ("weight", "bias")]
    order = [names[i] for i in _haiku_order(names)]
    assert order[:8] == ["0.bias", "0.weight", "1.bias", "1.weight", "10.bias", "10.weight", "11.bias", "11.weight"]
    assert order[8] == "2.bias"


def test_other_parameters_are_refused():
    params = under("lin/hyper_fn/")
    with pytest.raises(InputError, match=r"'linear_1/w' must have shape \[3, 15\], but its shape is \[3, 12\]"):
        load_haiku(
            HypermodelNetwork(MLP(3, 2, hidden_sizes=(5,)), indexer=ScaledGaussianIndexer(3)),
            params | {"linear/w": torch.zeros(3, 5)},
        )
    with pytest.raises(InputError, match="it has no place for linear_9/b"):
        load_haiku(hypermodel(), params | {"linear_9/b": torch.zeros(1)})
    with pytest.raises(InputError, match="must hold 'diagonal_linear/w', but it holds linear/w"):
        load_haiku(BayesByBackpropNetwork(MLP(3, 2, hidden_sizes=(4,))), params)
    conv = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    with pytest.raises(InputError, match="Only weights of linear layers"):
        load_haiku(BayesByBackpropNetwork(conv), {"diagonal_linear/w": torch.zeros(20)})

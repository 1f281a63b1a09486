"""Networks that read or learn from an index, held to the numbers of google-deepmind/enn."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_uq.compat.haiku import load_haiku, read_haiku
from lightning_uq.functional.atoms import two_hot
from lightning_uq.losses.categorical_regression import Cat2HotRegression
from lightning_uq.losses.gaussian import split_gaussian
from lightning_uq.networks.categorical_regression import CatMLPEnsemble
from lightning_uq.networks.ensemble import StackedEnsembleNetwork
from lightning_uq.networks.index_mlp import IndexMLP
from lightning_uq.networks.initializers import CUT_STD, variance_scaling_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.index_priors import ChoicePrior, RandomIndexMLP
from lightning_uq.networks.priors.random_features import RandomFeatureGP

REFERENCE = Path(__file__).parents[1] / "reference"


def read(name: str) -> dict[str, torch.Tensor]:
    return read_haiku(REFERENCE / f"enn_{name}.npz")


def under(arrays, prefix):
    """The Haiku parameters below a prefix."""
    found = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name.endswith(("/w", "/b"))}


def stacked(arrays, prefix, count):
    """Parameters of ``count`` networks, which are stored one by one, with an axis of members."""
    each = [under(arrays, f"{prefix}{i}/") for i in range(count)]
    return {name: torch.stack([params[name] for params in each]) for name in each[0]}


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_index_mlp_and_its_variance():
    data = read("misc_networks")
    network = IndexMLP(3, 2, index_dim=4, hidden_sizes=(6, 5), variance_dim=3, heads="gaussian")
    load_haiku(network, under(data, "index_mlp/"))
    mean, log_variance = network.mean_and_log_variance(data["x"], data["z"])
    check(mean, data["index_mlp/out"])
    check(log_variance, data["index_mlp/log_var"])
    ours, variance = split_gaussian(network(data["x"], data["z"]), min_variance=0.0)
    check(ours, data["index_mlp/out"])
    check(variance, data["index_mlp/log_var"].exp())


def test_index_mlp_of_a_classifier_has_the_same_logits_and_no_variance():
    data = read("misc_networks")
    network = IndexMLP(3, 2, index_dim=4, hidden_sizes=(6, 5))
    params = under(data, "index_mlp/concat_index_mlp/")
    load_haiku(network, {name: value for name, value in params.items() if name.startswith("linear")})
    check(network(data["x"], data["z"]), data["index_mlp/out"])


def test_random_features():
    data = read("misc_networks")
    prior = RandomFeatureGP(3, 2, num_features=11, gamma=1.7, scale=0.9)
    prior.weight, prior.bias, prior.alpha = data["rff/weights"], data["rff/bias"][0], data["rff/alpha"]
    check(prior(data["x"]), data["rff/out"])


def test_random_mlp_of_input_and_index():
    data = read("misc_networks")
    prior = RandomIndexMLP(3, 1, index_dim=4)
    load_haiku(prior, under(data, "randmlp/"))
    check(prior(data["x"], data["z"]), data["randmlp/out"])


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [2, 2, 0]])
def test_choice_via_index_of_matched_priors(index):
    data = read("ensembles")
    prior = load_haiku(
        ChoicePrior([MLP(6, 3, hidden_sizes=(6, 5)) for _ in range(4)]), stacked(data, "matched_prior", 4)
    )
    assert isinstance(prior.functions, StackedEnsembleNetwork)
    check(2 * prior(data["x"].flatten(1), torch.tensor(index)), data["matched/out_prior"][index])


def test_a_stacked_ensemble_takes_members_by_either_axis():
    data = read("ensembles")
    x = data["x"].flatten(1)
    network = StackedEnsembleNetwork([MLP(6, 3, hidden_sizes=(6, 5)) for _ in range(4)])
    check(load_haiku(network, under(data, "matched/"))(x), data["matched/out_train"])
    check(load_haiku(network, under(data, "einsum/"), member_axis=-1)(x), data["einsum/out_train"])
    priors = StackedEnsembleNetwork([MLP(6, 3, hidden_sizes=(6, 5)) for _ in range(4)])
    load_haiku(priors, under(data, "einsum_prior/"), member_axis=-1)
    check(2 * priors(x), data["einsum/out_prior"])


def categorical():
    data = read("categorical_regression")
    network = CatMLPEnsemble(6, data["cat/atoms"], num_members=3, hidden_sizes=(6,), prior_scale=1.5)
    load_haiku(network, under(data, "cat/"))
    load_haiku(network.prior, stacked(data, "cat_prior", 3))
    return data, network


def test_categorical_ensemble_with_its_prior():
    data, network = categorical()
    logits, prior = network.logits_and_prior(data["x"], torch.arange(3))
    check(logits, data["cat/out_train"])
    check(prior, data["cat/out_prior"])
    mean, variance = split_gaussian(network(data["x"], torch.arange(3)), min_variance=0.0)
    check(mean, data["cat/out_preds"])
    probs, atoms = data["cat/out_train"].softmax(-1), data["cat/atoms"]
    check(variance, (probs * atoms**2).sum(-1) - (probs * atoms).sum(-1) ** 2)


def test_two_hot_regression():
    data, network = categorical()
    loss = Cat2HotRegression(data["cat/atoms"], reduction="none")
    losses = loss(*network.logits_and_prior(data["x"], torch.arange(3))[:1], data["cat/y"], data["cat/out_prior"])
    check(losses.mean((1, 2)), data["cat/loss"])
    check(two_hot(data["cat/t2h_in"], data["cat/atoms"]), data["cat/t2h_out"])


def test_variance_scaling_has_haikus_spread():
    weight = variance_scaling_(torch.empty(2000, 100), mode="fan_avg", generator=torch.Generator().manual_seed(0))
    assert weight.std().item() == pytest.approx(float(read("initializers")["vs_fan_avg_std"]), rel=0.01)
    assert pytest.approx(0.87962566, abs=1e-7) == CUT_STD  # Haiku's constant
    prior = RandomIndexMLP(300, 1, index_dim=100, hidden_sizes=(500,), seed=0)
    assert prior.mlp[0].weight.std().item() == pytest.approx((3 / 400) ** 0.5, rel=0.01)
    assert prior.mlp[0].bias.std().item() == pytest.approx(0.1 * CUT_STD, rel=0.1)
    assert prior.mlp[0].bias.abs().max() <= 0.2
    assert isinstance(prior.mlp, nn.Sequential)

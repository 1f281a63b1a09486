"""Index MLP, noise MLP, priors on the index, centring and scaling: against their definitions."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.losses.gaussian import split_gaussian
from lightning_uq.networks import (
    MLP,
    AdditivePrior,
    CategoricalRegressionNetwork,
    CatMLPEnsemble,
    CenteredNetwork,
    ChoicePrior,
    DeterministicNetwork,
    EnsembleNetwork,
    EpistemicNetworkWithPrior,
    GaussianNoiseMLP,
    IndexMLP,
    NetworkWithPrior,
    NullFunction,
    RandomFeatureGP,
    RandomIndexMLP,
    ScaledNetwork,
    StackedEnsembleNetwork,
    gp_prior,
    index_mlp_with_gp_prior,
    truncated_normal_init_,
    variance_scaling_,
)

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def ensemble(outputs=3):
    return EnsembleNetwork([nn.Linear(4, outputs) for _ in range(5)])


NETWORKS = {
    "index_mlp": lambda: IndexMLP(4, 3, index_dim=5, hidden_sizes=(7, 6)),
    "index_mlp_gaussian": lambda: IndexMLP(4, 3, index_dim=5, hidden_sizes=(7,), heads="gaussian"),
    "index_mlp_gp": lambda: index_mlp_with_gp_prior(4, 3, num_priors=5, num_features=9),
    "index_mlp_gp_gaussian": lambda: index_mlp_with_gp_prior(4, 3, num_priors=5, num_features=9, heads="gaussian"),
    "noise": lambda: GaussianNoiseMLP(4, 3, hidden_sizes=(7, 6)),
    "choice": lambda: EpistemicNetworkWithPrior(
        ensemble(), ChoicePrior([nn.Linear(4, 3) for _ in range(5)]), scale=2.0
    ),
    "choice_gp": lambda: EpistemicNetworkWithPrior(ensemble(), ChoicePrior([RandomFeatureGP(4, 3) for _ in range(5)])),
    "random_mlp": lambda: EpistemicNetworkWithPrior(IndexMLP(4, 3, index_dim=5), RandomIndexMLP(4, 3, index_dim=5)),
    "cat_mlp": lambda: CatMLPEnsemble(4, torch.linspace(-2, 2, 9), num_outputs=2, num_members=5, hidden_sizes=(8,)),
    "cat_gp": lambda: CatMLPEnsemble(4, torch.linspace(-2, 2, 9), num_members=5, hidden_sizes=(8,), prior="gp"),
    "cat_of_noise": lambda: CategoricalRegressionNetwork(
        GaussianNoiseMLP(4, 9, hidden_sizes=(5,)), torch.linspace(-2, 2, 9)
    ),
    "centered": lambda: CenteredNetwork.from_data(ensemble(), X),
    "scaled": lambda: ScaledNetwork(ensemble(), 2.0),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract_of_an_epistemic_network(name, dtype):
    network = NETWORKS[name]().to(dtype)
    index = network.evaluation_index(8)
    x = X.to(dtype)
    output = network(x, index)
    assert output.shape[:2] == (network.num_indices or 8, 6)
    assert output.isfinite().all()
    assert output.std(0).float().max() > 0
    assert torch.equal(network(x, network.evaluation_index(8)), output)
    output.float().square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())  # none is unused, which DDP would refuse
    rows = torch.tensor([0, 2, 2])
    tolerance = 1e-5 if dtype != torch.bfloat16 else 5e-2
    torch.testing.assert_close(network(x, index[rows]), output[rows], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(network(x[3:4], index), output[:, 3:4], rtol=tolerance, atol=tolerance)
    assert network(x[:0], index).shape == (len(index), 0, output.shape[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_state_and_copies(name):
    network, other = NETWORKS[name](), NETWORKS[name]()
    index = network.evaluation_index(8)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(X, index), network(X, index))
    assert torch.equal(copy.deepcopy(network)(X, index), network(X, index))
    network.train()
    before = {n: b.clone() for n, b in network.named_buffers()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=1.0)
    network(X, index).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers())  # priors do not move
    assert not torch.equal(other(X, index), network(X, index))


@pytest.mark.parametrize("name", NETWORKS)
def test_images_are_flattened(name):
    network = NETWORKS[name]()
    if name in ("centered", "scaled", "choice", "choice_gp"):
        return  # their linear members take rows
    index = network.evaluation_index(3)
    torch.testing.assert_close(network(X.reshape(6, 2, 2), index), network(X, index))


# ---------------------------------------------------------------------------------------------------------- index MLP


@pytest.mark.parametrize("hidden_sizes", [(), (7,), (7, 6, 5)])
def test_index_mlp_by_its_definition(hidden_sizes):
    network = IndexMLP(4, 2, index_dim=3, hidden_sizes=hidden_sizes, variance_dim=5, heads="gaussian")
    for p in network.parameters():
        nn.init.normal_(p)
    index = network.sample_index(3)
    assert (index[:, 0] == 1).all()
    means, variances = split_gaussian(network(X, index), min_variance=0)
    for z, mean, variance in zip(index, means, variances, strict=True):
        h = before = X
        for layer in network.hidden:
            before, h = h, layer(torch.cat([h, z.expand(6, 3)], 1)).relu()
        log_variance = network.log_variance(torch.cat([before, network.projection(X).relu()], 1))
        torch.testing.assert_close(mean, network.last(h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance.log(), log_variance.clamp_max(80), rtol=1e-3, atol=1e-3)


def test_index_mlp_misuse():
    with pytest.raises(InputError, match=r"`index` must be \[Z, 5\], but its shape is \[5\]"):
        IndexMLP(4, 3, index_dim=5)(X, torch.zeros(5))
    with pytest.raises(InputError, match="`heads` must be 'gaussian' or None, but it is 'normal'"):
        IndexMLP(4, 3, heads="normal")
    with pytest.raises(InputError, match="`hidden_sizes` must be an integer of at least 1, but it is 0"):
        IndexMLP(4, 3, hidden_sizes=(4, 0))
    with pytest.raises(InputError, match="`index_dim` must be an integer of at least 2"):
        IndexMLP(4, 3, index_dim=1)


def test_the_gp_prior_goes_with_the_random_entries_and_moves_the_mean():
    network = index_mlp_with_gp_prior(4, 2, num_priors=3, prior_scale=0.7, heads="gaussian", seed=1)
    again = index_mlp_with_gp_prior(4, 2, num_priors=3, prior_scale=0.7, heads="gaussian", seed=1)
    index = network.sample_index(5)
    moved = network(X, index) - network.network(X, index)
    functions = list(network.prior.functions)[1:]
    expected = sum(0.7 * index[:, k + 1, None, None] * g(X) for k, g in enumerate(functions))
    torch.testing.assert_close(moved[..., :2], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[..., 2:], torch.zeros_like(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(network.prior(X, index), again.prior(X, index))
    assert not torch.equal(functions[0](X), functions[1](X))


# ---------------------------------------------------------------------------------------------------------- noise MLP


def test_noise_mlp_by_its_definition():
    network = GaussianNoiseMLP(4, 3, hidden_sizes=(7, 6), init_scale=0.5)
    assert all((scale == 0.5).all() for scale in network.noise_scales)
    for scale in network.noise_scales:
        nn.init.normal_(scale)
    index = network.sample_index(4)
    assert index.shape == (4, 16)
    for z, output in zip(index, network(X, index), strict=True):
        h = X
        for i, (layer, scale, eps) in enumerate(
            zip(network.layers, network.noise_scales, z.split([7, 6, 3]), strict=True)
        ):
            h = nn.functional.linear(h.relu() if i else h, layer.weight, layer.bias + scale * eps)
        torch.testing.assert_close(output, h, rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_an_mlp():
    network = GaussianNoiseMLP(4, 3, hidden_sizes=(7,), init_scale=0.0)
    output = network(X, network.sample_index(4))
    torch.testing.assert_close(output, output[:1].expand_as(output))
    with pytest.raises(InputError, match=r"`index` must be \[Z, 10\]"):
        network(X, torch.zeros(4, 9))
    for scale in (-1.0, float("nan")):
        with pytest.raises(InputError, match=f"`init_scale` must be a number of at least 0, but it is {scale}"):
            GaussianNoiseMLP(4, 3, init_scale=scale)


# ---------------------------------------------------------------------------------------------------------- priors


def test_random_features_have_the_kernels_covariance():
    x = torch.tensor([[0.0, 0.0], [0.6, -0.8], [3.0, 0.0]])
    prior = RandomFeatureGP(2, 4000, num_features=50, gamma=1.3, scale=2.0)
    prior.alpha = torch.full((50,), 50**-0.5)  # its signs are shared by the outputs; w and b alone are averaged here
    values = prior(x).double()
    values = values - values.mean(1, keepdim=True)
    covariance = values @ values.T / 4000
    expected = 2.0 * torch.exp(-(1.3**2) * torch.cdist(x, x).double().square() / 2)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.15)


def test_one_draw_is_shared_by_no_other_and_gamma_may_be_a_range():
    generator = torch.Generator().manual_seed(0)
    a, b = (RandomFeatureGP(4, 1, gamma=(0.5, 2.0), generator=generator) for _ in range(2))
    assert not torch.equal(a(X), b(X))
    assert a.gamma.min() >= 0.5
    assert a.gamma.max() <= 2
    assert a.gamma.std() > 0.1
    assert torch.equal(a(X), RandomFeatureGP(4, 1, gamma=(0.5, 2.0), generator=torch.Generator().manual_seed(0))(X))
    assert a.alpha.std().item() == pytest.approx(0.1, rel=0.3)
    for gamma in [(2.0, 1.0), "wide", float("nan"), (1.0, 2.0, 3.0), float("inf")]:
        with pytest.raises(InputError, match="`gamma` must be a number or a pair"):
            RandomFeatureGP(4, 1, gamma=gamma)
    with pytest.raises(InputError, match="`num_features` must be an integer of at least 1, but it is 0"):
        RandomFeatureGP(4, 1, num_features=0)


def test_random_features_keep_their_precision():
    prior = RandomFeatureGP(4, 2, gamma=30.0)
    full = prior(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(prior(X), full)
    cast = copy.deepcopy(prior).bfloat16()
    assert cast.weight.dtype == torch.float32
    rounded = X.bfloat16()
    torch.testing.assert_close(cast(rounded), prior(rounded.float()).bfloat16())
    assert prior.double()(X.double()).dtype == torch.float64


def test_random_features_on_a_plain_network():
    network = NetworkWithPrior(nn.Linear(4, 2), RandomFeatureGP(4, 2), scale=3.0)
    torch.testing.assert_close(network(X) - network.network(X), 3 * network.prior(X))


def test_gp_prior_is_linear_in_the_index():
    prior = gp_prior(4, 3, index_dim=5, seed=0)
    a, b = torch.randn(2, 7, 5)
    torch.testing.assert_close(prior(X, a + 2 * b), prior(X, a) + 2 * prior(X, b), rtol=1e-4, atol=1e-5)
    assert torch.equal(prior(X, a), gp_prior(4, 3, index_dim=5, seed=0)(X, a))
    zeros = AdditivePrior([NullFunction(3), nn.Linear(4, 3)])
    assert not zeros(X, torch.tensor([[4.0, 0.0]])).any()
    assert NullFunction(3)(torch.ones(2, 4, dtype=torch.long)).dtype == torch.float32


def test_choice_prior_picks_and_is_frozen():
    functions = [nn.Sequential(nn.Linear(4, 3), nn.Tanh()) for _ in range(4)]
    expected = torch.stack([f(X) for f in functions]).detach()
    prior = ChoicePrior(functions)
    torch.testing.assert_close(prior(X, torch.tensor([3, 0, 0])), expected[[3, 0, 0]])
    assert isinstance(prior.functions, StackedEnsembleNetwork)
    assert not list(prior.parameters())
    assert len(prior.state_dict()) == 8
    other = ChoicePrior([nn.Sequential(nn.Linear(4, 3), nn.Tanh()) for _ in range(4)])
    other.load_state_dict(prior.state_dict())
    torch.testing.assert_close(other(X, torch.arange(4)), expected)
    mixed = ChoicePrior([nn.Linear(4, 3), MLP(4, 3, hidden_sizes=(5,))])
    assert mixed.functions.execution == "loop"
    assert mixed(X, torch.tensor([1])).shape == (1, 6, 3)
    assert not mixed.train().training
    with pytest.raises(InputError, match="at least one module"):
        ChoicePrior([])
    with pytest.raises(InputError, match="member numbers in"):
        mixed(X, torch.tensor([2]))


def test_a_prior_of_an_epistemic_network_is_another():
    prior = IndexMLP(4, 3, index_dim=5)
    network = EpistemicNetworkWithPrior(IndexMLP(4, 3, index_dim=5), prior, scale=2.0)
    index = network.sample_index(4)
    torch.testing.assert_close(network(X, index), network.network(X, index) + 2 * prior(X, index))
    assert all(name.startswith("network.") for name, _ in network.named_parameters())
    assert network.train().network.training
    assert not network.prior.training
    x = X.clone().requires_grad_()
    (network(x, index) - network.network(x, index).detach()).sum().backward()
    assert x.grad.any()


def test_prior_misuse():
    with pytest.raises(
        InputError, match=r"`network` must be an EpistemicNetwork, but it is a Linear\. Wrap a plain network in"
    ):
        EpistemicNetworkWithPrior(nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.raises(InputError, match="`moves` must be 'output' or 'mean', but it is 'all'"):
        EpistemicNetworkWithPrior(ensemble(), gp_prior(4, 3, 5), moves="all")
    for scale in (-1.0, float("inf")):
        with pytest.raises(InputError, match=f"`scale` must be a number of at least 0, but it is {scale}"):
            EpistemicNetworkWithPrior(ensemble(), gp_prior(4, 3, 5), scale=scale)
        with pytest.raises(InputError, match=f"`prior_scale` must be a number of at least 0, but it is {scale}"):
            CatMLPEnsemble(4, [0.0, 1.0], prior_scale=scale)
    short = EpistemicNetworkWithPrior(ensemble(4), ChoicePrior([nn.Linear(4, 2) for _ in range(5)]))
    with pytest.raises(InputError, match=r"shape \[5, 6, 4\], but its shape is \[5, 6, 2\]"):
        short(X, torch.arange(5))
    with pytest.raises(InputError, match="`index_dim` must be an integer of at least 1"):
        RandomIndexMLP(4, index_dim=0)
    with pytest.raises(InputError, match="`bias_std` must be a number of at least 0, but it is -1"):
        RandomIndexMLP(4, bias_std=-1)
    with pytest.raises(InputError, match=r"`index` must be \[Z, 8\]"):
        RandomIndexMLP(4)(X, torch.zeros(3, 2))


def test_random_index_mlp_is_seeded_and_may_have_no_bias():
    a, b = (RandomIndexMLP(4, 2, index_dim=3, bias_std=0.0, seed=4) for _ in range(2))
    index = torch.randn(5, 3)
    assert torch.equal(a(X, index), b(X, index))
    assert not any(layer.bias.any() for layer in a.mlp if isinstance(layer, nn.Linear))
    expected = torch.stack([a.mlp(torch.cat([X, z.expand(6, 3)], 1)) for z in index])
    torch.testing.assert_close(a(X, index), expected)


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 200), ("fan_out", 400), ("fan_avg", 300)])
def test_variance_scaling(mode, fan):
    weight = variance_scaling_(torch.empty(100, 50, 2, 2), scale=3.0, mode=mode)
    assert weight.var().item() == pytest.approx(3 / fan, rel=0.05)


def test_variance_scaling_misuse():
    with pytest.raises(InputError, match="one of .*'fan_avg'.* but it is 'fan'"):
        variance_scaling_(torch.empty(2, 2), mode="fan")
    with pytest.raises(InputError, match=r"\[out, in, ...\], but its shape is \[2\]"):
        variance_scaling_(torch.empty(2))
    with pytest.raises(InputError, match="`scale` must be a number of at least 0, but it is -1"):
        variance_scaling_(torch.empty(2, 2), scale=-1)
    assert not variance_scaling_(torch.empty(2, 2), scale=0).any()


# ---------------------------------------------------------------------------------------------------------- categorical


def test_categorical_prior_may_be_left_out_and_seeded():
    atoms = torch.linspace(-2, 2, 9)
    plain = CatMLPEnsemble(4, atoms, num_members=3, prior=None)
    _, prior = plain.logits_and_prior(X, torch.arange(3))
    assert not prior.any()
    for kind in ("mlp", "gp"):
        a, b = (
            CatMLPEnsemble(4, atoms, num_outputs=2, num_members=3, prior=kind, prior_scale=1.5, seed=3)
            for _ in range(2)
        )
        priors = a.logits_and_prior(X, torch.arange(3))[1]
        assert torch.equal(priors, b.logits_and_prior(X, torch.arange(3))[1])
        torch.testing.assert_close(priors, 1.5 * a.prior(X, torch.arange(3)))
        assert priors.std(0).min() > 0


def test_categorical_atoms_survive_half_precision():
    atoms = torch.linspace(-1.234, 1.234, 33)
    network = CatMLPEnsemble(4, atoms, num_members=2).bfloat16()
    assert torch.equal(network.atoms, atoms)


def test_categorical_certainty_is_finite():
    network = CategoricalRegressionNetwork(DeterministicNetwork(nn.Linear(4, 3)), [0.0, 1.0, 2.0])
    network.network.network.weight.data.zero_()
    network.network.network.bias.data = torch.tensor([0.0, 1e4, 0.0])
    output = network(X, torch.tensor([0]))
    mean, variance = split_gaussian(output)
    assert (mean == 1).all()
    torch.testing.assert_close(variance, torch.full_like(variance, 1e-6), rtol=1e-3, atol=0)
    output.sum().backward()
    assert network.network.network.bias.grad.isfinite().all()


def test_categorical_misuse():
    with pytest.raises(InputError, match=r"return \[B, D x 4\], .* but its shape is \[6, 3\]"):
        CategoricalRegressionNetwork(ensemble(), [0.0, 1.0, 2.0, 3.0])(X, torch.arange(5))
    network = CategoricalRegressionNetwork(ensemble(), [0.0, 1.0, 2.0], prior=gp_prior(4, 2, 5))
    with pytest.raises(InputError, match=r"`index` must be"):
        network(X, torch.arange(5))
    network = CategoricalRegressionNetwork(ensemble(), [0.0, 1.0, 2.0], prior=ChoicePrior([nn.Linear(4, 2)] * 5))
    with pytest.raises(InputError, match=r"prior's output must have shape \[5, 6, 1\], but its shape is \[5, 6, 2\]"):
        network(X, torch.arange(5))
    with pytest.raises(InputError, match="`prior` must be 'mlp', 'gp' or None, but it is 'conv'"):
        CatMLPEnsemble(4, [0.0, 1.0], prior="conv")
    with pytest.raises(InputError, match="`num_members` must be an integer of at least 1, but it is 0"):
        CatMLPEnsemble(4, [0.0, 1.0], num_members=0)


# ---------------------------------------------------------------------------------------------------------- scaling


def test_centering_by_the_data():
    x = torch.randn(50, 2, 3, 3) * 4 + 7
    inner = DeterministicNetwork(nn.Flatten())
    centred = CenteredNetwork.from_data(inner, x)(x, torch.tensor([0]))[0]
    torch.testing.assert_close(centred.mean(0), torch.zeros(18), rtol=0, atol=1e-5)
    torch.testing.assert_close(centred.std(0, correction=0), torch.ones(18), rtol=1e-5, atol=0)
    expected = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-9)
    torch.testing.assert_close(centred, expected.flatten(1), rtol=1e-4, atol=1e-5)


def test_a_constant_feature_is_not_blown_up():
    network = CenteredNetwork.from_data(DeterministicNetwork(nn.Identity()), torch.tensor([[0.1, 1.0], [0.1, 3.0]]))
    torch.testing.assert_close(network(torch.tensor([[0.2, 2.0]]), torch.tensor([0])), torch.tensor([[[0.1, 0.0]]]))


def test_statistics_keep_their_precision_and_the_output_the_inputs():
    network = CenteredNetwork(
        DeterministicNetwork(nn.Identity()), torch.tensor([1234.5]), torch.tensor([1.0])
    ).bfloat16()
    assert network.standardize.mean.item() == 1234.5
    assert network(torch.ones(2, 1, dtype=torch.bfloat16), torch.tensor([0])).dtype == torch.bfloat16
    assert network(torch.ones(2, 1, dtype=torch.long), torch.tensor([0])).dtype == torch.float32


def test_wrappers_give_the_inner_networks_indices():
    for inner in (ensemble(), IndexMLP(4, 3, index_dim=5)):
        for network in (ScaledNetwork(inner, 2.0), CenteredNetwork(inner, torch.zeros(4), torch.ones(4))):
            assert network.num_indices == inner.num_indices
            assert torch.equal(network.evaluation_index(7, seed=3), inner.evaluation_index(7, seed=3))
            torch.manual_seed(1)
            drawn = network.sample_index(7)
            torch.manual_seed(1)
            assert torch.equal(drawn, inner.sample_index(7))
    assert ScaledNetwork(DeterministicNetwork(nn.Identity(), "probs"), 1.0).read_output.output == "probs"


@pytest.mark.parametrize("scale", [1e-4, 0.5, 1e5])
def test_scaled_regression_scales_means_and_variances(scale):
    raw = torch.tensor([[1.0, -2.0, -40.0, 3.0], [0.0, 5.0, 0.0, 100.0]])
    inner = DeterministicNetwork(nn.Identity())
    index = torch.tensor([0])
    mean, variance = split_gaussian(raw, min_variance=0)
    ours = split_gaussian(ScaledNetwork(inner, scale, heads="gaussian")(raw, index)[0], min_variance=0)
    torch.testing.assert_close(ours[0], mean * scale)
    torch.testing.assert_close(ours[1], variance * scale**2, rtol=1e-4, atol=0)
    torch.testing.assert_close(ScaledNetwork(inner, scale)(raw, index)[0], raw * scale)


def test_scaling_misuse():
    inner = ensemble()
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="`scale` must be a positive number"):
            ScaledNetwork(inner, scale)
    with pytest.raises(InputError, match="`heads` must be 'gaussian' or None"):
        ScaledNetwork(inner, 1.0, heads="mean")
    with pytest.raises(InputError, match=r"must have the same shape, but their shapes are \[4\] and \[3\]"):
        CenteredNetwork(inner, torch.zeros(4), torch.zeros(3))
    with pytest.raises(InputError, match="`std` must not be negative"):
        CenteredNetwork(inner, torch.zeros(1), torch.tensor([-1.0]))
    with pytest.raises(InputError, match=r"`x_train` must be \[N, ...\] with N at least 1, but its shape is \[0, 4\]"):
        CenteredNetwork.from_data(inner, torch.zeros(0, 4))
    assert truncated_normal_init_(nn.Linear(2, 2)).bias.sum() == 0

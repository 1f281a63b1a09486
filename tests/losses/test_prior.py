"""Losses on fake inputs, distillation and the VAE's, held to google-deepmind/enn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.compat.haiku import load_haiku
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.losses import (
    PriorLoss,
    binary_log_likelihood,
    distill_mean_classification,
    distill_mean_regression,
    distill_var_classification,
    distill_var_regression,
    gaussian_vae_log_likelihood,
    l2_training_penalty,
    latent_kl,
    variance_kl,
)
from lightning_uq.networks.base import DeterministicNetwork, EpistemicNetwork
from lightning_uq.networks.categorical_regression import CatMLPEnsemble
from lightning_uq.networks.ensemble import EnsembleNetwork, build_ensemble
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.features import OUTPUT
from lightning_uq.networks.index_mlp import index_mlp_with_gp_prior
from lightning_uq.networks.indexers import GaussianWithUnitIndexer
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.index_priors import ChoicePrior, EpistemicNetworkWithPrior
from lightning_uq.networks.priors.members import NetworkWithPrior
from lightning_uq.networks.priors.random_features import gp_prior
from lightning_uq.networks.scaling import CenteredNetwork, ScaledNetwork

DATA = {
    k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "reference/enn_losses_prior_vae.npz").items()
}
TRAIN, OUTPUTS = DATA["train"], DATA["train"] + DATA["prior"]
DISTILLED, LOG_VAR = DATA["distill_train"], DATA["distill_log_var"]


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the original's numbers


def test_penalty_and_distillation():
    check(l2_training_penalty(TRAIN), DATA["l2_training_penalty"])
    check(distill_mean_classification(OUTPUTS, DISTILLED), DATA["distill_mean_classification"])
    check(distill_var_regression(OUTPUTS[..., :1], LOG_VAR[:, :1]), DATA["distill_var_regression"])
    check(variance_kl(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, 0.3, -1.0])), DATA["variance_kl"])


def test_mean_of_regression_pairs_each_sample_with_itself():
    """The original, for targets of one dimension, pairs each sample with every other; its number follows from that."""
    output, distilled = OUTPUTS[..., :1], DISTILLED[:, :1]
    check((distilled.squeeze(1) - output.mean(0)).square().mean(), DATA["distill_mean_regression"])
    ours = distill_mean_regression(output, distilled)
    check(ours, (distilled - output.mean(0)).square().mean())
    assert (ours - DATA["distill_mean_regression"]).abs() > 0.01


def test_variance_of_classification_is_that_of_each_sample_and_class():
    """The original's is one variance over indices, samples and classes; its number follows from that, ours does not."""
    probs = OUTPUTS.softmax(-1)
    theirs = variance_kl(probs.var(correction=0).expand_as(LOG_VAR), LOG_VAR).mean()
    check(theirs, DATA["distill_var_classification"])
    ours = distill_var_classification(OUTPUTS, LOG_VAR)
    check(ours, variance_kl(probs.var(0, correction=0), LOG_VAR).mean())
    assert (ours - theirs).abs() > 0.1


def test_prior_loss_on_the_fake_inputs_and_indices_of_the_file(monkeypatch):
    network = EpinetNetwork(
        MLP(2, 3, hidden_sizes=(4,)),
        feature_layers=("0", "2", OUTPUT),
        num_outputs=3,
        head=EpinetHead(index_dim=2, hidden_sizes=(3,), standardize_features=False, calibrate_prior=False),
    )
    start = "pl/params/"
    load_haiku(network, {name.removeprefix(start): v for name, v in DATA.items() if name.startswith(start)})
    monkeypatch.setattr(network, "sample_index", lambda num, generator=None: DATA["pl/z"][:num])
    monkeypatch.setattr(torch, "randn_like", lambda x: DATA["pl/fake_x"].clone())
    loss = PriorLoss(scale=0.5, num_samples=7)(network, torch.zeros(8, 2))
    check(loss, DATA["pl/loss"])
    doubled = PriorLoss(scale=1.0, num_samples=7)(network, torch.zeros(8, 2))
    check(doubled, 2 * DATA["pl/loss"])


def test_variational_auto_encoder():
    mean, log_var = DATA["vae/mean"], DATA["vae/log_var"]
    check(binary_log_likelihood(DATA["vae/x_bin"], DATA["vae/logit"]), DATA["vae/binary_ll"])
    check(gaussian_vae_log_likelihood(DATA["vae/x_cont"], mean, log_var), DATA["vae/gaussian_ll"])
    check(latent_kl(mean, log_var), DATA["vae/latent_kl"])


# ---------------------------------------------------------------------- definitions and edges


def test_targets_of_one_dimension_are_not_paired_with_one_another():
    output, distilled = torch.randn(5, 8, 1), torch.randn(8, 1)
    expected = (distilled - output.mean(0)).square().mean()
    torch.testing.assert_close(distill_mean_regression(output, distilled), expected)
    with pytest.raises(InputError, match=r"`distilled` must have shape \[8, 1\], but its shape is \[8\]"):
        distill_mean_regression(output, distilled.squeeze(1))


def test_distillation_vanishes_where_it_is_done_and_points_there():
    logits = torch.randn(6, 4, 3, dtype=torch.float64)
    mean = logits.softmax(-1).mean(0).log()
    assert distill_mean_classification(logits, mean).item() == pytest.approx(0, abs=1e-12)
    var = logits.softmax(-1).var(0, correction=0).log()
    assert distill_var_classification(logits, var).item() == pytest.approx(0, abs=1e-12)
    assert distill_var_regression(logits, logits.var(0, correction=0).log()).item() == pytest.approx(0, abs=1e-12)
    distilled = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: distill_mean_classification(logits, d), distilled)
    assert torch.autograd.gradcheck(lambda v: distill_var_classification(logits, v), distilled)
    assert distill_mean_classification(logits, distilled) > 0


def test_extreme_values_stay_finite_and_dtypes_follow():
    sure = torch.tensor([[[200.0, -200.0]], [[200.0, -200.0]]])
    assert distill_mean_classification(sure, torch.zeros(1, 2)).isfinite()
    assert distill_var_classification(sure, torch.zeros(1, 2)).isfinite()  # a variance of zero
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert l2_training_penalty(TRAIN.to(dtype)).dtype == wide
        assert distill_mean_classification(OUTPUTS.to(dtype), DISTILLED.to(dtype)).dtype == wide
        assert binary_log_likelihood(DATA["vae/x_bin"].to(dtype), DATA["vae/logit"].to(dtype)).dtype == wide
        assert latent_kl(DATA["vae/mean"].to(dtype), DATA["vae/log_var"].to(dtype)).dtype == wide
    assert l2_training_penalty(torch.tensor([torch.nan])).isnan()
    assert latent_kl(torch.zeros(0, 2), torch.zeros(0, 2)).isnan()  # an empty batch
    assert binary_log_likelihood(torch.ones(1, 1), torch.full((1, 1), -1e5)).item() == -1e5


def test_vae_densities_are_torchs():
    x, mean, log_var = torch.randn(3, 5, 2, dtype=torch.float64).unbind(0)[0:3]
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    torch.testing.assert_close(gaussian_vae_log_likelihood(x, mean, log_var), normal.log_prob(x).sum(1).mean())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    torch.testing.assert_close(latent_kl(mean, log_var), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: variance_kl(torch.ones(2), torch.ones(3)),
            r"`log_variance` must have shape \[2\], but its shape is \[3\]",
        ),
        (
            lambda: distill_var_classification(TRAIN, LOG_VAR[0]),
            r"`log_variance` must have shape \[8, 3\], but its shape is \[3\]",
        ),
        (
            lambda: latent_kl(torch.ones(2, 3), torch.ones(2, 1)),
            r"`log_variance` must have shape \[2, 3\]",
        ),
        (
            lambda: binary_log_likelihood(torch.ones(2).long(), torch.ones(2)),
            r"`x` must be a floating-point tensor \[B, D\]",
        ),
        (lambda: l2_training_penalty(torch.ones(2).long()), r"`train` must be a floating-point tensor"),
        (lambda: PriorLoss(num_samples=0), r"`num_samples` must be an integer of at least 1, but it is 0"),
        (lambda: PriorLoss(scale=-1.0), r"`scale` must be at least 0, but it is -1.0"),
        (
            lambda: PriorLoss(distill="both"),
            r"`distill` must be one of 'classification', 'regression', but it is 'both'",
        ),
        (
            lambda: PriorLoss()(network(), torch.zeros(3, 2).long()),
            r"PriorLoss needs a floating-point tensor as input, but it is torch.int64",
        ),
        (
            lambda: PriorLoss()(network(), ["text"]),
            r"PriorLoss needs a floating-point tensor as input, but it is a list",
        ),
        (
            lambda: PriorLoss(distill="classification")(network(), torch.zeros(3, 2)),
            r"distill='classification' needs a network whose indexer has a `mean_index`, but that of DeterministicNetwork does not",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def network(inner=None):
    return DeterministicNetwork(inner or nn.Linear(2, 3))


def test_fake_inputs_move_no_statistics_and_modes_come_back():
    inner = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.Dropout(0.5))
    net = network(inner)
    inner[2].eval()  # a part that its owner keeps in eval mode
    state = {name: value.clone() for name, value in net.state_dict().items()}
    PriorLoss(num_samples=3)(net, torch.randn(5, 2)).backward()
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert net.training
    assert inner[0].training
    assert not inner[2].training
    assert inner[1].weight.grad is not None


def test_the_learned_part_alone_is_penalised_and_no_prior_is_calibrated():
    base = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    net = EpinetNetwork(base, head=EpinetHead(prior_scale=100.0))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    large = PriorLoss(num_samples=4)(net, torch.randn(6, 2))
    assert large < 10  # the prior's square would be thousands
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def zeroed(net):
    """Nothing is trained yet: all that its output has is priors."""
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: CenteredNetwork(net, torch.zeros(2), torch.ones(2)),
                                  lambda net: ScaledNetwork(net, 3.0)])  # fmt: skip
def test_additive_priors_are_not_penalised(wrap):
    members = EnsembleNetwork([nn.Linear(2, 3) for _ in range(4)])
    choice = EpistemicNetworkWithPrior(members, ChoicePrior([nn.Linear(2, 3) for _ in range(4)]), scale=50.0)
    for net in (choice, index_mlp_with_gp_prior(2, 3, prior_scale=50.0)):
        net = wrap(zeroed(net))
        x, index = torch.randn(5, 2), net.sample_index(6)
        assert net(x, index).abs().max() > 1
        assert PriorLoss(num_samples=8)(net, x).item() == 0
        learned, prior = net.learned_and_prior(x, index)
        torch.testing.assert_close(learned + prior, net(x, index))
        twice = EpistemicNetworkWithPrior(net, net_prior(net), scale=2.0)
        assert not twice.learned_and_prior(x, index)[0].any()


def net_prior(net):
    """Another prior for the indices of a network."""
    return (
        ChoicePrior([nn.Linear(2, 3) for _ in range(4)]) if net.num_indices else gp_prior(2, 3, net.indexer.index_dim)
    )


def test_the_parts_of_regression_networks_with_priors():
    x = torch.randn(5, 2)
    scaled = ScaledNetwork(index_mlp_with_gp_prior(2, 1, heads="gaussian", prior_scale=50.0), 3.0, heads="gaussian")
    for net in (CatMLPEnsemble(2, [-1.0, 0.0, 1.0], num_members=4, prior_scale=50.0), scaled):
        index = net.sample_index(6)
        learned, prior = net.learned_and_prior(x, index)
        torch.testing.assert_close(learned + prior, net(x, index))
        assert learned[..., 0].abs().max() < 20 < prior[..., 0].abs().max()
        torch.testing.assert_close(prior[..., 1], torch.zeros(6, 5), rtol=0, atol=1e-4)  # it moves no variance


@pytest.mark.parametrize("build", [EnsembleNetwork, build_ensemble])
def test_priors_inside_of_members_are_refused(build):
    net = build([NetworkWithPrior(nn.Linear(2, 3), nn.Linear(2, 3), 1.0) for _ in range(3)])
    with pytest.raises(UnsupportedError, match="the trained part cannot be separated"):
        PriorLoss()(net, torch.zeros(4, 2))
    assert net.training


def test_distillation_through_a_wrapper():
    net = index_mlp_with_gp_prior(2, 3, num_priors=4)
    assert torch.equal(net.indexer.mean_index, torch.eye(5)[0])
    plain, distilled = (
        PriorLoss(num_samples=20, distill=distill)(net, torch.randn(6, 2)) for distill in (None, "classification")
    )
    assert plain.isfinite()
    assert distilled.isfinite()


def test_inputs_have_the_batchs_shape_type_and_the_scale_asked_for():
    seen = []

    class Watching(DeterministicNetwork):
        def forward(self, x, index):
            seen.append(x)
            return super().forward(x, index)

    PriorLoss(input_scale=3.0)(Watching(nn.Linear(2, 3).double()), torch.zeros(4000, 2).double())
    (x,) = seen
    assert x.dtype == torch.float64
    assert x.shape == (4000, 2)
    assert x.std().item() == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("num_samples", [1, 5])
def test_all_members_of_an_ensemble_are_penalised(num_samples):
    ensemble = EnsembleNetwork([nn.Linear(2, 3) for _ in range(3)])
    loss = PriorLoss(num_samples=num_samples)(ensemble, torch.zeros(4, 2))
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in ensemble.parameters())


class Unit(EpistemicNetwork):
    """f(x, z) = (W x) . z with z = (1, normal): its mean over z is its value at the index of the mean, up to noise."""

    def __init__(self, num_outputs):
        super().__init__(GaussianWithUnitIndexer(4))
        self.linear = nn.Linear(2, num_outputs * 4)

    def forward(self, x, index):
        return torch.einsum("bcd,zd->zbc", self.linear(x).reshape(len(x), -1, 4), index)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_distillation_to_the_index_of_the_mean(task):
    net = Unit(2)
    torch.manual_seed(3)
    plain = PriorLoss(num_samples=50)(net, torch.zeros(6, 2))
    torch.manual_seed(3)
    both = PriorLoss(num_samples=50, distill=task)(net, torch.zeros(6, 2))
    torch.manual_seed(3)
    fake = torch.randn(6, 2)
    index = net.sample_index(50)
    output, distilled = net(fake, index), net(fake, net.indexer.mean_index[None])[0]
    if task == "classification":
        expected = distill_mean_classification(output, distilled)
    else:
        expected = distill_mean_regression(output[..., :1], distilled[..., :1])
    torch.testing.assert_close(both, plain + expected)
    assert expected > 0


def test_gaussian_heads_are_penalised_in_their_means_alone():
    network = DeterministicNetwork(nn.Linear(2, 4))
    with torch.no_grad():
        network.network.weight.zero_()
        network.network.bias.copy_(torch.tensor([2.0, 4.0, 7.0, 9.0]))  # two means, then two raw variances
    assert PriorLoss(heads="gaussian")(network, torch.zeros(5, 2)).item() == pytest.approx(0.5 * (4 + 16) / 2)
    assert PriorLoss()(network, torch.zeros(5, 2)).item() == pytest.approx(0.5 * (4 + 16 + 49 + 81) / 4)
    with pytest.raises(InputError, match="`heads`"):
        PriorLoss(heads="mean")

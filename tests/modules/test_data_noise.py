"""Modules that train with noise on the data, fixed by sample and index."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.data.indexed import Indexed, IndexedSample
from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import bootstrap_weights
from lightning_uq.functional.data_noise import (
    gaussian_bootstrap_weights,
    gaussian_signatures,
    gaussian_target_noise,
    member_target_noise,
)
from lightning_uq.losses import BootstrapNoise, DataNoise, GaussianTargetNoise, cross_entropy_loss
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.bayes_by_backprop import BayesByBackpropModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.modules.hypermodel import HypermodelModule
from lightning_uq.modules.targets import Targets
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.index_mlp import index_mlp_with_gp_prior
from lightning_uq.networks.indexers import (
    DirichletIndexer,
    EnsembleIndexer,
    GaussianIndexer,
    GaussianWithUnitIndexer,
    ScaledGaussianIndexer,
    SeedIndexer,
)
from lightning_uq.networks.scaling import CenteredNetwork

INDEXERS = [GaussianIndexer(6), ScaledGaussianIndexer(6), ScaledGaussianIndexer(6, 3.0), GaussianWithUnitIndexer(6)]
SAMPLE = torch.arange(300)


def mlp(d_out=3):
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, d_out))


def batch(n=12, regression=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    y = torch.randn(n, 1, generator=generator) if regression else torch.randint(3, (n,), generator=generator)
    index = torch.randperm(100, generator=generator)[:n]
    return IndexedSample(x, y, index)


# ---------------------------------------------------------------------- the objects


@pytest.mark.parametrize("indexer", INDEXERS, ids=repr)
def test_bootstrap_of_gaussian_indices(indexer):
    z = indexer(500)
    weights = BootstrapNoise("bernoulli", seed=3).weights(SAMPLE, z, indexer)
    b = gaussian_signatures(SAMPLE, 6, 3)
    assert torch.equal(weights, gaussian_bootstrap_weights(z, b, distribution=indexer.distribution))
    assert weights.mean().item() == pytest.approx(1, abs=0.05)
    if indexer.distribution != "unit":
        exponential = BootstrapNoise("exponential", seed=3).weights(SAMPLE, z, indexer)
        assert exponential.mean().item() == pytest.approx(1, abs=0.1)  # whatever the scale of the indices
        assert exponential.min() >= 0


@pytest.mark.parametrize("indexer", INDEXERS, ids=repr)
def test_target_noise_of_gaussian_indices(indexer):
    y = torch.zeros(300, 2)
    targets = GaussianTargetNoise(0.4).targets(y, SAMPLE, indexer(500), indexer)
    assert targets.shape == (500, 300, 2)
    assert targets.std().item() == pytest.approx(0.4, rel=0.1)
    assert torch.corrcoef(targets.flatten(0, 1).T)[0, 1].abs() < 0.1  # dimensions have noise of their own


@pytest.mark.parametrize("indexer", [EnsembleIndexer(5), SeedIndexer()], ids=repr)
def test_integer_indices(indexer):
    index = indexer(7)
    weights = BootstrapNoise("uniform", seed=1).weights(SAMPLE, index, indexer)
    assert torch.equal(weights, bootstrap_weights(SAMPLE, index, 1, "uniform"))
    noise = GaussianTargetNoise(0.1, seed=1).targets(torch.zeros(300, 2), SAMPLE, index, indexer)
    torch.testing.assert_close(noise, member_target_noise(SAMPLE, index, 0.1, 1, num_targets=2).float())


def test_what_indices_do_not_know_is_named():
    unit, dirichlet = GaussianWithUnitIndexer(6), DirichletIndexer([1.0, 2.0])
    with pytest.raises(InputError, match=r"`kind` must be 'bernoulli' for Gaussian indices of the distribution 'unit'"):
        BootstrapNoise("exponential").weights(SAMPLE, unit(3), unit)
    with pytest.raises(InputError, match=r"`kind` must be 'bernoulli' and 'exponential'.* but it is 'poisson'"):
        BootstrapNoise("poisson").weights(SAMPLE, torch.randn(2, 4), GaussianIndexer(4))
    for noise in (lambda i: BootstrapNoise().weights(SAMPLE, i, dirichlet),
                  lambda i: GaussianTargetNoise(0.1).targets(torch.zeros(300, 1), SAMPLE, i, dirichlet)):  # fmt: skip
        with pytest.raises(InputError, match=r"integers or come from a Gaussian indexer.*vectors of DirichletIndexer"):
            noise(dirichlet(3))
    with pytest.raises(InputError, match=r"vectors of None"):
        BootstrapNoise().weights(SAMPLE, torch.randn(2, 4))
    with pytest.raises(InputError, match=r"`kind` must be one of 'none', 'bernoulli'.*but it is 'jackknife'"):
        BootstrapNoise("jackknife")
    with pytest.raises(InputError, match=r"`std` must be a finite number of at least 0, but it is -1"):
        GaussianTargetNoise(-1)
    with pytest.raises(
        InputError, match=r"floating-point targets \[B, D\] of a regression.*torch.int64 of shape \[300\]"
    ):
        GaussianTargetNoise(0.1).targets(SAMPLE, SAMPLE, torch.arange(2))


def test_half_precision_empty_batches_and_frozen_targets():
    y, z = torch.randn(300, 1).bfloat16(), GaussianIndexer(4)(3)
    before = y.clone()
    noisy = GaussianTargetNoise(0.1).targets(y, SAMPLE, z.bfloat16(), GaussianIndexer(4))
    assert noisy.dtype == torch.float32
    assert torch.equal(y, before)
    assert GaussianTargetNoise(0.1).targets(y.double(), SAMPLE, torch.arange(2)).dtype == torch.float64
    none = torch.zeros(0, dtype=torch.long)
    assert GaussianTargetNoise(0.1).targets(torch.zeros(0, 1), none, z, GaussianIndexer(4)).shape == (3, 0, 1)
    assert BootstrapNoise("exponential").weights(none, z, GaussianIndexer(4)).shape == (3, 0)
    assert BootstrapNoise("none").weights(SAMPLE, z, GaussianIndexer(4)).unique().tolist() == [1.0]


# ---------------------------------------------------------------------- in training


def test_epinet_by_definition(monkeypatch):
    module = EpinetModule(mlp(), data_noise=BootstrapNoise("exponential", seed=2), num_train_samples=5)
    z = torch.randn(5, 8)
    monkeypatch.setattr(module.network, "sample_index", lambda num, generator=None: z[:num])
    module.eval()
    x, y, index = data = batch()
    b, c = (gaussian_signatures(index, 8, 2, stream=stream) for stream in (0, 1))
    weights = gaussian_bootstrap_weights(z, b, c, kind="exponential")
    expected = cross_entropy_loss(module.network(x, z), y, weights).mean()
    torch.testing.assert_close(module.training_loss(x, y, data), expected)
    torch.testing.assert_close(module.training_loss(x, y, {"input": x, "target": y, "index": index.int()}), expected)


def test_hypermodel_by_definition(monkeypatch):
    """Its index is scaled: the signatures are then not."""
    noise = BootstrapNoise("exponential", seed=2)
    module = HypermodelModule(mlp(), index_dim=8, data_noise=noise, num_train_samples=5)
    z = torch.randn(5, 8) / 8**0.5
    monkeypatch.setattr(module.network, "sample_index", lambda num, generator=None: z[:num])
    module.eval()  # the network drops units too
    x, y, index = data = batch()
    b, c = (gaussian_signatures(index, 8, 2, stream=stream) for stream in (0, 1))
    weights = gaussian_bootstrap_weights(z, b, c, kind="exponential", distribution="scaled")
    expected = cross_entropy_loss(module.network(x, z), y, weights).mean()
    torch.testing.assert_close(module.training_loss(x, y, data), expected)


def test_wrapped_networks_know_their_indices(monkeypatch):
    """The indices of a network around another are the inner one's."""
    x, y, index = data = batch()
    inner = HypermodelNetwork(nn.Linear(2, 3))
    with_prior = index_mlp_with_gp_prior(2, 3, num_priors=7)
    for network, dim in ((CenteredNetwork.from_data(inner, x), 8), (with_prior, 8)):
        module = UncertaintyModule(network, data_noise=BootstrapNoise(seed=2), num_train_samples=5).eval()
        z = network.sample_index(5)
        monkeypatch.setattr(network, "sample_index", lambda num, generator=None, z=z: z)
        weights = gaussian_bootstrap_weights(z, gaussian_signatures(index, dim, 2))
        torch.testing.assert_close(
            module.training_loss(x, y, data), cross_entropy_loss(network(x, z), y, weights).mean()
        )


def test_epinet_regression_by_definition(monkeypatch):
    module = EpinetModule(mlp(2), task="regression", data_noise=GaussianTargetNoise(0.5, seed=2), num_train_samples=5)
    z = torch.randn(5, 8)
    monkeypatch.setattr(module.network, "sample_index", lambda num, generator=None: z[:num])
    module.eval()
    x, y, index = data = batch(regression=True)
    targets = y + gaussian_target_noise(z, gaussian_signatures(index, 8, 2, stream=2), 0.5).unsqueeze(2)
    mean, variance = split_gaussian(module.network(x, z))
    expected = torch.stack([gaussian_nll_loss(mean[i], variance[i], targets[i]) for i in range(5)]).mean()
    torch.testing.assert_close(module.training_loss(x, y, data), expected)
    own = EpinetModule(
        mlp(2), task="regression", data_noise=module.data_noise, num_train_samples=5,
        loss=lambda output, y: gaussian_nll_loss(*split_gaussian(output), y),
    )  # fmt: skip
    own.load_state_dict(module.state_dict())
    monkeypatch.setattr(own.network, "sample_index", lambda num, generator=None: z[:num])
    torch.testing.assert_close(own.eval().training_loss(x, y, data), expected)


def test_ensemble_and_dropout_by_definition(monkeypatch):
    x, y, index = data = batch()
    ensemble = EnsembleModule(lambda: nn.Linear(2, 3), num_members=4, data_noise=BootstrapNoise("poisson", seed=9))
    weights = bootstrap_weights(index, 4, 9, "poisson")
    expected = cross_entropy_loss(ensemble.network(x), y, weights).sum()
    torch.testing.assert_close(ensemble.training_loss(x, y, data), expected)
    dropout = DropoutModule(mlp(), data_noise=BootstrapNoise("uniform"), num_train_samples=3)
    seeds = torch.tensor([5, 2**31 - 1, 0])
    monkeypatch.setattr(dropout.network, "sample_index", lambda num, generator=None: seeds)
    expected = cross_entropy_loss(dropout.network(x, seeds), y, bootstrap_weights(index, seeds, 0, "uniform")).mean()
    torch.testing.assert_close(dropout.training_loss(x, y, data), expected)


WEIGHT = torch.rand(12, generator=torch.Generator().manual_seed(2))


def weighted(**kwargs):
    x, y, index = batch(**kwargs)
    return x, y, {"input": x, "target": y, "index": index, "weight": WEIGHT}


def weighted_mean(outputs, y, noise=1.0):
    """sum_b w_b v_b l_b / sum_b w_b: a batch's own weights w normalise the loss, those of noise v do not. [Z]"""
    losses = torch.stack([nn.functional.cross_entropy(output, y, reduction="none") for output in outputs])
    return (WEIGHT * noise * losses).sum(1) / WEIGHT.sum()


def test_a_batchs_own_weights_by_definition(monkeypatch):
    x, y, data = weighted()
    ensemble = EnsembleModule(lambda: nn.Linear(2, 3), num_members=4)
    expected = weighted_mean(ensemble.network(x), y).sum()
    torch.testing.assert_close(ensemble.training_loss(x, y, data), expected)
    noisy = EnsembleModule(lambda: nn.Linear(2, 3), num_members=4, data_noise=BootstrapNoise("poisson", seed=9))
    expected = weighted_mean(noisy.network(x), y, bootstrap_weights(data["index"], 4, 9, "poisson")).sum()
    torch.testing.assert_close(noisy.training_loss(x, y, data), expected)
    epinet = EpinetModule(mlp(), num_train_samples=5).eval()
    z = torch.randn(5, 8)
    monkeypatch.setattr(epinet.network, "sample_index", lambda num, generator=None: z)
    torch.testing.assert_close(epinet.training_loss(x, y, data), weighted_mean(epinet.network(x, z), y).mean())


def test_a_sample_of_weight_zero_is_not_learnt_by_bayes_by_backprop(monkeypatch):
    x, y, data = weighted()
    module = BayesByBackpropModule(nn.Linear(2, 3), num_train=12, kl_weight=0.0)
    z = module.network.sample_index(8)
    monkeypatch.setattr(module.network, "sample_index", lambda num, generator=None: z)
    data["weight"] = torch.cat([torch.ones(6), torch.zeros(6)])
    half = {"input": x[:6], "target": y[:6]}
    torch.testing.assert_close(module.training_loss(x, y, data), module.training_loss(x[:6], y[:6], half))


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (
            torch.tensor([1.0, float("nan")] * 6),
            "`weight` of a batch must be finite and at least 0, but it holds (nan|-1)",
        ),
        (-torch.ones(12), "`weight` of a batch must be finite and at least 0, but it holds (nan|-1)"),
        (torch.ones(11), "`weight` of a batch must hold 12 numbers, one per sample, but it holds 11"),
        (
            torch.ones(12, 1),
            r"`weight` of a batch must be numbers \[B\], one per sample, but it is torch.float32 of shape \[12, 1\]",
        ),
        ([1.0] * 12, r"`weight` of a batch must be numbers \[B\], one per sample, but it is list"),
    ],
)
def test_weights_that_are_none(weight, match):
    x, y, data = weighted()
    with pytest.raises(InputError, match=match):
        EnsembleModule(lambda: nn.Linear(2, 3), num_members=2).training_loss(x, y, {**data, "weight": weight})


def test_losses_that_cannot_be_weighted_say_so():
    x, y, data = weighted()
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        module = DeterministicModule(nn.Linear(2, 3), loss=loss)
        with pytest.raises(
            InputError, match=r"returned shape \[\], but .* need one loss each: \[12\].*reduction='none'"
        ):
            module.training_loss(x, y, data)
    module.loss = nn.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(module.training_loss(x, y, data), weighted_mean(module.network(x, torch.zeros(1)), y)[0])


def test_an_ensembles_bootstrap_is_the_noise_of_its_seed_and_both_multiply():
    x, y, index = data = batch()

    def plain():
        return nn.Linear(2, 3)

    for kind in ("bernoulli", "uniform"):
        named = EnsembleModule(plain, num_members=3, bootstrap=kind, seed=4)
        noise = EnsembleModule(plain, num_members=3, data_noise=BootstrapNoise(kind, seed=4), seed=4)
        torch.testing.assert_close(named.training_loss(x, y, data), noise.training_loss(x, y, data))
    both = EnsembleModule(plain, num_members=3, bootstrap="poisson", data_noise=BootstrapNoise("uniform"), seed=4)
    weights = both.targets(y, data, torch.arange(3)).noise_weights
    assert torch.equal(weights, bootstrap_weights(index, 3, 4, "poisson") * bootstrap_weights(index, 3, 0, "uniform"))


def test_randomised_targets_of_an_adversarially_trained_ensemble():
    noise = GaussianTargetNoise(0.3)
    module = EnsembleModule(
        lambda: nn.Linear(2, 2), num_members=3, task="regression", data_noise=noise,
        adversarial_epsilon=0.1, adversarial_scale="absolute",
    )  # fmt: skip
    x, y, index = data = batch(regression=True)
    targets = noise.targets(y, index, torch.arange(3))
    clean = module.index_losses(module.network(x), Targets(targets, of_each_index=True)).sum()
    assert module.training_loss(x, y, data) > clean  # the step of the second half raises the loss


class Watched(DataNoise):
    """Remembers what it was asked for."""

    def __init__(self):
        self.inner, self.seen = BootstrapNoise("exponential", seed=1), {}

    def weights(self, sample, index, indexer=None):
        weights = self.inner.weights(sample, index, indexer)
        for row, i in enumerate(sample.tolist()):
            self.seen.setdefault(i, []).append(weights[:, row])
        return weights


def test_weights_are_the_same_in_every_epoch_and_order(make_trainer):
    x, y, _ = batch(20)
    watched = Watched()
    module = EnsembleModule(lambda: nn.Linear(2, 3), num_members=3, data_noise=watched)
    data = DataLoader(Indexed(TensorDataset(x, y)), batch_size=6, shuffle=True)
    make_trainer(max_epochs=3).fit(module, data, DataLoader(data.dataset, batch_size=6))
    assert sorted(watched.seen) == list(range(20))
    for rows in watched.seen.values():
        assert len(rows) == 3  # once an epoch, and never in validation
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])


def test_batches_without_positions_are_refused(make_trainer):
    x, y, _ = batch()
    module = EpinetModule(mlp(), data_noise=BootstrapNoise())
    with pytest.raises(
        InputError,
        match=r"data_noise=BootstrapNoise\(kind='bernoulli', seed=0\).*needs the samples. positions.*data\.Indexed",
    ):
        make_trainer().fit(module, DataLoader(TensorDataset(x, y), batch_size=6))
    make_trainer().fit(module, DataLoader(Indexed(TensorDataset(x, y)), batch_size=6))


def test_labels_bear_no_noise_and_lightning_members_none_at_all():
    for build in (
        lambda: EpinetModule(mlp(), data_noise=GaussianTargetNoise(0.1)),
        lambda: EnsembleModule(lambda: nn.Linear(2, 3), num_members=2, data_noise=GaussianTargetNoise(0.1)),
    ):
        with pytest.raises(
            InputError,
            match=r"`data_noise` must leave the targets of Classification\(\) unchanged, but GaussianTargetNoise",
        ):
            build()
    with pytest.raises(InputError, match=r"`data_noise` must be left out if members are LightningModules"):
        EnsembleModule(BoringModel, num_members=2, data_noise=BootstrapNoise())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_precision(precision, task, make_trainer):
    regression = task == "regression"
    x, y, _ = batch(20, regression)
    data = DataLoader(Indexed(TensorDataset(x, y)), batch_size=10)
    noise = GaussianTargetNoise(0.1) if regression else BootstrapNoise("exponential")
    sizes = {}
    module = EpinetModule(mlp(2 if regression else 3), task=task, data_noise=noise, num_train_samples=3, **sizes)
    before = [p.detach().clone() for p in module.parameters()]
    make_trainer(precision=precision).fit(module, data)
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(not torch.equal(a.to(b.dtype), b) for a, b in zip(before, module.parameters(), strict=True))


class Members(EpistemicNetwork):
    """A finite set, all of which a training step takes."""

    def __init__(self):
        super().__init__(EnsembleIndexer(4))
        self.heads = nn.Linear(2, 12)

    def sample_index(self, num_samples, generator=None):
        raise AssertionError("a finite set is not drawn from")

    def forward(self, x, index):
        return self.heads(x).reshape(len(x), 4, 3).transpose(0, 1)[index]


@pytest.mark.parametrize("num_train_samples", [1, 3, 9])
def test_all_members_are_trained_with_their_own_weights(num_train_samples):
    module = UncertaintyModule(Members(), data_noise=BootstrapNoise("poisson"), num_train_samples=num_train_samples)
    x, y, index = data = batch()
    weights = bootstrap_weights(index, 4, 0, "poisson")
    expected = cross_entropy_loss(module.network(x, torch.arange(4)), y, weights).mean()
    torch.testing.assert_close(module.training_loss(x, y, data), expected)

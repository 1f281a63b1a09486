"""Where the features of an epistemic network are: its own answer, also through wrappers, and a density fitted on them."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_uq as uq
from lightning_uq.errors import UnsupportedError
from lightning_uq.networks import (
    AdditivePrior,
    BayesByBackpropNetwork,
    CategoricalRegressionNetwork,
    CenteredNetwork,
    ChoicePrior,
    DeterministicNetwork,
    DropoutNetwork,
    EnsembleNetwork,
    EpinetNetwork,
    EpistemicNetwork,
    EpistemicNetworkWithPrior,
    GaussianIndexer,
    GaussianNoiseMLP,
    HypermodelNetwork,
    IndexMLP,
    NetworkWithPrior,
    ScaledNetwork,
    StackedEnsembleNetwork,
    VmapEnsembleNetwork,
)

X = 3 + 2 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 2


def plain():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def with_dropout():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


# What holds the features, and the name of their layer in it.
SOURCES = {
    "deterministic": (lambda: DeterministicNetwork(plain()), "2"),
    "loop": (lambda: EnsembleNetwork([plain() for _ in range(3)]), "2"),
    "stacked": (lambda: StackedEnsembleNetwork([plain() for _ in range(3)]), "2"),
    "vmap": (lambda: VmapEnsembleNetwork([plain() for _ in range(3)]), "2"),
    "members with priors": (lambda: EnsembleNetwork([NetworkWithPrior(plain(), plain(), 1.0) for _ in range(3)]), "2"),
    "stacked with priors": (
        lambda: StackedEnsembleNetwork([NetworkWithPrior(plain(), plain(), 1.0) for _ in range(3)]),
        "2",
    ),
    "dropout": (lambda: DropoutNetwork(with_dropout()), "3"),
    "epinet": (lambda: EpinetNetwork(plain()), "2"),
}


def prior_for(network):
    functions = [nn.Linear(2, 2) for _ in range(network.num_indices or 8)]
    return ChoicePrior(functions) if network.num_indices else AdditivePrior(functions)


WRAPPERS = {
    "itself": lambda network: network,
    "centered": lambda network: CenteredNetwork.from_data(network, X),
    "scaled": lambda network: ScaledNetwork(network, 0.5),
    "centered and scaled": lambda network: ScaledNetwork(CenteredNetwork.from_data(network, X), 0.5),
}


def expected_features(network, x):
    """By the definition: the layer's input in each plain network, called by itself."""
    return torch.stack([inner[:-1].eval()(x) for inner in network.feature_networks()])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_density_is_fitted_on_the_features_of_the_networks_inside(source, wrapper):
    make, layer = SOURCES[source]
    network = WRAPPERS[wrapper](make())
    module = uq.UncertaintyModule(network).eval()
    callback = uq.FitGMM(regularization=1e-2)
    callback.fit(module, [(X, Y)])
    assert callback.features.resolved == layer
    inputs = (X - X.mean(0)) / X.std(0, correction=0) if "centered" in wrapper else X
    features = callback.features(module, (X, Y))
    torch.testing.assert_close(features, expected_features(network, inputs))
    assert len(features) == (3 if network.num_indices == 3 else 1)


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "dropout"])
def test_a_prior_on_the_index_leaves_the_features_alone(source):
    network = SOURCES[source][0]()
    module = uq.UncertaintyModule(EpistemicNetworkWithPrior(network, prior_for(network), scale=5.0)).eval()
    callback = uq.FitGMM(regularization=1e-2)
    callback.fit(module, [(X, Y)])
    torch.testing.assert_close(callback.features(module, (X, Y)), expected_features(network, X))


@pytest.mark.parametrize("kind", [EnsembleNetwork, StackedEnsembleNetwork])
def test_a_network_whose_forward_is_not_called_as_a_whole(kind):
    """CategoricalRegressionModule asks its network for logits and prior: the features are those of the members inside."""
    members = kind([nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5)) for _ in range(3)])
    module = uq.CategoricalRegressionModule(CategoricalRegressionNetwork(members, torch.linspace(-2, 2, 5))).eval()
    callback = uq.FitKNN()
    assert callback.features(module, (X, Y)).shape == (3, 40, 4)
    torch.testing.assert_close(callback.features(module, (X, Y)), expected_features(members, X))


@pytest.mark.parametrize(
    "make",
    [
        lambda: HypermodelNetwork(plain()),
        lambda: BayesByBackpropNetwork(plain()),
        lambda: IndexMLP(2, 2),
        lambda: CenteredNetwork.from_data(GaussianNoiseMLP(2, 2), X),
    ],
)
def test_a_network_without_features_says_so(make):
    with pytest.raises(
        UnsupportedError, match="no plain inner network whose features could be read. If it has one, override"
    ):
        uq.FitGMM().fit(uq.UncertaintyModule(make()), [(X, Y)])


class UsersNetwork(EpistemicNetwork):
    """A network of a user's own, which names the part with the features."""

    def __init__(self):
        super().__init__(GaussianIndexer(2))
        self.body = plain()

    def forward(self, x, index):
        return self.body(x) + index.unsqueeze(1)

    def feature_networks(self):
        return [self.body]


def test_a_users_network_names_its_own():
    network = UsersNetwork()
    module = uq.UncertaintyModule(CenteredNetwork.from_data(network, X)).eval()
    callback = uq.FitGMM(regularization=1e-2)
    callback.fit(module, [(X, Y)])
    inputs = (X - X.mean(0)) / X.std(0, correction=0)
    torch.testing.assert_close(callback.features(module, (X, Y)), expected_features(network, inputs))


def test_a_predict_fn_may_call_the_inner_network_by_itself():
    module = uq.UncertaintyModule(DeterministicNetwork(plain())).eval()
    callback = uq.FitGMM(regularization=1e-2, predict_fn=lambda model, x: model.network.network(x).unsqueeze(0))
    callback.fit(module, [(X, Y)])
    torch.testing.assert_close(callback.features(module, (X, Y)), expected_features(module.network, X))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("source", ["deterministic", "loop", "stacked", "dropout", "epinet"])
def test_a_loaded_file_scores_as_the_callback(source, wrapper, make_trainer, tmp_path):
    def build():
        return uq.UncertaintyModule(
            WRAPPERS[wrapper](SOURCES[source][0]()), num_eval_samples=5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )

    module, callback = build(), uq.FitGMM(regularization=1e-2, weights="last")
    trainer = make_trainer(callbacks=[callback, ModelCheckpoint(dirpath=tmp_path)], enable_checkpointing=True)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=20))
    score = uq.load_fitted(tmp_path / "uq-last.ckpt", build())(X)["ood_score"]
    torch.testing.assert_close(score, callback.score(module, [X]))

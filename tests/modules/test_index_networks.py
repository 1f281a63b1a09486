"""Every network over an index trains, validates, tests and predicts in the module that all methods share."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import CategoricalPrediction, GaussianMixturePrediction, UncertaintyModule
from lightning_uq.errors import InputError
from lightning_uq.networks import (
    MLP,
    CatMLPEnsemble,
    CenteredNetwork,
    ChoicePrior,
    EnsembleNetwork,
    EpistemicNetworkWithPrior,
    Factory,
    GaussianNoiseMLP,
    IndexMLP,
    RandomFeatureGP,
    RandomIndexMLP,
    ScaledNetwork,
    gp_prior,
    index_mlp_with_gp_prior,
)

X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1))
LABELS = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TARGETS = X[:, :1] - 0.5 * X[:, 1:2]
ADAM = functools.partial(torch.optim.Adam, lr=0.02)


def members(outputs):
    return EnsembleNetwork([MLP(4, outputs, hidden_sizes=(16,)) for _ in range(3)])


CLASSIFIERS = {
    "index_mlp": lambda: IndexMLP(4, 3, hidden_sizes=(32,)),
    "index_mlp_gp": lambda: index_mlp_with_gp_prior(4, 3, num_priors=5, hidden_sizes=(32,), prior_scale=0.5),
    "noise": lambda: GaussianNoiseMLP(4, 3, hidden_sizes=(32,), init_scale=0.2),
    "choice": lambda: EpistemicNetworkWithPrior(members(3), ChoicePrior([RandomFeatureGP(4, 3) for _ in range(3)])),
    "linear": lambda: EpistemicNetworkWithPrior(
        IndexMLP(4, 3, index_dim=5, hidden_sizes=(32,)), gp_prior(4, 3, 5), scale=0.5
    ),
    "random_mlp": lambda: EpistemicNetworkWithPrior(
        IndexMLP(4, 3, index_dim=5, hidden_sizes=(32,)), RandomIndexMLP(4, 3, index_dim=5), scale=0.5
    ),
    "centered": lambda: CenteredNetwork.from_data(members(3), X),
    "scaled": lambda: ScaledNetwork(IndexMLP(4, 3, hidden_sizes=(32,)), 2.0),
}
REGRESSORS = {
    "index_mlp": lambda: IndexMLP(4, 1, hidden_sizes=(32,), heads="gaussian"),
    "index_mlp_gp": lambda: index_mlp_with_gp_prior(
        4, 1, num_priors=5, hidden_sizes=(32,), prior_scale=0.5, heads="gaussian"
    ),
    "noise": lambda: GaussianNoiseMLP(4, 2, hidden_sizes=(32,), init_scale=0.2),
    "choice": lambda: EpistemicNetworkWithPrior(
        members(2), ChoicePrior([nn.Linear(4, 1) for _ in range(3)]), moves="mean"
    ),
    "categorical": lambda: CatMLPEnsemble(4, torch.linspace(-6, 6, 31), num_members=3, hidden_sizes=(32,)),
    "centered": lambda: CenteredNetwork.from_data(members(2), X),
    "scaled": lambda: ScaledNetwork(members(2), 2.0, heads="gaussian"),
}


def loader(y) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=12)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification(make_trainer, name):
    module = UncertaintyModule(CLASSIFIERS[name](), optimizer=ADAM, num_train_samples=8, num_eval_samples=40)
    trainer = make_trainer(max_epochs=25)
    trainer.fit(module, loader(LABELS), loader(LABELS))
    (result,) = trainer.test(module, loader(LABELS), verbose=False)
    assert result["test_accuracy"] > 0.8
    assert torch.isfinite(torch.tensor(list(result.values()))).all()
    assert {"test_nll", "test_ece", "test_brier", "test_joint_log_loss"} <= set(result)
    assert result == trainer.test(module, loader(LABELS), verbose=False)[0]
    prediction = CategoricalPrediction.cat(trainer.predict(module, loader(LABELS)))
    assert prediction.mutual_information.max() > 0


@pytest.mark.parametrize("name", REGRESSORS)
def test_regression(make_trainer, name):
    module = UncertaintyModule(
        REGRESSORS[name](), task="regression", optimizer=ADAM, num_train_samples=8, num_eval_samples=40
    )
    trainer = make_trainer(max_epochs=25)
    trainer.fit(module, loader(TARGETS), loader(TARGETS))
    (result,) = trainer.test(module, loader(TARGETS), verbose=False)
    assert result["test_rmse"] < 0.7
    assert torch.isfinite(torch.tensor(list(result.values()))).all()
    prediction = GaussianMixturePrediction.cat(trainer.predict(module, loader(TARGETS)))
    assert (prediction.epistemic_variance > 0).all()


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "bf16-true") for name in CLASSIFIERS), ("index_mlp_gp", "bf16-mixed"), ("index_mlp_gp", "64-true")],
)
def test_precision(make_trainer, name, precision):
    module = UncertaintyModule(CLASSIFIERS[name](), optimizer=ADAM, num_eval_samples=5)
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(module, loader(LABELS), loader(LABELS))
    (result,) = trainer.test(module, loader(LABELS), verbose=False)
    assert torch.isfinite(torch.tensor(list(result.values()))).all()


@pytest.mark.parametrize("name", ["index_mlp_gp", "noise", "choice"])
def test_compiled_and_exported(name):
    network = CLASSIFIERS[name]().eval()
    index = network.evaluation_index(5)
    expected = network(X, index)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager")(X, index), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(network, (X, index), strict=False).module()
    torch.testing.assert_close(exported(X, index), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_factory_loads_bare(make_trainer, tmp_path):
    sizes = {"in_features": 4, "out_features": 3, "num_priors": 5, "hidden_sizes": [8]}
    network = Factory("lightning_uq.networks.index_mlp_with_gp_prior", sizes)
    module = UncertaintyModule(network, num_train_samples=4, num_eval_samples=7)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(LABELS))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = UncertaintyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    assert (again.task, again.num_train_samples, again.num_eval_samples) == (module.task, 4, 7)
    assert torch.equal(again(X), module.eval()(X))


def test_a_built_network_has_to_be_passed_again(make_trainer, tmp_path):
    module = UncertaintyModule(IndexMLP(4, 3), num_eval_samples=7)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(LABELS))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"Pass it to `load_from_checkpoint\(path, network=...\)`"):
        UncertaintyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = UncertaintyModule.load_from_checkpoint(tmp_path / "last.ckpt", network=IndexMLP(4, 3), weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))  # with as many indices


def test_a_plain_network_is_refused():
    with pytest.raises(
        InputError,
        match="`network` must be an EpistemicNetwork, or a factory of one, but it is a Linear. Use Deterministic",
    ):
        UncertaintyModule(nn.Linear(4, 3))

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import CategoricalRegressionModule, GaussianMixturePrediction
from lightning_uq.callbacks.ood import OODDetection
from lightning_uq.errors import InputError
from lightning_uq.losses import BootstrapNoise, GaussianTargetNoise, L2WeightDecay
from lightning_uq.losses.categorical_regression import categorical_regression_loss, split_atoms
from lightning_uq.modules.targets import Targets
from lightning_uq.networks import CategoricalRegressionNetwork, CatMLPEnsemble, Factory, GaussianNoiseMLP

GENERATOR = torch.Generator().manual_seed(1)
X = torch.rand(70, 1, generator=GENERATOR) * 2 - 1
Y = (2 * X).sin() + 0.1 * torch.randn(70, 1, generator=GENERATOR)
ATOMS = torch.linspace(-3, 3, 31).tolist()
SIZES = {"in_features": 1, "atoms": ATOMS, "num_members": 4, "hidden_sizes": [30]}
NETWORK = Factory("lightning_uq.networks.CatMLPEnsemble", SIZES)
ADAM = functools.partial(torch.optim.Adam, lr=0.02)


def loader(x=X, y=Y) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=35)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_it_learns(make_trainer, precision):
    module = CategoricalRegressionModule(NETWORK, optimizer=ADAM)
    trainer = make_trainer(max_epochs=60, precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_rmse"] < 0.25
    assert {"test_loss", "test_nll", "test_crps", "test_coverage_95"} <= set(result)
    assert result["test_coverage_95"] > 0.9
    (again,) = trainer.test(module, loader(), verbose=False)
    assert result == again


def test_its_predictions_disagree_where_no_data_spoke(make_trainer):
    module = CategoricalRegressionModule(Factory(NETWORK.target, {**SIZES, "prior_scale": 3.0}), optimizer=ADAM)
    trainer = make_trainer(max_epochs=60)
    trainer.fit(module, loader())
    prediction = GaussianMixturePrediction.cat(trainer.predict(module, loader()))
    assert prediction.member_mean.shape == (4, 70, 1)
    far = module.predict(torch.tensor([[6.0], [-6.0]]))
    assert far.epistemic_variance.min() > 10 * prediction.epistemic_variance.mean()


def test_its_numbers_are_the_distributions():
    module = CategoricalRegressionModule(NETWORK).eval()
    output = module(X)
    assert output.shape == (4, 70, 32)
    logits, prior = module.network.logits_and_prior(X, torch.arange(4))
    probs, atoms = logits.softmax(-1), torch.tensor(ATOMS)
    prediction = module.prediction(output)
    torch.testing.assert_close(prediction.member_mean, (probs * atoms).sum(-1) + prior)
    spread = ((atoms - (probs * atoms).sum(-1, keepdim=True)) ** 2 * probs).sum(-1)
    torch.testing.assert_close(prediction.member_variance, spread + 1e-6)
    expected = categorical_regression_loss(logits, Y, atoms, prior, reduction="none").mean((1, 2))
    torch.testing.assert_close(module.index_losses(output, Y), expected)
    torch.testing.assert_close(module.training_loss(X, Y, None), expected.mean())  # every member, once
    weights = torch.rand(70)
    each = categorical_regression_loss(logits, Y, atoms, prior, reduction="none")[..., 0]
    noisy = module.index_losses(output, Targets(Y, noise_weights=weights))
    torch.testing.assert_close(noisy, (each * weights).mean(1))
    own = module.index_losses(output, Targets(Y, weights=weights))
    torch.testing.assert_close(own, (each * weights).sum(1) / weights.sum())
    # The network alone, in the layout of every regressor, says the same.
    from lightning_uq.losses import split_gaussian

    mean, variance = split_gaussian(module.network(X, torch.arange(4)))
    torch.testing.assert_close(mean, prediction.member_mean)
    torch.testing.assert_close(variance, prediction.member_variance, rtol=1e-4, atol=1e-6)


def test_several_target_dimensions_and_an_infinite_index_set(make_trainer):
    y = torch.cat([Y, -Y], 1)
    network = CategoricalRegressionNetwork(GaussianNoiseMLP(1, 62, hidden_sizes=(30,), init_scale=0.1), ATOMS)
    module = CategoricalRegressionModule(network, num_train_samples=3, num_eval_samples=7, optimizer=ADAM)
    trainer = make_trainer(max_epochs=30)
    trainer.fit(module, loader(y=y), loader(y=y))
    assert trainer.callback_metrics["val_rmse"] < 0.4
    assert module.predict(X).member_mean.shape == (7, 70, 2)


@pytest.mark.parametrize("noise", [BootstrapNoise("exponential", seed=3), GaussianTargetNoise(0.3, seed=3)], ids=repr)
def test_noise_on_the_data_and_a_regularizer_by_definition(noise):
    module = CategoricalRegressionModule(NETWORK, data_noise=noise, regularizer=L2WeightDecay(0.1))
    sample = torch.randperm(200)[:70]
    loss = module.training_loss(X, Y, {"input": X, "target": Y, "index": sample})
    logits, prior = module.network.logits_and_prior(X, torch.arange(4))
    expected = []
    for i in range(4):
        member = torch.tensor([i])
        target, weights = noise.targets(Y, sample, member), noise.weights(sample, member)
        target = target[0] if target.ndim == 3 else target
        losses = categorical_regression_loss(
            logits[i], target, torch.tensor(ATOMS), prior[i], reduction="none"
        ).squeeze(1)
        expected.append((losses if weights is None else losses * weights[0]).mean())
    penalty = 0.1 * sum(p.square().sum() for p in module.network.parameters())
    torch.testing.assert_close(loss, torch.stack(expected).mean() + penalty)


def test_a_checkpoint_gives_the_same_numbers(make_trainer, tmp_path):
    module = CategoricalRegressionModule(NETWORK, optimizer=ADAM)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CategoricalRegressionModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))
    assert torch.equal(again.network.atoms, module.network.atoms)


def test_a_built_network_has_to_be_passed_again(make_trainer, tmp_path):
    module = CategoricalRegressionModule(CatMLPEnsemble(**SIZES), optimizer=ADAM)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="argument `network`: a .*CatMLPEnsemble"):
        CategoricalRegressionModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = CategoricalRegressionModule.load_from_checkpoint(tmp_path / "a.ckpt", network=CatMLPEnsemble(**SIZES))
    assert torch.equal(again.eval()(X), module.eval()(X))


def test_its_score_tells_far_inputs(make_trainer):
    module = CategoricalRegressionModule(Factory(NETWORK.target, {**SIZES, "prior_scale": 3.0}), optimizer=ADAM)
    ood = OODDetection({"far": loader(x=X + 8)}, scores=["epistemic_variance"])
    trainer = make_trainer(max_epochs=40, callbacks=[ood])
    trainer.fit(module, loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    (auroc,) = [value for name, value in result.items() if "auroc" in name]
    assert auroc > 0.9


def test_targets_out_of_range_are_reported_once():
    module = CategoricalRegressionModule(NETWORK)
    with pytest.warns(UserWarning, match="2 of the 70 targets of a batch lie outside the atoms' range, -3 to 3"):
        module.training_loss(X, torch.cat([Y[2:], torch.tensor([[9.0], [-4.0]])]), None)
    module.training_loss(X, Y + 9, None)  # said already


def test_misuse():
    with pytest.raises(InputError, match="`network` must be a CategoricalRegressionNetwork, .* but it is a Linear"):
        CategoricalRegressionModule(nn.Linear(1, 1))
    with pytest.raises(InputError, match="but it is a Linear"):
        CategoricalRegressionModule(lambda: nn.Linear(1, 1))
    module = CategoricalRegressionModule(NETWORK)
    with pytest.raises(InputError, match="does not take an input of shape"):
        module(torch.zeros(5, 3))
    with pytest.raises(InputError, match=r"The targets must have shape \[70, 1\]"):
        module.training_loss(X, Y.expand(-1, 2), None)
    assert split_atoms(module(X), 31)[1].shape == (4, 70, 1)

import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.compare.testbed import AGENTS, AgentSetting, agent_network, num_epochs
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.modules.hypermodel import HypermodelModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers
from lightning_uq.tasks import Classification

X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SIZES = {"in_features": 4, "out_features": 3}
BASE = Factory("lightning_uq.networks.mlp.MLP", {**SIZES, "hidden_sizes": [32]})
PRIOR = Factory("lightning_uq.networks.PriorIndependentLayers", {**SIZES, "index_dim": 8})
ADAM = functools.partial(torch.optim.Adam, lr=0.03)


def loader(y=Y) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_it_learns_and_hypotheses_differ(make_trainer, precision):
    module = HypermodelModule(BASE, prior=PRIOR, optimizer=ADAM)
    trainer = make_trainer(max_epochs=8, precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_accuracy"] > 0.8
    (again,) = trainer.test(module, loader(), verbose=False)
    assert result == again
    assert module.eval().float().predict(X).mutual_information.mean() > 0.001


def test_regression(make_trainer):
    base = Factory("lightning_uq.networks.mlp.MLP", {**SIZES, "out_features": 2, "hidden_sizes": [16]})
    module = HypermodelModule(base, task="regression", optimizer=ADAM)
    make_trainer(max_epochs=2).fit(module, loader(X[:, :1]), loader(X[:, :1]))
    assert (module.predict(X).epistemic_variance > 0).all()


def test_a_checkpoint_gives_the_same_numbers(make_trainer, tmp_path):
    module = HypermodelModule(
        BASE, index_dim=8, hidden_sizes=(6,), scale=False, prior=PRIOR, prior_scale=2.0, optimizer=ADAM
    )
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = HypermodelModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))
    assert again.network.prior_scale.running_spread > 0
    assert again.optimizer.kwargs == {"lr": 0.03}
    lambdas = HypermodelModule(lambda: nn.Linear(4, 3), optimizer=ADAM)
    trainer = make_trainer()
    trainer.fit(lambdas, loader())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(InputError, match=r"argument `network`: a .*lambda"):
        HypermodelModule.load_from_checkpoint(tmp_path / "b.ckpt", weights_only=True)


def test_a_prior_is_frozen_and_nobody_is_warned_of_it(make_trainer):
    module = HypermodelModule(
        BASE, prior=PRIOR, optimizer=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=1.0)
    )
    before = {name: value.clone() for name, value in module.state_dict().items() if "prior." in name}
    assert len(before) == 4
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader())  # a warning is an error here
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    (group,) = trainer.optimizers[0].param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(4 * 32 + 32 + 32 * 3 + 3, 8), (4 * 32 + 32 + 32 * 3 + 3,)]


def test_weight_averaging(make_trainer):
    module = HypermodelModule(BASE, prior=PRIOR, optimizer=ADAM)
    trainer = make_trainer(max_epochs=2, callbacks=[WeightAveraging()])
    trainer.fit(module, loader(), loader())
    assert torch.isfinite(module.eval()(X)).all()


def test_the_training_loss_is_the_mean_over_indices():
    module = HypermodelModule(BASE, num_train_samples=5)
    torch.manual_seed(3)
    loss = module.training_loss(X, Y, None)
    torch.manual_seed(3)
    output = module.network(X, module.network.sample_index(5))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(output.flatten(0, 1), Y.repeat(5)))


def test_a_density_is_refused(make_trainer):
    module = HypermodelModule(BASE, optimizer=ADAM)
    with pytest.raises(UnsupportedError, match="no plain inner network whose features could be read"):
        make_trainer(callbacks=[FitGMM()]).fit(module, loader())


def test_the_testbeds_agent():
    setting = AgentSetting(
        data="testbed",
        task=Classification(),
        input_shape=(10,),
        num_targets=2,
        num_train=100,
        backbone=functools.partial(agent_network, in_features=10),
        optimizer=ADAM,
        temperature=0.1,
    )
    module = AGENTS["hypermodel"].build(setting)
    assert sum(p.numel() for p in module.parameters()) == 22_414  # as the original counts
    assert num_epochs("hypermodel", setting) == 2
    assert module.network.index_dim == 6
    assert module.network.prior_scale.scale == pytest.approx(1 / math.sqrt(0.1))
    assert not module.network.calibrate_prior
    assert isinstance(module.network.prior, PriorIndependentLayers)
    assert module.network.prior.weight_0.shape == (10, 10, 3)
    assert (module.num_train_samples, module.num_eval_samples) == (16, 1000)
    assert set(module.network._factors) == {1.0}

"""A LightningModule as the network of our modules: one that builds its layers late, takes any arguments, or has no `forward`."""

import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    EvidentialModule,
    FitGMM,
    HypermodelModule,
    TemperatureScaling,
    load_fitted,
)
from lightning_uq.errors import InputError
from tests.modules.lightning_ensemble.cases import loader

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


def layers():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class NoForward(LightningModule):
    """Its steps call the network inside."""

    def __init__(self):
        super().__init__()
        self.net = layers()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", float(self.current_epoch))  # the first epoch is the best

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class AnyArguments(NoForward):
    """As every task of torchgeo's."""

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class Late(NoForward):
    """Builds its layers where Lightning asks it to."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = layers()

    def forward(self, x):
        return self.net(x)


SINGLE = [EpinetModule, DropoutModule, DeterministicModule, EvidentialModule, BayesByBackpropModule]


@pytest.mark.parametrize("network", [Late, AnyArguments])
@pytest.mark.parametrize("kind", SINGLE)
def test_a_module_around_it_trains_and_reloads(kind, network, make_trainer, tmp_path):
    module, trainer = kind(network()), make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt", network=network())
    assert module.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    assert again.predict(X).probs.shape == (6, 3)


@pytest.mark.parametrize("kind", [*SINGLE, HypermodelModule])
def test_a_network_without_forward_is_refused_before_the_training(kind):
    with pytest.raises(InputError, match="NoForward has no `forward`.*or pass the network inside it"):
        kind(NoForward())


def test_it_is_told_whose_training_step_runs(caplog):
    class Told(AnyArguments):
        pass

    with caplog.at_level(logging.INFO):
        DeterministicModule(nn.Linear(4, 3)), EnsembleModule(Told, num_members=2)
        assert "Told" not in caplog.text
        EpinetModule(Told()), EpinetModule(Told())
    assert (
        caplog.text.count("Told is trained as a network, by the loss of the task and the argument `optimizer`: its own")
        == 2  # modules
    )


def test_plain_members_without_forward_are_refused():
    with pytest.raises(InputError, match="ModuleList has no `forward`"):
        EnsembleModule(lambda: nn.ModuleList([nn.Linear(4, 3)]), num_members=2)


@pytest.mark.filterwarnings("ignore:The members train by their own steps")
def test_members_without_forward_train_alone_and_say_why_they_predict_nothing(make_trainer):
    ensemble, trainer = EnsembleModule(NoForward, num_members=2), make_trainer()
    trainer.fit(ensemble, loader())
    (tested,) = trainer.test(ensemble, loader(20), verbose=False)
    assert {"member_0/test", "test"} <= tested.keys()
    assert not any(name.startswith("ensemble/") for name in tested)
    with pytest.raises(InputError, match="NoForward has no `forward`"):
        trainer.predict(ensemble, loader(20))


def test_members_that_take_any_arguments_are_scored(make_trainer):
    (tested,) = make_trainer().test(EnsembleModule(AnyArguments, num_members=2), loader(20), verbose=False)
    assert {"ensemble/test_accuracy", "ensemble/test_nll", "ensemble/test_joint_log_loss"} <= tested.keys()


@pytest.mark.parametrize("network", [Late, AnyArguments])
@pytest.mark.parametrize("ensemble", [False, True], ids=["alone", "ensemble"])
def test_callbacks_reload_it(ensemble, network, make_trainer, tmp_path):
    def build():
        return EnsembleModule(network, num_members=2) if ensemble else network()

    callbacks = [TemperatureScaling(), FitGMM(), ModelCheckpoint(dirpath=tmp_path, monitor="val")]
    trainer, module = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True), build()
    trainer.fit(module, loader(), loader(20))
    path = callbacks[0].uq_ckpt_path
    expected = load_fitted(path, network) if ensemble else load_fitted(path)
    found = load_fitted(path, module if ensemble else network())(X)
    assert torch.equal(expected(X)["probs"], found["probs"])
    fresh = [TemperatureScaling(), FitGMM()]
    make_trainer(callbacks=fresh).test(build(), loader(20), ckpt_path=path, weights_only=True, verbose=False)
    assert fresh[0].temperature == callbacks[0].temperature

"""Modules that validate and test with other weights than they train: a fit after the training says that it reads the latter."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.temperature import TemperatureScaling

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long().index_fill(0, torch.arange(12), 1)


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=10)


class Project(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Averages(Project):
    """Keeps an average of its weights, and validates and tests with it, as many projects do."""

    def on_fit_start(self):
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *args):
        for name, p in self.named_parameters():
            self.average[name].lerp_(p.detach(), 0.1)

    def exchange(self):
        for name, p in self.named_parameters():
            p.data, self.average[name] = self.average[name], p.data

    def on_validation_start(self):
        self.exchange()

    def on_validation_end(self):
        self.exchange()

    def on_test_start(self):
        self.exchange()

    def on_test_end(self):
        self.exchange()


class CopiesThem(Averages):
    def exchange(self):
        for name, p in self.named_parameters():
            held = p.data.clone()
            p.data.copy_(self.average[name])
            self.average[name].copy_(held)


class PerEpoch(Averages):
    def on_validation_start(self):
        pass

    def on_validation_end(self):
        pass

    def on_validation_epoch_start(self):
        self.exchange()

    def on_validation_epoch_end(self):
        self.exchange()


class TwoNetworks(Project):
    """Its average is a network, and takes the other's place."""

    def __init__(self):
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net, use_buffers=True).module.requires_grad_(False)

    def exchange(self):
        self.net, self.average = self.average, self.net

    on_validation_start = on_validation_end = exchange


class OwnAveraging(Callback):
    """A user's callback, of no class that is known."""

    def __init__(self):
        self.held = {}

    def on_validation_start(self, trainer, pl_module):
        self.held = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        for p in pl_module.parameters():
            p.data.mul_(0.9)

    def on_validation_end(self, trainer, pl_module):
        for name, p in pl_module.named_parameters():
            p.data.copy_(self.held[name])


@pytest.mark.parametrize("kind", [Averages, CopiesThem, PerEpoch, TwoNetworks])
@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_weights_that_a_hook_exchanges_for_the_validation_are_told_once(kind, sanity_steps, make_trainer):
    callbacks = [FitGMM(), TemperatureScaling()]
    trainer = make_trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=sanity_steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(kind(), loader(), loader())
    told = [str(one.message) for one in caught if "exchanges them" in str(one.message)]
    assert len(told) == 1
    assert told[0].startswith(f"{kind.__name__} has other weights in validation than in training")
    assert "FitGMM and other fits" in told[0]


@pytest.mark.parametrize("is_before", [True, False])
def test_those_of_a_users_callback_are_told_too(is_before, make_trainer):
    own, gmm = OwnAveraging(), FitGMM()
    trainer = make_trainer(callbacks=[own, gmm] if is_before else [gmm, own])
    with pytest.warns(UserWarning, match="exchanges them. FitGMM"):
        trainer.fit(Project(), loader(), loader())


def test_a_test_on_exchanged_weights_uses_no_other_fit(make_trainer):
    module, scaling = Averages(), TemperatureScaling()
    trainer = make_trainer(callbacks=[scaling], max_epochs=2)
    with pytest.warns(UserWarning, match="exchanges them"):
        trainer.fit(module, loader(), loader())
    with pytest.warns(UserWarning, match="was fitted on other weights than those in memory, so it was fitted again"):
        trainer.test(module, loader(), verbose=False)
    module.exchange()
    expected = TemperatureScaling().fit(module, loader())
    assert float(scaling.temperature) == pytest.approx(float(expected.temperature), rel=1e-6)


class Harmless(Project):
    """Overrides the same hooks for something else, and passes data through its network there."""

    def on_validation_start(self):
        self.seen = []
        self.net.train()
        self.net(X)  # which changes BatchNorm's buffers

    def on_validation_epoch_end(self):
        self.seen.clear()


def test_hooks_that_exchange_nothing_are_nobodys_business(make_trainer):
    make_trainer(callbacks=[FitGMM()], max_epochs=2).fit(Harmless(), loader(), loader())  # warnings are errors


def test_an_average_of_lightnings_own_is_what_is_fitted(make_trainer):
    callbacks = [EMAWeightAveraging(decay=0.9), FitGMM()]
    make_trainer(callbacks=callbacks, max_epochs=2).fit(Project(), loader(), loader())

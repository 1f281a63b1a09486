"""LightningModules, and arguments, that an ensemble refuses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import Lit, loader


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Late2(Lit):
    def setup(self, stage):
        self.automatic_optimization = False


class TwoOptimizers(Lit):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 4)]


class NoOptimizer(Lit):
    def configure_optimizers(self):
        return None


class OwnBackward(Lit):
    def backward(self, loss):
        loss.backward()


class OwnLoop(Lit):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class NoStep(LightningModule):
    pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Manual, "Manual must leave optimization to Lightning, but it uses manual optimization"),
        (Late2, "Late2 must leave optimization to Lightning, but it uses manual optimization"),
        (TwoOptimizers, "`configure_optimizers` of TwoOptimizers must return one optimizer, but it returned 2"),
        (NoOptimizer, "`configure_optimizers` of NoOptimizer must return one optimizer, but it returned 0"),
        (
            lambda: Lit(optimizer=torch.optim.LBFGS),
            "Lit must use an optimizer that evaluates the loss once per step, but LBFGS",
        ),
        (OwnBackward, "OwnBackward must leave the backward pass to Lightning, but it overrides `backward`"),
        (OwnLoop, "`training_step` of OwnLoop must take a batch, but it takes `dataloader_iter`"),
        (NoStep, "NoStep must define `training_step`"),
    ],
)
def test_modules_that_cannot_train_side_by_side(factory, message, make_trainer):
    with pytest.raises(InputError, match=rf"{message}.*collect them with `EnsembleModule.from_checkpoints`"):
        make_trainer().fit(EnsembleModule(factory, num_members=2), loader())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.1)}, "optimizer"),
        ({"lr_scheduler": torch.optim.lr_scheduler.LinearLR}, "lr_scheduler"),
        ({"loss": F.cross_entropy}, "loss"),
        ({"bootstrap": "poisson"}, "bootstrap"),
        ({"prior_network": lambda: nn.Linear(4, 3), "prior_scale": 1.0}, "prior_network"),
    ],
)
def test_arguments_that_modules_bring_themselves(arguments, name):
    with pytest.raises(InputError, match=rf"`{name}` must be left out if members are LightningModules, .* Lit brings"):
        EnsembleModule(Lit, num_members=2, **arguments)


def test_modules_run_in_a_loop():
    assert EnsembleModule(Lit, num_members=2).network.execution == "loop"
    with pytest.raises(UnsupportedError, match="execution='stacked' does not support these members"):
        EnsembleModule(Lit, num_members=2, execution="stacked")


def test_the_default_optimizer_may_come_spelled_out():
    """As the command line passes it."""
    EnsembleModule(Lit, num_members=2, optimizer=partial(torch.optim.Adam, lr=0.001, weight_decay=0))

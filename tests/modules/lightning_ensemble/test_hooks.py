"""Hooks of an ensemble: its members hear what they would hear alone, and see a Trainer of their own."""

import copy
import functools
import pickle

import pytest
import torch
from lightning.pytorch import Callback

from lightning_uq.errors import InputError
from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import SEED, Lit, alone, difference, loader


class Asks(Lit):
    """Writes down what it hears and sees."""

    def __init__(self):
        super().__init__(scheduler="step")
        self.heard, self.seen = [], {}

    def setup(self, stage):
        self.heard.append(f"setup {stage.value}")

    def teardown(self, stage):
        self.heard.append(f"teardown {stage.value}")

    def on_train_batch_start(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.seen["lr"] = optimizer.param_groups[0]["lr"]
        self.seen["optimizer"] = optimizer.optimizer
        self.seen["raw"] = self.optimizers(use_pl_optimizer=False)
        self.seen["scheduler"] = self.lr_schedulers()
        self.seen["where"] = (self.current_epoch, self.global_step, self.trainer.max_epochs, self.device.type)

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen["outputs"] = outputs

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return self.net[0].weight.sum()

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert outputs == self.net[0].weight.sum()
        self.heard.append("on_validation_batch_end")

    def on_before_optimizer_step(self, optimizer):
        self.seen["stepping"] = optimizer

    def on_before_zero_grad(self, optimizer):
        self.seen["zeroing"] = optimizer


for _name in (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
):
    setattr(Asks, _name, lambda self, name=_name: self.heard.append(name))


def test_members_hear_and_see_what_they_would_alone(make_trainer):
    ensemble = EnsembleModule(Asks, num_members=2, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    single, _ = alone(0, Asks, make_trainer, max_epochs=2)
    members = [ensemble.network.members[i] for i in range(2)]
    assert members[0].heard == members[1].heard == single.heard
    assert {"setup fit", "on_train_epoch_end", "on_fit_end", "teardown fit"} <= set(single.heard)
    for member in members:
        parameters = list(member.parameters())
        for key in ("optimizer", "raw", "stepping", "zeroing"):
            assert [p for group in member.seen[key].param_groups for p in group["params"]] == parameters or key == "raw"
            assert isinstance(member.seen[key], torch.optim.Adam)
        assert member.seen["scheduler"].optimizer is member.seen["optimizer"]
        assert member.seen["lr"] == single.seen["lr"] == 0.025
        assert member.seen["where"] == single.seen["where"]
        assert member.seen["outputs"].keys() == single.seen["outputs"].keys()
    assert members[0].seen["outputs"]["loss"] == single.seen["outputs"]["loss"]
    assert members[0].seen["outputs"]["loss"] != members[1].seen["outputs"]["loss"]


def test_members_come_back_as_they_were(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    before = [set(vars(ensemble.network.members[i])) for i in range(2)]
    make_trainer().fit(ensemble, loader())
    assert [set(vars(ensemble.network.members[i])) for i in range(2)] == before
    assert ensemble.network.members[0].trainer is ensemble.trainer


def fails_and_releases(trainer, ensemble, data, error):
    members = ensemble.members.modules
    before, callbacks = [set(vars(member)) for member in members], list(trainer.callbacks)
    with pytest.raises(error):
        trainer.fit(ensemble, data, loader(20))
    assert [set(vars(member)) for member in members] == before
    assert [member.trainer for member in members] == [trainer] * 2
    assert trainer.callbacks == callbacks


@pytest.mark.parametrize("where", ["setup", "on_train_start", "training_step", "validation_step"])
def test_members_come_back_as_they_were_after_an_exception(where, make_trainer):
    inherited = getattr(Lit, where)

    @functools.wraps(inherited)  # Lightning asks for the signature
    def hook(self, *args, **kwargs):
        if self.fails:
            raise ArithmeticError(where)
        return inherited(self, *args, **kwargs)

    ensemble = EnsembleModule(type("Fails", (Lit,), {where: hook, "fails": False}), num_members=2, seed=SEED)
    first, second = ensemble.members.modules
    second.fails = True
    fails_and_releases(make_trainer(), ensemble, loader(), ArithmeticError)
    alone = make_trainer()
    alone.fit(first.train(), loader(), loader(20))  # a member may go on alone
    assert "val_loss" in alone.callback_metrics


def test_members_come_back_as_they_were_after_an_interrupt_or_a_fault_outside_them(make_trainer):
    class Interrupts(Callback):
        def on_train_batch_end(self, *args):
            raise KeyboardInterrupt

    def broken_loader():
        yield next(iter(loader()))
        raise ArithmeticError("loader")

    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    fails_and_releases(make_trainer(), ensemble, broken_loader(), ArithmeticError)
    fails_and_releases(make_trainer(callbacks=[Interrupts()]), ensemble.train(), loader(), SystemExit)


class Skips(Lit):
    """Skips the rest of each epoch from the batch on at which its weights say so."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.batches = at, 0

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.at else None

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return super().training_step(batch, batch_idx)


def test_members_that_agree_skip_the_rest_of_an_epoch(make_trainer):
    ensemble = EnsembleModule(lambda: Skips(2), num_members=2, seed=SEED)
    make_trainer(max_epochs=2).fit(ensemble, loader(), loader(20))
    for i, member in enumerate(ensemble.members.modules):
        single, _ = alone(i, lambda: Skips(2), make_trainer, max_epochs=2)
        assert member.batches == single.batches == 4
        assert difference(ensemble, i, single) == 0.0


def test_a_member_that_skips_the_rest_of_an_epoch_by_itself_is_an_error(make_trainer):
    ensemble = EnsembleModule(Skips, num_members=3, seed=SEED)
    ensemble.members.modules[1].at = 2
    with pytest.raises(
        InputError, match=r"Member 1 returned -1 from `on_train_batch_start`.*member 0 did not.*from_checkpoints"
    ):
        make_trainer().fit(ensemble, loader(), loader(20))


def test_an_ensemble_can_be_pickled_while_it_trains(make_trainer):
    """As `ddp_spawn` does it after a fit that was interrupted."""
    copies = []

    class Pickle(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies.append(pickle.loads(pickle.dumps(pl_module)))
            copy.deepcopy(pl_module)

    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    make_trainer(callbacks=[Pickle()], limit_train_batches=1).fit(ensemble, loader())
    x = torch.randn(5, 4)
    assert torch.equal(copies[0].eval()(x), ensemble.eval()(x))
    make_trainer(limit_train_batches=1).fit(copies[0].train(), loader())


class HasData(Lit):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(20)


def test_loaders_may_be_the_members(make_trainer):
    ensemble = EnsembleModule(HasData, num_members=2, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble)
    assert "val_loss" in trainer.callback_metrics


class Mixin:
    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.heard.append("mixin")


class Subclass(Mixin, EnsembleModule):
    """A user's subclass of an ensemble, which overrides hooks that its members have too."""

    def __init__(self, network):
        super().__init__(network, num_members=2, seed=SEED)
        self.heard = []

    def train_dataloader(self):
        self.heard.append("train_dataloader")
        return loader()

    def on_train_start(self):
        self.heard.append("on_train_start")
        super().on_train_start()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.heard.append("training_step")
        return 2 * loss


class Loads(Asks):
    def train_dataloader(self):
        raise AssertionError("the ensemble has a loader of its own")


def test_a_subclass_overrides_the_hooks_of_an_ensemble(make_trainer):
    ensemble = Subclass(Loads)
    make_trainer(limit_train_batches=1).fit(ensemble)
    assert ensemble.heard == ["train_dataloader", "on_train_start", "mixin", "training_step"]
    for i in range(2):
        member = ensemble.network.members[i]
        assert {"on_train_start", "on_train_epoch_start"} <= set(member.heard)
        assert "loss" in member.seen["outputs"]

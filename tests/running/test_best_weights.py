"""Which checkpoint files a fit reads, and how far it trusts them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.networks.fingerprint import same_weights, weights_fingerprint
from lightning_uq.running.best_weights import read_back, weights_of
from tests.counting import peak_bytes

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long().index_fill(0, torch.arange(6), 1)


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=10)


class Project(LightningModule):
    """As somebody writes it, except that its validation losses, one per epoch, are known beforehand."""

    def __init__(self, losses, batch_size=10):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.losses, self.batch_size = losses, batch_size

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = self.losses[self.current_epoch]
        self.log_dict({"val_loss": loss, "val_acc": 1 - loss})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def monitored(folder, monitor="val_loss", **options):
    return ModelCheckpoint(folder, f"{monitor}-{{epoch}}", monitor=monitor, **options)


def train(make_trainer, losses, *callbacks, epochs=2, **options):
    module = Project(losses)
    trainer = make_trainer(callbacks=list(callbacks), max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, loader(), loader(), **options)
    return module


def is_fitted_on(callback, module):
    return same_weights(callback._fingerprint, weights_fingerprint(module), module)


def is_fitted_on_file(callback, path):
    module = Project([])
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return is_fitted_on(callback, module)


def test_a_file_that_is_not_this_trainings_own_must_hold_plain_data(make_trainer, tmp_path):
    torch.save({"state_dict": {}, "note": Path("x")}, tmp_path / "other.ckpt")
    own = make_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path)], enable_checkpointing=True)
    assert read_back(str(tmp_path / "other.ckpt"), own)["note"] == Path("x")
    other = make_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path / "run")], enable_checkpointing=True)
    with pytest.raises(InputError, match="must hold weights and plain data.*nothing in it was run"):
        read_back(str(tmp_path / "other.ckpt"), other)


# ---------------------------------------------------------------------- the best file is lost


class Deletes(Callback):
    """Cleans up, as a script that saves disk space does."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def on_train_end(self, trainer, pl_module):
        Path(self.checkpoint.best_model_path).unlink()


@pytest.mark.parametrize("make", [FitGMM, TemperatureScaling])
def test_a_deleted_best_file_is_named(make, make_trainer, tmp_path):
    best, callback = monitored(tmp_path), make()
    with pytest.warns(
        UserWarning, match=f"{make.__name__} is fitted on the last weights: .*val_loss-epoch=0.ckpt no longer exists"
    ):
        module = train(make_trainer, [0.1, 0.2], Deletes(best), callback, best)
    assert is_fitted_on(callback, module)
    assert Path(callback.uq_ckpt_path).name == "uq-last.ckpt"


def test_the_best_weights_that_were_asked_for_must_be_there(make_trainer, tmp_path):
    best = monitored(tmp_path)
    with pytest.raises(InputError, match="`weights='best'`, but .*val_loss-epoch=0.ckpt no longer exists. Use"):
        train(make_trainer, [0.1, 0.2], Deletes(best), FitGMM(weights="best"), best)
    rarely = monitored(tmp_path, every_n_epochs=3)
    with pytest.raises(InputError, match="but no ModelCheckpoint with a `monitor` has saved a file"):
        train(make_trainer, [0.1, 0.2], FitGMM(weights="best"), rarely)


def test_the_best_weights_that_were_asked_for_need_a_monitor(make_trainer, tmp_path):
    module = Project([0.1])
    trainer = make_trainer(callbacks=[FitGMM(weights="best"), ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.raises(InputError, match=r"no ModelCheckpoint of the Trainer has a `monitor`. Add"):
        trainer.fit(module, loader(), loader())
    assert trainer.global_step == 0


def test_a_fast_dev_run_saves_no_best_file(make_trainer, tmp_path):
    gmm = FitGMM(weights="best")
    trainer = make_trainer(callbacks=[gmm, monitored(tmp_path)], fast_dev_run=True, enable_checkpointing=True)
    trainer.fit(Project([0.1]), loader(), loader())
    assert gmm.fitted


@pytest.mark.parametrize("weights", ["auto", "best"])
def test_the_best_weights_are_fitted_without_a_word(weights, make_trainer, tmp_path):
    best, gmm = monitored(tmp_path), FitGMM(weights=weights)
    train(make_trainer, [0.1, 0.2], gmm, best)  # warnings are errors
    assert is_fitted_on_file(gmm, best.best_model_path)


# ---------------------------------------------------------------------- several ModelCheckpoints


@pytest.mark.parametrize("monitors", [("val_loss", "val_acc"), ("val_acc", "val_loss")])
def test_of_two_monitors_the_first_counts_and_one_line_says_so(monitors, make_trainer, tmp_path, caplog):
    first, second = (monitored(tmp_path, monitor) for monitor in monitors)  # by the smallest: the files differ
    gmm, scaling = FitGMM(), TemperatureScaling()
    with caplog.at_level("INFO"):
        train(make_trainer, [0.1, 0.2], gmm, scaling, first, second)
    line = f"best weights by {monitors[0]}, the monitor of the first ModelCheckpoint that saved a file, rather than by {monitors[1]}."
    assert sum(line in record.message for record in caplog.records) == 1
    assert is_fitted_on_file(gmm, first.best_model_path)
    assert is_fitted_on_file(scaling, first.best_model_path)


def test_checkpoints_of_one_monitor_are_no_choice(make_trainer, tmp_path, caplog):
    every, best = monitored(tmp_path / "every", every_n_epochs=2), monitored(tmp_path / "best")
    with caplog.at_level("INFO"):
        train(make_trainer, [0.1, 0.2], FitGMM(), best, every, ModelCheckpoint(tmp_path / "last"))
    assert "the first ModelCheckpoint" not in caplog.text


# ---------------------------------------------------------------------- one ModelCheckpoint for several fits


def test_the_best_file_of_another_fold_is_not_taken(make_trainer, tmp_path):
    best, gmm = monitored(tmp_path), FitGMM()
    train(make_trainer, [0.1, 0.2], gmm, best)
    first, fitted = gmm.uq_ckpt_path, Path(gmm.uq_ckpt_path).read_bytes()
    with pytest.warns(
        UserWarning, match=r"holds .*val_loss-epoch=0.ckpt of an earlier fit.*Use a new ModelCheckpoint for each fit"
    ):
        module = train(make_trainer, [0.4, 0.3], gmm, best)
    assert is_fitted_on(gmm, module)
    assert Path(first).read_bytes() == fitted
    with pytest.raises(InputError, match=r"`weights='best'`, but the ModelCheckpoint holds .* of an earlier fit"):
        train(make_trainer, [0.4, 0.3], FitGMM(weights="best"), best)


def test_a_fold_that_is_better_has_a_best_file_of_its_own(make_trainer, tmp_path):
    best, gmm = monitored(tmp_path), FitGMM()
    train(make_trainer, [0.4, 0.3], gmm, best)
    earlier = best.best_model_path
    train(make_trainer, [0.2, 0.1], gmm, best)  # of the same name
    assert best.best_model_path == earlier
    assert is_fitted_on_file(gmm, earlier)


def test_a_resumed_training_brings_its_best_file(make_trainer, tmp_path):
    def both():
        return monitored(tmp_path, save_last=True), FitGMM(weights="best")

    best, gmm = both()
    train(make_trainer, [0.1, 0.2], gmm, best)
    for checkpoint, callback in ((best, gmm), both()):  # the same objects, and those of a new process
        resumed = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
        train(make_trainer, [0.1, 0.2, 0.3], callback, checkpoint, epochs=3, **resumed)
        assert Path(checkpoint.best_model_path).name == "val_loss-epoch=0.ckpt"
        assert is_fitted_on_file(callback, checkpoint.best_model_path)


def test_a_tuner_brings_no_best_file(make_trainer, tmp_path):
    best, gmm = monitored(tmp_path), FitGMM()
    train(make_trainer, [0.1, 0.2], gmm, best)

    class Project2(Project):
        def train_dataloader(self):
            return DataLoader(TensorDataset(X, Y), batch_size=self.batch_size)

    callbacks = [BatchSizeFinder(steps_per_trial=1, max_trials=1), gmm, best]
    trainer = make_trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="of an earlier fit"):
        trainer.fit(module := Project2([0.4, 0.3]), val_dataloaders=loader())
    assert is_fitted_on(gmm, module)


def test_the_last_weights_are_not_copied_but_buffers_are_put_back(make_trainer):
    module = Project([0.0])
    module.net = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(4))

    def use():
        with weights_of(None, make_trainer(), module):
            module.net[1].running_mean += 1

    assert peak_bytes(use) < module.net[0].weight.nbytes / 10
    assert not module.net[1].running_mean.any()

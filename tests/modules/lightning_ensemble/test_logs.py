"""What members log: under their own prefix, and the mean under the name that they used."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import SEED, Lit, M, dataset, loader


def test_members_log_under_their_names_and_the_mean_under_theirs(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("train_loss", "val_loss", "val_accuracy"):
        members = [metrics[f"member_{i}/{name}"] for i in range(M)]
        assert len(set(members)) > 1
        assert metrics[name] == pytest.approx(np.mean(members), abs=1e-6)
    # The ensemble's own stand apart.
    x, y = dataset(20).tensors
    prediction = ensemble.eval().predict(x)
    assert metrics["ensemble/val_accuracy"] == pytest.approx((prediction.label == y).float().mean().item())
    assert metrics["ensemble/val_nll"] == pytest.approx(
        -prediction.probs.log()[torch.arange(20), y].mean().item(), abs=1e-5
    )
    assert metrics["ensemble/val_nll"] < np.mean([metrics[f"member_{i}/val_loss"] for i in range(M)])


def test_what_the_progress_bar_shows_is_the_mean(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    assert set(trainer.progress_bar_metrics) == {"train_loss"}


class LogsEverything(Lit):
    def __init__(self):
        super().__init__()
        self.metrics = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)], prefix="val_")

    def on_train_epoch_start(self):
        self.log("epoch_number", float(self.current_epoch), False, False)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.metrics(self(x), y)
        self.log_dict(self.metrics, on_step=True, on_epoch=True)
        self.log_dict({"a": 1.0, "b": torch.tensor([2.0])}, batch_size=len(y))
        self.log("count", float(len(y)), reduce_fx="sum")
        self.log("count", float(len(y)), reduce_fx="sum")

    def on_validation_epoch_end(self):
        self.log("at_end", self.trainer.callback_metrics.get("nothing", torch.tensor(3.0)))


def test_every_way_of_logging(make_trainer):
    ensemble = EnsembleModule(LogsEverything, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert (metrics["a"], metrics["b"], metrics["at_end"], metrics["epoch_number"]) == (1.0, 2.0, 3.0, 1.0)
    assert metrics["count"] == metrics["member_0/count"] == 40.0
    x, y = dataset(20).tensors
    for name, kind in (("val_MulticlassAccuracy", MulticlassAccuracy), ("val_MulticlassF1Score", MulticlassF1Score)):
        expected = [kind(3)(ensemble.network.members[i].eval()(x), y).item() for i in range(M)]
        assert [metrics[f"member_{i}/{name}"] for i in range(M)] == pytest.approx(expected)
        assert metrics[name] == pytest.approx(np.mean(expected))
        assert metrics[f"{name}_epoch"] == metrics[name]


def test_monitors_find_the_mean(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}")
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(ensemble, loader(), loader(20))
    assert checkpoint.best_model_score == pytest.approx(float(checkpoint.best_model_score))
    assert checkpoint.best_model_path
    assert trainer.test(ensemble, loader(20), ckpt_path="best", weights_only=True)[0]["ensemble/test_nll"] > 0


def test_learning_rates_are_named_by_member(make_trainer, tmp_path):
    ensemble = EnsembleModule(lambda: Lit(scheduler="every step"), num_members=M, seed=SEED)
    monitor = LearningRateMonitor()
    trainer = make_trainer(callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(ensemble, loader())
    for i in range(M):
        assert monitor.lrs[f"member_{i}/cosine"][0] == 0.05
        assert monitor.lrs[f"member_{i}/cosine"][-1] < 0.05

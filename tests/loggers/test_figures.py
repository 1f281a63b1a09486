"""Figures and metrics reach the real loggers, which are read back from their files."""

import csv
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import LogFigures, OODDetection, TemperatureScaling
from lightning_uq.errors import MissingExtraError
from lightning_uq.loggers import log_figure
from lightning_uq.report import new_figure

PNG = b"\x89PNG"
METRICS = {"val_loss", "uq/temperature", "uq/fit_nll", "uq/test_nll", "uq/test_ece_calibrated", "ood_auroc/far/energy"}
FIGURES = {"val_reliability", "test_reliability"}


class Users(LightningModule):
    """Written without this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def loader(num=40):
    x = torch.randn(num, 4, generator=torch.Generator().manual_seed(num))
    y = (x[:, 0] > 0).long() + (torch.rand(num, generator=torch.Generator().manual_seed(1)) < 0.3)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def run(make_trainer, logger):
    """Two epochs with a sanity check, and a test."""
    callbacks = [TemperatureScaling(weights="last"), OODDetection({"far": [5 * torch.randn(20, 4)]}), LogFigures()]
    trainer = make_trainer(
        max_epochs=2, callbacks=callbacks, logger=logger, num_sanity_val_steps=2, log_every_n_steps=1
    )
    model = Users()
    trainer.fit(model, loader(), loader(24))
    trainer.test(model, loader(32), verbose=False)
    return trainer


def test_csv(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    run(make_trainer, logger)
    figures = sorted(path.name for path in Path(logger.log_dir).glob("*.png"))
    # One for each validation, none for the sanity check.
    assert figures == [f"{name}-{step:07d}.png" for name, step in zip(["test_reliability", *2 * ["val_reliability"]], (10, 5, 10), strict=True)]  # fmt: skip
    assert all((Path(logger.log_dir) / name).read_bytes().startswith(PNG) for name in figures)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {key for row in rows for key, value in row.items() if value} >= METRICS


def test_tensorboard(make_trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run(make_trainer, logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["images"]) == FIGURES
    assert [event.step for event in events.Images("val_reliability")] == [5, 10]
    (figure,) = events.Images("test_reliability")
    assert figure.step == 10
    assert figure.encoded_image_string.startswith(PNG)
    assert set(events.Tags()["scalars"]) >= METRICS


def test_mlflow(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base would need SQLAlchemy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's own
        logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=f"file:{tmp_path}/artifacts")
        run(make_trainer, logger)
        client = logger.experiment
        found = {
            name: [Path(file.path).name for file in client.list_artifacts(logger.run_id, f"figures/{name}")]
            for name in FIGURES
        }
    assert found == {
        "val_reliability": ["0000005.png", "0000010.png"],
        "test_reliability": ["0000010.png"],
    }
    paths = list(tmp_path.rglob("*.png"))
    assert len(paths) == 3
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert set(client.get_run(logger.run_id).data.metrics) >= METRICS


def test_wandb_offline(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        logger = WandbLogger(save_dir=tmp_path, offline=True, project="figures")
        run(make_trainer, logger)
        logged = dict(logger.experiment.summary)
        wandb.finish()
    assert set(logged) >= METRICS | FIGURES
    paths = sorted(tmp_path.rglob("media/images/*.png"))
    assert len(paths) == 3
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert {path.name.rpartition("_reliability")[0] for path in paths} == {"val", "test"}


class Silent(Logger):
    """A logger that takes no figure."""

    name, version = "silent", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


def test_each_logger_of_a_trainer_and_no_other(make_trainer, tmp_path):
    first, second = CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    trainer = make_trainer(logger=[first, Silent(), second])
    with pytest.warns(UserWarning, match="Silent gets no figures. Figures are written to TensorBoardLogger, CSVLogger"):
        log_figure(trainer, "val_a/dataloader_idx_0", new_figure(2, 2))
    for logger in (first, second):
        assert [path.name for path in Path(logger.log_dir).iterdir()] == ["val_a-dataloader_idx_0-0000000.png"]
    log_figure(make_trainer(), "nowhere", new_figure(2, 2))
    log_figure(make_trainer(logger=CSVLogger(tmp_path / "c"), fast_dev_run=True), "nowhere", new_figure(2, 2))
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_another_rank_writes_nothing(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(logger=CSVLogger(tmp_path))
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: False))
    log_figure(trainer, "mine", new_figure(2, 2))
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib_nothing_is_trained(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(Users, "training_step", lambda *args: pytest.fail("trained"))
    with pytest.raises(MissingExtraError, match="extra `report`"):
        make_trainer(callbacks=[LogFigures()], logger=CSVLogger(tmp_path)).fit(Users(), loader(), loader())


def test_no_display_is_needed(make_trainer, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    logger = CSVLogger(tmp_path)
    make_trainer(callbacks=[LogFigures()], logger=logger).validate(Users(), loader(), verbose=False)
    assert len(list(tmp_path.rglob("*.png"))) == 1

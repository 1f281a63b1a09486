"""A -uq.ckpt that is loaded without its callbacks does not predict uncalibrated without a word."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq import DeterministicModule, FitGMM, TemperatureScaling, load_fitted
from tests.contract.cases import OPTIMIZERS, loader, network

OPTIMIZER = OPTIMIZERS["classification"]

WORDS = (
    r"holds what TemperatureScaling fitted, but DeterministicModule predicts without it\. Pass.*`load_fitted\(path\)`"
)


@pytest.fixture
def written(make_trainer, tmp_path):
    """A module, and the file that a fit wrote."""
    module, scaling = DeterministicModule(network, optimizer=OPTIMIZER), TemperatureScaling()
    callbacks = [scaling, ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")]
    trainer = make_trainer(max_epochs=8, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(module, loader("classification", 40), loader("classification", 61, 1))
    return module, scaling.uq_ckpt_path


def test_load_from_checkpoint_warns(written):
    _, path = written
    with pytest.warns(UserWarning, match=WORDS):
        DeterministicModule.load_from_checkpoint(path)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_trainer_without_the_callback_warns_and_one_with_it_does_not(written, make_trainer, stage):
    _, path = written
    data = loader("classification", 27, 2)
    with pytest.warns(UserWarning, match=WORDS):
        getattr(make_trainer(), stage)(DeterministicModule(network), data, ckpt_path=path)
    module = DeterministicModule(network)
    getattr(make_trainer(callbacks=[TemperatureScaling()]), stage)(module, data, ckpt_path=path)
    assert "temperature" in str(module.predict(torch.zeros(2, 4)))


def test_a_density_alone_warns_too(make_trainer, tmp_path):
    gmm = FitGMM()
    callbacks = [gmm, ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")]
    trainer = make_trainer(enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(DeterministicModule(network), loader("classification", 40), loader("classification", 61, 1))
    with pytest.warns(UserWarning, match="holds what FitGMM fitted"):
        DeterministicModule.load_from_checkpoint(gmm.uq_ckpt_path)


def test_nothing_is_said_where_nothing_is_lost(written, make_trainer):
    module, path = written
    load_fitted(path)
    make_trainer().test(module, loader("classification", 27, 2), ckpt_path=path, verbose=False)  # it has the transform
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ckpt_path.*")  # Lightning's own: the callback is not there to resume
        make_trainer(max_epochs=9).fit(module, loader("classification", 40), ckpt_path=path)

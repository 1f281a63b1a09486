"""Predictions pass through Lightning: every step may return one, and Lightning moves it with `to`."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import move_data_to_device
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq.predictions import Prediction
from tests.predictions.cases import ALL, assert_same, categorical

STEPS = ("train", "validation", "test", "predict")


class Echo(LightningModule):
    """Returns one and the same prediction from every step."""

    def __init__(self, prediction):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.given = prediction

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight.square(), "prediction": self.given, "nested": [self.given]}

    def validation_step(self, batch, batch_idx):
        return {"prediction": self.given}

    def test_step(self, batch, batch_idx):
        return self.given

    def predict_step(self, batch, batch_idx):
        return self.given

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Seen(Callback):
    """What hooks get to see of the steps' outputs."""

    def __init__(self):
        self.outputs = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        assert outputs["nested"][0] is outputs["prediction"]
        self.outputs["train"] = outputs["prediction"]

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.outputs["validation"] = outputs["prediction"]

    def on_test_batch_end(self, trainer, pl_module, outputs, *_):
        self.outputs["test"] = outputs

    def on_predict_batch_end(self, trainer, pl_module, outputs, *_):
        self.outputs["predict"] = outputs


@pytest.mark.parametrize("make", ALL)
def test_every_step_may_return_one(make_trainer, make):
    prediction, seen = make(), Seen()
    module, loader = Echo(prediction), DataLoader(torch.zeros(4, 1), batch_size=4)
    trainer = make_trainer(callbacks=[seen])
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    (returned,) = trainer.predict(module, loader)
    assert set(seen.outputs) == set(STEPS)
    for output in (*seen.outputs.values(), returned):
        assert isinstance(output, Prediction)
        assert_same(output, prediction)


@pytest.mark.parametrize("make", ALL)
def test_lightning_moves_it(make):
    prediction = make()
    moved = move_data_to_device({"prediction": prediction, "many": [prediction]}, torch.device("meta"))
    for one in (moved["prediction"], moved["many"][0]):
        assert type(one) is type(prediction)
        assert {tensor.device.type for _, tensor, _ in one._present()} == {"meta"}


def test_a_batch_may_hold_one(make_trainer):
    class Reading(Echo):
        def predict_step(self, batch, batch_idx):
            return batch["prediction"]

    batches = [{"prediction": categorical(b), "x": torch.zeros(b)} for b in (2, 3)]
    returned = make_trainer().predict(Reading(categorical()), DataLoader(batches, batch_size=None))
    assert_same(Prediction.cat(returned), Prediction.cat([batch["prediction"] for batch in batches]))

"""``val_nll_calibrated``: its value, who may monitor it, and that every sample counts once."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.calibrated_nll import CalibratedNLL
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.functional.temperature import calibrated_nll
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory

GENERATOR = torch.Generator().manual_seed(1)
X, VAL_X = torch.randn(40, 4, generator=GENERATOR), torch.randn(45, 4, generator=GENERATOR)


def labels(x):
    noisy = torch.rand(len(x), generator=GENERATOR) < 0.3
    return torch.where(noisy, torch.randint(2, (len(x),), generator=GENERATOR), (x[:, 0] > 0).long())


Y, VAL_Y = labels(X), labels(VAL_X)


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=8)


def val_loader():
    return loader(VAL_X, VAL_Y)


class UsersModule(LightningModule):
    """Its scale grows as it trains, so that its own validation loss rises while its ranking improves."""

    def __init__(self, lr=0.5):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
        self.lr = lr
        self.logged: list[float] = []
        self.expected: list[float] = []

    def forward(self, x):
        self.log("calls", 1.0, reduce_fx="sum")  # as some do; once a batch is enough
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(4 * self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        batch[0].zero_()  # what a step does to its batch is its own affair

    def on_validation_batch_end(self, *args):
        with torch.no_grad():  # of the last batch, while an average still stands in for the weights
            self.now = calibrated_nll(self.net(VAL_X.to(self.net[0].weight.dtype)), VAL_Y).item()

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.expected.append(self.now)
            self.logged.append(self.trainer.callback_metrics["val_nll_calibrated"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Cloned(UsersModule):
    """Leaves its batches as they are, for what other callbacks read later."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step([t.clone() for t in batch], batch_idx)


def test_it_is_the_nll_after_the_best_temperature_of_each_epoch(make_trainer):
    module = UsersModule()
    trainer = make_trainer(callbacks=[CalibratedNLL()], max_epochs=4)
    trainer.fit(module, loader(), DataLoader([(x, y) for x, y in zip(VAL_X, VAL_Y, strict=True)], batch_size=8))
    assert len(module.logged) == 4
    assert module.logged == pytest.approx(module.expected, rel=1e-5)
    assert len(set(module.logged)) > 1
    assert trainer.callback_metrics["calls"] == 6


def test_scaling_the_logits_changes_the_loss_and_not_this(make_trainer):
    values = {}
    for scale in (1.0, 50.0):
        torch.manual_seed(0)
        callback = CalibratedNLL(predict_fn=lambda model, x, scale=scale: scale * model.net(x))
        trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=0)
        trainer.fit(UsersModule(), loader(), val_loader())
        values[scale] = trainer.callback_metrics["val_nll_calibrated"].item()
    assert values[50.0] == pytest.approx(values[1.0], rel=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_and_early_stopping_follow_it(make_trainer, tmp_path, first):
    """EarlyStopping may stand before or after it."""
    module = Cloned(lr=4.0)
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_nll_calibrated", save_top_k=-1)
    stop = EarlyStopping("val_nll_calibrated", patience=2)
    callbacks = [CalibratedNLL(), stop] if first else [stop, CalibratedNLL()]
    trainer = make_trainer(callbacks=[*callbacks, keep], max_epochs=30, enable_checkpointing=True)
    trainer.fit(module, loader(), val_loader())
    best = min(range(len(module.logged)), key=module.logged.__getitem__)
    assert f"epoch={best}-" in keep.best_model_path
    assert keep.best_model_score.item() == pytest.approx(min(module.logged))
    assert len(module.logged) == best + 3 < 30  # stopped by patience
    assert module.logged == pytest.approx(module.expected, rel=1e-5)


def test_the_temperature_is_then_fitted_on_that_checkpoint(make_trainer, tmp_path):
    module = Cloned(lr=1.0)
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor=CalibratedNLL.monitor)
    scaling = TemperatureScaling(predict_fn=lambda model, x: model.net(x))
    make_trainer(callbacks=[CalibratedNLL(), scaling, keep], max_epochs=6, enable_checkpointing=True).fit(
        module, loader(), val_loader()
    )
    best = UsersModule.load_from_checkpoint(keep.best_model_path, weights_only=True).eval()
    with torch.no_grad():
        logits = best.net(VAL_X)
    tempered = nn.functional.cross_entropy(logits.double() / scaling.temperature, VAL_Y)
    assert tempered.item() == pytest.approx(keep.best_model_score.item(), rel=1e-5)


def test_of_an_ensemble_the_pooled_prediction_counts(make_trainer):
    network = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 2})
    module = EnsembleModule(network, num_members=3, seed=0)
    trainer = make_trainer(callbacks=[CalibratedNLL()])
    trainer.fit(module, loader(), val_loader())
    with torch.no_grad():
        pooled = module.eval()(VAL_X).double().softmax(2).mean(0).log()
    expected = calibrated_nll(pooled, VAL_Y).item()
    assert trainer.callback_metrics["val_nll_calibrated"].item() == pytest.approx(expected, rel=1e-5)
    (validated,) = trainer.validate(module, val_loader(), verbose=False)
    assert validated["val_nll_calibrated"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision(make_trainer, precision):
    module = UsersModule()
    make_trainer(callbacks=[CalibratedNLL()], precision=precision).fit(module, loader(), val_loader())
    tolerance = 1e-6 if precision == "64-true" else 2e-2
    assert module.logged == pytest.approx(module.expected, rel=tolerance)


def test_under_an_ema_it_is_the_averages(make_trainer):
    module = UsersModule()
    make_trainer(callbacks=[EMAWeightAveraging(decay=0.5), CalibratedNLL()], max_epochs=2).fit(
        module, loader(), val_loader()
    )
    assert module.logged == pytest.approx(module.expected, rel=1e-5)


def test_training_goes_as_it_would_without(make_trainer):
    weights = []
    for callbacks in ([], [CalibratedNLL()]):
        torch.manual_seed(3)
        module = UsersModule()
        module.net[1].train = lambda mode=True, layer=module.net[1]: layer  # dropout that draws in evaluation too
        module.on_validation_end = module.on_validation_batch_end = lambda *args: None
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(), val_loader())
        weights.append(module.net[0].weight.detach())
        assert module.training
    assert torch.equal(*weights)


def test_several_loaders(make_trainer):
    values = []
    for idx in (0, 1):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks=[CalibratedNLL(dataloader_idx=idx)])
        trainer.fit(Cloned(), loader(), [loader(VAL_X[:20], VAL_Y[:20]), val_loader()])
        values.append(trainer.callback_metrics["val_nll_calibrated"].item())
    assert values[0] != values[1]
    with pytest.raises(
        InputError, match="`dataloader_idx` must be the index of one of the 1 validation loaders, but it is 1"
    ):
        make_trainer(callbacks=[CalibratedNLL(dataloader_idx=1)]).fit(UsersModule(), loader(), val_loader())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (DataLoader(VAL_X, batch_size=8), "The validation data must have targets, but a batch has none"),
        (loader(VAL_X, VAL_X), "does not fit Classification.*integer class labels, but they are torch.float32"),
        (loader(VAL_X, VAL_Y + 7), r"labels in \[0, 2\), but their values go from 7"),
        (loader(VAL_X * math.nan, VAL_Y), "NaN"),
    ],
)
def test_bad_validation_data_is_named(make_trainer, data, match):
    class Silent(UsersModule):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(InputError, match=match):
        make_trainer(callbacks=[CalibratedNLL()]).fit(Silent(), loader(), data)


TWO_RANKS = """
import json, torch
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.callbacks.calibrated_nll import CalibratedNLL
from lightning_uq.errors import InputError
from lightning_uq.functional.temperature import calibrated_nll
torch.manual_seed(0)
x = torch.randn(21, 4)
y = torch.where(torch.rand(21) < 0.4, torch.randint(2, (21,)), (x[:, 0] > 0).long())
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
def trainer(callback, **kwargs):
    return Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=1, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False, default_root_dir=".", callbacks=[callback])
def main():
    values = []
    for n in (21, 1):
        module = Module()
        run = trainer(CalibratedNLL())
        run.fit(module, DataLoader(TensorDataset(x, y), batch_size=4), DataLoader(TensorDataset(x[:n], y[:n]), batch_size=4))
        with torch.no_grad():
            values.append([run.callback_metrics["val_nll_calibrated"].item(), calibrated_nll(module(x[:n]), y[:n]).item()])
    bad = torch.where(torch.arange(21) == 1, float("nan"), x[:, 0]).unsqueeze(1).expand(21, 4)  # rank 1's alone
    def predict(model, x):
        if x.isnan().any():
            raise InputError("this rank's own error")
        return model(x)
    text = None
    try:
        trainer(CalibratedNLL(predict_fn=predict)).fit(
            Module(), DataLoader(TensorDataset(x, y), batch_size=4), DataLoader(TensorDataset(bad, y), batch_size=4))
    except InputError as error:
        text = str(error)
    texts = [None, None]
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(texts, text)
    if run.is_global_zero:
        json.dump({"values": values, "text": text}, open(out, "w"))
if __name__ == "__main__":
    main()
"""


def test_two_ranks_count_each_sample_once_and_raise_together(run_script):
    result = run_script(TWO_RANKS)
    for logged, expected in result["values"]:
        assert logged == pytest.approx(expected, rel=1e-5)
    assert result["text"] == "this rank's own error"

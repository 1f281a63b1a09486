import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.load import load_fitted
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import CategoricalPrediction
from tests.tolerance import tolerance

X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SIZES = {"in_features": 4, "out_features": 3, "hidden_sizes": [32], "dropout": 0.2}
BASE = Factory("lightning_uq.networks.mlp.MLP", SIZES)
ADAM = functools.partial(torch.optim.Adam, lr=0.02)


def loader(y=Y, x=X) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("mask", ["shared", "per_example"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_it_learns(make_trainer, mask, precision):
    module = DropoutModule(BASE, mask=mask, num_train_samples=4, optimizer=ADAM)
    trainer = make_trainer(max_epochs=15, precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_accuracy"] > 0.8
    (again,) = trainer.test(module, loader(), verbose=False)
    assert result == again


def test_regression(make_trainer):
    base = Factory("lightning_uq.networks.mlp.MLP", {**SIZES, "out_features": 2})
    module = DropoutModule(base, task="regression", optimizer=ADAM)
    make_trainer(max_epochs=2).fit(module, loader(X[:, :1]))
    assert (module.predict(X).epistemic_variance > 0).all()


def test_a_checkpoint_gives_the_same_numbers(make_trainer, tmp_path):
    module = DropoutModule(BASE, mask="per_example", optimizer=ADAM)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = DropoutModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.network.mask == "per_example"
    assert torch.equal(again.eval()(X), module.eval()(X))


def test_a_density_is_of_the_network_without_masks(make_trainer, tmp_path):
    module, gmm = DropoutModule(BASE, optimizer=ADAM).double(), FitGMM(feature_transform="raw")
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(callbacks=[gmm, checkpoint], enable_checkpointing=True, precision="64-true")
    trainer.fit(module, loader(), loader())
    rows = loader(x=X.double())
    plain = FitGMM(feature_transform="raw").fit(module.network.network, rows)
    prediction = CategoricalPrediction.cat(trainer.predict(module, rows))
    expected = -plain.score(module.network.network, rows)
    torch.testing.assert_close(prediction.log_density, expected, rtol=1e-9, atol=1e-9)
    probs, log_density, _ = load_fitted(gmm.uq_ckpt_path)(X).values()  # the file's weights in a float32 network
    torch.testing.assert_close(probs, prediction.probs.float(), **tolerance(torch.float32))
    torch.testing.assert_close(log_density, prediction.log_density, **tolerance(torch.float32))

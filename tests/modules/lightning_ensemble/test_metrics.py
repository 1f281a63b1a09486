"""Predictions and metrics of an ensemble of LightningModules as a whole."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_uq.modules.lightning_ensemble.metrics
from lightning_uq.errors import InputError
from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import SEED, Lit, M, dataset, loader


def test_forward_and_predict_are_the_ensembles(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    x = dataset(20).tensors[0]
    ensemble.eval()
    expected = torch.stack([ensemble.network.members[i](x) for i in range(M)])
    assert torch.equal(ensemble(x), expected)
    predictions = make_trainer().predict(ensemble, loader(20))
    assert torch.allclose(torch.cat([p.probs for p in predictions]), expected.softmax(2).mean(0), atol=1e-6)


def test_output_picks_the_logits_from_what_a_member_returns(make_trainer):
    class Dict(Lit):
        def forward(self, x):
            return {"scores": self.net(x), "features": x}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])["scores"], batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(InputError, match=r"returned a dict with keys \['features', 'scores'\].*argument `output`"):
        make_trainer().predict(EnsembleModule(Dict, num_members=2), loader())
    ensemble = EnsembleModule(Dict, num_members=2, output=lambda out: out["scores"])
    trainer = make_trainer()
    trainer.fit(ensemble, loader(), loader(20))
    assert "ensemble/val_nll" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (lambda x, y: TensorDataset(x, x[:, :2]), "the targets are not class labels"),
        (lambda x, y: TensorDataset(x, torch.where(y == 0, -1, y)), "the targets are not class labels"),
        (lambda x, y: [{"a": a, "b": a} for a in x], "A mapping batch must hold `input`"),
        (lambda x, y: TensorDataset(x), "the batches hold no target"),
    ],
)
def test_targets_that_do_not_fit_are_left_to_the_member(batch, reason, make_trainer, monkeypatch):
    said = []
    for how in ("rank_zero_info", "rank_zero_warn"):  # a warning if predictions would fail too
        monkeypatch.setattr(lightning_uq.modules.lightning_ensemble.metrics, how, said.append)

    class Free(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(1.0), batch_size=8)

    trainer = make_trainer(max_epochs=2)
    trainer.fit(
        EnsembleModule(Free, num_members=2, seed=SEED), loader(), DataLoader(batch(*dataset(20).tensors), batch_size=8)
    )
    assert trainer.callback_metrics["val_loss"] == 1.0
    assert not any(name.startswith("ensemble/") for name in trainer.callback_metrics)
    assert len(said) == 1
    assert reason in said[0]


def test_several_loaders(make_trainer):
    class Two(Lit):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("loader", float(dataloader_idx), batch_size=1)

        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("loader", float(dataloader_idx), batch_size=1, add_dataloader_idx=False)

    ensemble = EnsembleModule(Two, num_members=2, seed=SEED)
    trainer = make_trainer()
    results = trainer.validate(ensemble, [loader(20), loader(12)], verbose=False)
    assert results[1]["loader/dataloader_idx_1"] == 1.0
    assert results[1]["ensemble/val_nll/dataloader_idx_1"] != results[0]["ensemble/val_nll/dataloader_idx_0"]


class MeanOnly(LightningModule):
    """A regressor without a variance: right for its own steps, but no density to score."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_members_without_a_density_train_and_validate_by_their_own_steps(make_trainer):
    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
    ensemble = EnsembleModule(MeanOnly, num_members=2, task="regression")
    trainer = make_trainer()
    trainer.fit(ensemble, data, data)
    assert set(trainer.callback_metrics) == {"val_loss", "member_0/val_loss", "member_1/val_loss"}
    with pytest.raises(InputError, match="a function that computes them as `output`"):
        trainer.predict(ensemble, data)


class NllOfLogProbs(Lit):
    """Returns probabilities, which its own loss knows and a softmax classifier's metrics do not."""

    def forward(self, x):
        return super().forward(x).softmax(1)


def test_metrics_that_do_not_fit_never_stop_members_that_train_alone(make_trainer):
    trainer = make_trainer()
    trainer.fit(EnsembleModule(NllOfLogProbs, num_members=2, seed=SEED), loader(), loader(20))
    assert not [name for name in trainer.callback_metrics if name.startswith("ensemble/")]
    assert "val_loss" in trainer.callback_metrics


def test_metrics_of_a_part_of_the_data_do_not_pass_for_all_of_it(make_trainer):
    """A later batch has a label that the task does not know."""

    class Ignores(Lit):
        def validation_step(self, batch, batch_idx):
            pass

        test_step = validation_step

    x, y = dataset(20).tensors
    y = y.clone()
    y[12] = -100
    ensemble = EnsembleModule(Ignores, num_members=2, seed=SEED)
    (found,) = make_trainer().test(ensemble, DataLoader(TensorDataset(x, y), batch_size=8), verbose=False)
    assert not any(name.startswith("ensemble/") for name in found)

"""The metrics of an ensemble of LightningModules on two ranks: both log the same, whatever each rank has seen."""

CODE = """
import json, os, torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
import lightning_uq.modules.lightning_ensemble.metrics as metrics
from lightning_uq.modules.ensemble import EnsembleModule

RANK = int(os.environ.get("LOCAL_RANK", 0))
told = []
metrics.rank_zero_info = told.append  # here on both ranks


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1].clamp(0)), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OnRankZero(IterableDataset):
    def __iter__(self):
        return iter(zip(x, self.targets())) if RANK == 0 else iter(())

    def targets(self):
        return y


class NumbersOnRankZero(OnRankZero):
    def targets(self):
        return x[:, :3]


generator = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
good = TensorDataset(x, y)
bad = y.clone()
bad[13] = -100  # rank 1 has the odd rows
bad = TensorDataset(x, bad)


def run(*data):
    told.clear()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )
    loaders = [DataLoader(d, 2) for d in data]
    trainer.fit(EnsembleModule(Lit, num_members=2, seed=0), DataLoader(good, 4), loaders)
    names = sorted(name for name in trainer.callback_metrics if name.startswith("ensemble/"))
    return {"names": names, "told": list(told), "nll": [float(trainer.callback_metrics[n]) for n in names if "nll" in n]}


class Regressor(Lit):
    def validation_step(self, batch, batch_idx):
        pass


def validate(data):
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    ensemble = EnsembleModule(Regressor, num_members=2, seed=0)
    trainer.validate(ensemble, DataLoader(data, 16), verbose=False)
    return {"task": repr(ensemble.task), "logged": {n: float(v) for n, v in trainer.callback_metrics.items()}}


def of_both_ranks(found):
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, found)
    return gathered


results = {
    "rank 1 has a bad row": of_both_ranks(run(bad)),
    "one of two loaders has a bad row": of_both_ranks(run(bad, good)),
    "rank 1 has no batch": of_both_ranks(run(OnRankZero())),
    "rank 1 has no batch to infer the task from": of_both_ranks(validate(NumbersOnRankZero())),
    "rank 1 has no batch of the second loader": of_both_ranks(run(good, OnRankZero())),
}
if RANK == 0:
    json.dump(results, open(out, "w"))
"""


def test_ranks_agree_on_the_metrics_that_they_log(run_script):
    found = run_script(CODE, timeout=120)
    for name, (first, second) in found.items():
        assert first == second, name
    bad = found["rank 1 has a bad row"][0]
    assert bad["names"] == []
    assert len(bad["told"]) == 1
    assert "the targets are not class labels" in bad["told"][0]
    names = found["one of two loaders has a bad row"][0]["names"]
    assert "ensemble/val_nll/dataloader_idx_1" in names
    assert all(name.endswith("dataloader_idx_1") for name in names)
    assert found["rank 1 has no batch"][0]["nll"] == found["rank 1 has no batch of the second loader"][0]["nll"][1:]
    assert found["rank 1 has no batch of the second loader"][0]["names"].count("ensemble/val_nll/dataloader_idx_0") == 1
    inferred = found["rank 1 has no batch to infer the task from"][0]
    assert inferred["task"].startswith("Regression(head='mean'")
    assert set(inferred["logged"]) == {"ensemble/val_loss", "ensemble/val_rmse", "ensemble/val_mae"}

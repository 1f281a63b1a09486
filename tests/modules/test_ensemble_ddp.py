"""EnsembleModule on two processes: the same weights, ranges and metrics as on one that sees the same batches."""

import json

import pytest

CODE = """
import json, os, torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning_uq.data.indexed import Indexed
from lightning_uq.modules.ensemble import EnsembleModule

RANK = int(os.environ.get("LOCAL_RANK", 0))
N = 21  # rank 0 gets 11 rows; rank 1 gets 10, and row 0 once more


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def run(network, size, *, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)
    train = TensorDataset(x, y)
    # What two ranks see: the rows, padded with the first.
    if DEVICES == 1:
        train = TensorDataset(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    if kwargs.get("bootstrap"):
        train = Indexed(train)
    # Lightning would shuffle.
    sampler = DistributedSampler(train, DEVICES, RANK, shuffle=False) if DEVICES > 1 else None
    ensemble = EnsembleModule(network, num_members=3, seed=seed, **kwargs)
    trainer = Trainer(
        accelerator="cpu", devices=DEVICES, strategy="ddp" if DEVICES > 1 else "auto", logger=False, max_epochs=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        accumulate_grad_batches=2,
    )
    trainer.fit(ensemble, DataLoader(train, size // DEVICES, sampler=sampler), DataLoader(TensorDataset(x, y), size // DEVICES))
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val_", "ensemble/", "train"))}
    weights = torch.cat([p.flatten() for p in ensemble.parameters()])
    everyones = trainer.strategy.all_gather(weights).reshape(-1, len(weights))
    assert (everyones == everyones[0]).all()
    return {
        "weights": weights.tolist(),
        "metrics": metrics,
        "seed": ensemble.seed,
        "range": None if ensemble.adversary is None else ensemble.adversary.input_range.tolist(),
    }


results = {
    "stacked": run(mlp, 8, execution="stacked", adversarial_epsilon=0.01),
    "loop": run(mlp, 8, execution="loop", adversarial_epsilon=0.01),
    "vmap": run(mlp, 8, execution="vmap"),
    "lightning": run(Lit, 8),
    "lightning, adversarial": run(Lit, 8, adversarial_epsilon=0.01),
}
if DEVICES == 2:
    # Ranks that draw different seeds take rank 0's, of which the bootstrap depends.
    torch.manual_seed(RANK)
    results["drawn"] = run(mlp, 8, seed=None, bootstrap="poisson")
if RANK == 0:
    json.dump(results, open(out, "w"))
"""


def test_two_processes_give_what_one_gives(run_script):
    one, two = (run_script(CODE.replace("DEVICES", str(n)), timeout=200) for n in (1, 2))
    for name, expected in one.items():
        found = two[name]
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-4, abs=1e-5), name
        if expected["range"] is not None:
            assert found["range"] == pytest.approx(expected["range"])
        own = {k: v for k, v in expected["metrics"].items() if k != "val_loss" and "train" not in k}
        # The members' own `val_loss` counts the padding, as it would alone; this package's metrics do not.
        ours = {k: v for k, v in own.items() if k.startswith("ensemble/") or "lightning" not in name}
        assert ours.keys() >= ({"ensemble/val_nll"} if "lightning" in name else {"val_nll", "val_accuracy"})
        assert {k: found["metrics"][k] for k in ours} == pytest.approx(ours, rel=1e-4), json.dumps(
            [name, found, expected]
        )
    assert two["drawn"]["weights"]

"""Callbacks on a model that FSDP2 shards over two processes: the same fit, weights and predictions as on the whole model in one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    FitGMM,
    FitLaplace,
    OODDetection,
    PredictionWriter,
    TemperatureScaling,
    load_fitted,
    read_predictions,
)
from lightning_uq.networks.fingerprint import weights_fingerprint

N = 21  # in batches of 5: three for rank 0, two for rank 1


class Lit(LightningModule):
    """A user's module with sharded layers, a root that shards the rest, and a BatchNorm whose buffers differ between ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
        )

    def configure_model(self):
        if self.device_mesh is None or hasattr(self.net, "unshard"):
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        # Worse in every epoch, so that the best weights are not the last ones.
        cross_entropy(self(batch[0]), batch[1])
        self.log("worse", float(self.current_epoch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def data(seed=0, shift=0.0, size=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 4, generator=generator) + shift
    score = x[:, 0] + 0.7 * torch.randn(N, generator=generator)
    return DataLoader(TensorDataset(x, score.argsort().argsort() * 3 // N), batch_size=size)


def fits(**options):
    options = {"attach": True, **options}
    held_out = data(4)
    return [
        FitGMM(held_out=held_out, **options),
        FitLaplace(held_out=held_out, **options),
        TemperatureScaling(**options),
    ]


def run(directory, devices, *callbacks, **strategy):
    """A Trainer on one process, or with a sharded model on several."""
    sharded = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1, **strategy)
    return Trainer(
        accelerator="cpu", devices=devices, strategy=sharded if devices > 1 else "auto", callbacks=list(callbacks), max_epochs=2,
        num_sanity_val_steps=1, default_root_dir=directory, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
    )  # fmt: skip


def evaluate(directory, devices, path):
    """The table of predictions and the metrics of a test with fitted states that only the file beside ``path`` holds."""
    writer = PredictionWriter(f"{directory}/table{devices}", format="csv")
    run(directory, devices, *fits(), writer).predict(Lit(), data(2), ckpt_path=path, return_predictions=False)
    tester = run(directory, devices, *fits(), OODDetection(ood={"far": data(3, shift=4.0)}))
    tester.test(Lit(), data(2), ckpt_path=path, verbose=False)
    return {name: float(value) for name, value in tester.callback_metrics.items()}


CODE = """
import json, os, torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from lightning_uq.networks.sharding import gathered
from tests.callbacks.test_sharded import *

directory, weights, distributed = ARGUMENTS
module = Lit()
ours = fits(dataloader=data(1), weights=weights)
checkpoint = ModelCheckpoint(f"{directory}/checkpoints", monitor="worse")
trainer = run(directory, 2, *ours, checkpoint, save_distributed_checkpoint=distributed)
trainer.fit(module, data(size=4), data(1, size=4))
optimizer = trainer.optimizers[0].state[next(iter(trainer.optimizers[0].state))]["step"]
results = {
    "path": ours[0].uq_ckpt_path,
    "best": checkpoint.best_model_path,
    "optimizer_step": float(optimizer),
    "first": module.net[0].weight.full_tensor()[0, 0].item(),
    "fingerprint": weights_fingerprint(module).tolist(),
    "whole": weights_fingerprint(whole(module)).tolist(),
}
tested = checkpoint.best_model_path if weights == "best" else ours[0].uq_ckpt_path
module.eval()(torch.zeros(2, 4))
results["reshards"] = is_dtensor(module.net[0].weight)  # as before the fit, a forward pass frees what it gathers
results["metrics"] = evaluate(directory, 2, tested)

low = two_layers()
options = {"mesh": trainer.strategy.device_mesh["data_parallel"], "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
fully_shard(low[1], **options)
fully_shard(low, **options)
low(torch.zeros(2, 4))  # the root stays gathered, in bfloat16
results["low"] = [weights_fingerprint(low).tolist()]
with gathered(low):
    results["low"] += [weights_fingerprint(low).tolist(), weights_fingerprint(low).tolist()]
    results["dtype"] = str(low[0].weight.dtype)
if trainer.global_rank == 0:
    json.dump(results, open(out, "w"))
"""


def two_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3))


def is_dtensor(tensor):
    return hasattr(tensor, "full_tensor")


def whole(module):
    """A plain copy of a sharded module, whose buffers differ between ranks."""
    copy = Lit()
    state = module.state_dict()
    copy.load_state_dict({name: value.full_tensor() if is_dtensor(value) else value for name, value in state.items()})
    return copy


@pytest.mark.parametrize(("weights", "distributed"), [("last", False), ("best", False), ("best", True)])
def test_two_processes_give_what_one_gives(tmp_path, run_script, weights, distributed):
    two = run_script(CODE.replace("ARGUMENTS", repr((str(tmp_path), weights, distributed))), timeout=200)
    assert Path(two["best"]).is_dir() == distributed
    # The fingerprint is that of the whole module, also after a forward pass, and while the parameters are gathered in another dtype.
    assert two["fingerprint"] == two["whole"]
    assert two["low"] == 3 * [weights_fingerprint(two_layers()).tolist()]
    assert two["dtype"] == "torch.bfloat16"
    assert two["reshards"]

    # One process reads the file with the whole weights, and fits anew on them.
    path = Path(two["path"])
    assert path.name == ("epoch=0-step=3-uq.ckpt" if weights == "best" else "uq-last.ckpt")
    content = torch.load(path, weights_only=True)
    module = Lit()
    module.load_state_dict(content["state_dict"])
    # The training went on with the last weights and the last state of the optimizer.
    assert two["optimizer_step"] == 6
    assert (module.net[0].weight[0, 0].item() == two["first"]) == (weights == "last")
    for one in fits():
        one.fit(module, data(1))
        state = content["callbacks"][one.state_key]
        torch.testing.assert_close(state["fingerprint"], one.state_dict()["fingerprint"])
        assert state["tensors"].keys() == one.state_dict()["tensors"].keys()
        for name, value in one.state_dict()["tensors"].items():
            if isinstance(value, torch.Tensor):
                # Slopes between neighbouring scores divide by their difference, which float32 features leave few digits.
                rtol = 1e-2 if name.endswith("slopes") else 1e-4
                torch.testing.assert_close(
                    state["tensors"][name], value, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
                )
            else:
                assert state["tensors"][name] == value, name

    metrics = evaluate(tmp_path, 1, path)
    assert two["metrics"] == pytest.approx(metrics, rel=1e-4)
    sharded, plain = (read_predictions(tmp_path / f"table{devices}") for devices in (2, 1))
    assert plain["index"].tolist() == list(range(N))
    for name, values in plain.items():
        np.testing.assert_allclose(sharded[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    network = load_fitted(path, Lit())
    x = data(2).dataset.tensors[0]
    np.testing.assert_allclose(network(x)["probs"][:, 0].detach().numpy(), plain["prob_0"], rtol=1e-4)

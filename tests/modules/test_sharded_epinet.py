"""An epinet on a frozen base that FSDP2 shards over two processes: the same training, metrics and predictions as in one process."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_uq import (
    EpinetHead,
    EpinetModule,
    FitGMM,
    PredictionWriter,
    TemperatureScaling,
    UnsupportedError,
    read_predictions,
)
from lightning_uq.modules.sharded_base import ShardedBase

N = 21  # evaluated in batches of 5: three for rank 0, two for rank 1
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)  # Adam would blow up the rounding of gradients near zero


class Base(nn.Module):
    """A pretrained network as its author writes it: lists of blocks in a list, with BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Linear(4, 6)
        self.stages = nn.ModuleList(
            [nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())]) for _ in range(2)]
        )
        self.last = nn.Linear(6, 3)
        self.stages[0][0][1].running_mean.fill_(0.3)
        with torch.no_grad():  # so that all classes occur
            self.last.bias -= self.eval()(torch.randn(500, 4)).mean(0)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = x + block(x)
        return self.last(x)


def make(seed=5):
    """The module. Another seed gives another head, which the first rank's has to replace."""
    base = Base()
    torch.manual_seed(seed)
    head = EpinetHead(index_dim=2, hidden_sizes=(4,))
    return SameIndices(base, head=head, freeze_base=True, num_train_samples=3, num_eval_samples=20, optimizer=SGD)


def data(seed=0, size=5, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    with torch.no_grad():
        logits = Base().eval()(x) + 0.3 * torch.randn(n, 3, generator=generator)
    return DataLoader(TensorDataset(x, logits.argmax(1)), batch_size=size)


class SameIndices(EpinetModule):
    """Draws the same indices in each step and on each rank, so that two ranks compute the gradient of one."""

    def training_loss(self, x, y, batch):
        torch.manual_seed(int(self.trainer.global_step))
        return super().training_loss(x, y, batch)


def run(directory, devices, *callbacks, **options):
    sharded = ModelParallelStrategy(
        data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    return Trainer(
        accelerator="cpu", devices=devices, strategy=sharded if devices > 1 else "auto", callbacks=list(callbacks), max_epochs=2,
        num_sanity_val_steps=1, default_root_dir=directory, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), **options,
    )  # fmt: skip


def train(directory, devices, **options):
    """Train on 16 rows per step, in all, with validation on an odd number of batches; test and predict."""
    module = make(5 + int(os.environ.get("LOCAL_RANK", 0)))
    checkpoint = ModelCheckpoint(f"{directory}/ckpt{devices}", monitor="val_loss")
    fitted = [FitGMM(dataloader=data(1)), TemperatureScaling(dataloader=data(1))]
    trainer = run(directory, devices, checkpoint, *fitted, **options)
    training = data(size=16 // devices, n=32)
    if devices == 1:  # the rows of a step are those of two ranks, whose sampler Lightning makes
        training = DataLoader(training.dataset, 16, sampler=DistributedSampler(training.dataset, 1, 0))
    trainer.fit(module, training, data(1))
    # The training loss is the one of a rank, as under DDP.
    results = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "train_loss"}
    trainer.test(module, data(2), verbose=False)
    results |= {name: float(value) for name, value in trainer.callback_metrics.items() if name != "train_loss"}
    writer = PredictionWriter(f"{directory}/table{devices}", format="csv")
    run(directory, devices, writer, *fitted).predict(module, data(2), return_predictions=False)
    return module, results, checkpoint.best_model_path


CODE = """
import json
from torch.distributed.tensor import DTensor
from tests.modules.test_sharded_epinet import *

module, results, path = train(DIRECTORY, 2, **OPTIONS)
results = {
    "metrics": results,
    "path": path,
    "sharded": [name for name, one in module.named_parameters() if isinstance(one, DTensor)],
    "head": [one.tolist() for name, one in module.named_parameters() if not isinstance(one, DTensor)],
}
others = [None, None]
torch.distributed.all_gather_object(others, results["head"])
results["same"] = others[0] == others[1]
if module.global_rank == 0:
    json.dump(results, open(out, "w"))
"""


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}])
def test_two_processes_train_what_one_trains(tmp_path, run_script, options):
    code = CODE.replace("DIRECTORY", repr(str(tmp_path))).replace("OPTIONS", repr(options))
    two = run_script(code, timeout=200)
    module, metrics, _ = train(tmp_path, 1, **options)
    names = [name for name, _ in module.network.base.named_parameters()]
    assert two["sharded"] == [f"network.base.{name}" for name in names]
    assert two["same"]
    head = [one for name, one in module.named_parameters() if not name.startswith("network.base.")]
    for one, other in zip(two["head"], head, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=2e-4, atol=2e-5)
    assert two["metrics"].keys() == metrics.keys()
    assert two["metrics"] == pytest.approx(metrics, rel=2e-3)
    sharded, plain = (read_predictions(tmp_path / f"table{devices}") for devices in (2, 1))
    assert plain["index"].tolist() == list(range(N))
    for name, values in plain.items():
        np.testing.assert_allclose(sharded[name], values, rtol=2e-3, atol=1e-3, err_msg=name)
    # One process reads the file.
    assert Path(two["path"]).is_file()
    loaded = EpinetModule.load_from_checkpoint(two["path"], network=Base(), weights_only=True)
    reference = dict(module.named_parameters())
    for name, one in loaded.named_parameters():
        torch.testing.assert_close(one, reference[name], rtol=2e-2, atol=1e-3)


def test_a_base_that_is_trained_is_refused(tmp_path):
    module = EpinetModule(Base())
    module.trainer = run(tmp_path, 2)
    with pytest.raises(UnsupportedError, match=r"does not support ModelParallelStrategy.*freeze_base=True"):
        module.setup("fit")


@pytest.mark.parametrize("callback", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(swa_lrs=0.1)])
def test_averages_of_weights_are_refused(tmp_path, callback):
    trainer = run(tmp_path, 2, callback)
    with pytest.raises(UnsupportedError, match=f"does not support {type(callback).__name__}"):
        ShardedBase(module := make(), module.network.base).setup(trainer, module, "fit")
    run(tmp_path, 1).fit(module, data())  # the same module under another strategy

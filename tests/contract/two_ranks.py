"""Run as a script: every case on two processes; rank 0 keeps what came of it, and test_distributed.py compares.

python -m tests.contract.two_ranks STRATEGY FOLDER [NAME ...]
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks import PredictionWriter
from tests.contract.cases import (
    CALLBACKS,
    METRICS,
    MODULES,
    CallbackCase,
    Measured,
    MetricCase,
    ModuleCase,
    UsersModule,
    loader,
)
from tests.contract.running import TEST, TRAIN, VAL
from tests.leaving import LeaveAtOnce
from tests.metrics.cases import ROWS

ODD = TRAIN + 1  # a rank more than the other


class UsersShardedModule(UsersModule):
    """The user's module, which FSDP2 shards as in Lightning's documentation."""

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        for layer in (self.net[0], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Lightning cannot load the state of an optimizer that has none.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_trainer(strategy: str, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Two ranks in float64 that write nothing but a best checkpoint."""
    leave = [LeaveAtOnce()] if strategy == "ddp_spawn" else []
    chosen: str | ModelParallelStrategy = strategy
    if strategy == "fsdp2":
        chosen = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=chosen,
        plugins=DoublePrecision(),  # for this strategy, Lightning refuses "64-true" by name
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *leave],
    )


def run_module(case: ModuleCase, strategy: str, folder: Path) -> dict[str, Any]:
    """Train on two ranks; validate, test and write predictions of the best weights on them."""
    torch.manual_seed(0)
    module = case.build()
    monitor = "ensemble/val_loss" if "user's" in case.name else "val_loss"
    checkpoint = ModelCheckpoint(dirpath=folder, filename=slug(case.name), monitor=monitor)
    writer = PredictionWriter(folder / f"{slug(case.name)}-predictions", case.file_format)
    trainer = make_trainer(strategy, callbacks=[checkpoint, writer])
    trainer.fit(module, loader(case.task, ODD, shuffle=True), loader(case.task, VAL, 1))
    result = {"best": checkpoint.best_model_path, "weights": _flat(module), "is_sharded": _is_sharded(module)}
    if strategy != "ddp_spawn":
        (result["validated"],) = trainer.validate(module, loader(case.task, VAL, 1), ckpt_path="best", verbose=False)
        (result["tested"],) = trainer.test(module, loader(case.task, TEST, 2), ckpt_path="best", verbose=False)
        trainer.predict(module, loader(case.task, TEST, 2), ckpt_path="best", return_predictions=False)
        everyone = trainer.strategy.all_gather(_flat(module)).reshape(2, -1)
        result["ranks_agree"] = bool((everyone[0] == everyone[1]).all())
    return result


def run_callback(case: CallbackCase, strategy: str, folder: Path) -> dict[str, Any]:
    """Train with the callback on two ranks, and test the best weights with it."""
    torch.manual_seed(0)
    module = UsersShardedModule() if strategy == "fsdp2" else UsersModule()
    callback = case.build()
    checkpoint = ModelCheckpoint(dirpath=folder, filename=slug(case.name), monitor="val_loss")
    trainer = make_trainer(strategy, callbacks=[callback, checkpoint])
    kind = "classification"
    trainer.fit(module, loader(kind, ODD, shuffle=True), loader(kind, VAL, 1))
    best = checkpoint.best_model_path
    result = {"best": best, "state": callback.state_dict().get("tensors"), "is_sharded": _is_sharded(module)}
    if strategy != "ddp_spawn":
        (result["validated"],) = trainer.validate(module, loader(kind, VAL, 1), ckpt_path=best, verbose=False)
        (result["tested"],) = trainer.test(module, loader(kind, TEST, 2), ckpt_path=best, verbose=False)
    return result


def run_metric(case: MetricCase, strategy: str, folder: Path) -> dict[str, Any]:
    """The metric over all rows, an odd number."""
    rows = DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=7)
    (tested,) = make_trainer(strategy).test(Measured(case.key), rows, verbose=False)
    return {"tested": tested}


def _is_sharded(module: torch.nn.Module) -> bool:
    return any(isinstance(one, DTensor) for one in module.parameters())


def slug(name: str) -> str:
    """A case's name as a file's."""
    return name.replace(" ", "_").replace(",", "")


def _flat(module: torch.nn.Module) -> torch.Tensor:
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in module.state_dict().values()]
    return torch.cat([tensor.detach().double().flatten() for tensor in whole])


def main(strategy: str, folder: Path, names: list[str]) -> None:
    """Every named case, or all; an error is kept as text, so that one case does not hide the others."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = {ModuleCase: run_module, CallbackCase: run_callback, MetricCase: run_metric}
    metrics = [] if strategy == "fsdp2" else METRICS
    for case in [*MODULES, *CALLBACKS, *metrics]:
        if names and case.name not in names:
            continue
        run = runs[type(case)]
        try:
            result = run(case, strategy, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            torch.save(result, folder / f"{slug(case.name)}.pt")
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # at once: see tests/conftest.py


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

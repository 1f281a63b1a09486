"""One training of the comparison, under Lightning's Trainer."""

import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.testbed import num_epochs
from lightning_uq.compare.training.isolation import IsolatedCallbacks
from lightning_uq.compare.training.reading import data_for, is_foreign, logger_for
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.method import Method, Monitor


@dataclass(frozen=True)
class Trained:
    """One training, with the weights that its recipe keeps.

    Attributes:
        module: The trained module.
        callbacks: The fitted post-training callbacks of each method that uses it.
        seconds: For each of those methods, the time of the training and of its own callbacks.
        epochs: Number of epochs of the training.
        shared_seconds: The time of the training without callbacks.
        best: The best value of the validation metric by which the epoch is chosen; None if the last weights are kept.
        stopped: When and why the training stopped, if its validation metric was not finite.
        diverged: The methods whose own callbacks could not be fitted, because the network's outputs are not finite, and why.
    """

    module: LightningModule
    callbacks: dict[str, list[Callback]]
    seconds: dict[str, float]
    epochs: int
    shared_seconds: float
    best: float | None
    stopped: str | None
    diverged: dict[str, str]


def train(
    trainee: Method,
    readers: Sequence[Method],
    problem: Problem,
    seed: int,
    configuration: Configuration,
    progress: Progress,
    devices: int | list[int] = 1,
    *,
    monitor: Monitor | None,
) -> Trained:
    """Train once for all methods that use the result. Their post-training callbacks are fitted under the same Trainer.

    A module without parameters is not trained.

    Args:
        trainee: The trained method.
        readers: The methods that use the training.
        problem: The data of the seed.
        seed: The seed.
        configuration: The configuration, with the recipe.
        progress: Gets the training and its epochs.
        devices: Lightning's devices.
        monitor: The validation metric that stops the training and whose best epoch is kept; None: the last weights are kept.
    """
    recipe, setting = configuration.recipe.for_task(problem.data.task), problem.setting
    assert recipe.max_epochs is not None
    assert recipe.patience is not None
    progress.training(trainee.name, seed)
    isolated: dict[str, IsolatedCallbacks] = {}
    with seeded(seed), tempfile.TemporaryDirectory() as directory:
        for method in readers:
            isolated[method.name] = IsolatedCallbacks(method.make_callbacks(setting), method.name)
        start = time.perf_counter()
        module = trainee.make_module(setting)
        fixed = recipe.steps is not None
        stop, best = keepers(module, monitor, directory, recipe.patience)
        kind: Any = in_tree_of(module, Trainer)
        trainer = kind(
            accelerator=configuration.accelerator,
            devices=devices,
            max_epochs=num_epochs(trainee.name, setting) if fixed else recipe.max_epochs,
            callbacks=[*stop, _Epochs(progress, trainee.name, seed), *isolated.values(), *best],
            default_root_dir=directory,
            logger=logger_for(module),
            enable_checkpointing=bool(best),
            limit_val_batches=0 if fixed else 1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        if any(parameter.requires_grad for parameter in module.parameters()):
            trainer.fit(module, datamodule=data_for(module, problem.data))
        total = time.perf_counter() - start
        module.cpu()
        if best:
            # Written above, with hyper-parameters of any kind for a user's own module.
            checkpoint = torch.load(best[0].best_model_path, map_location="cpu", weights_only=not is_foreign(module))
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    shared = total - sum(one.seconds for one in isolated.values())
    return Trained(
        module.eval(),
        {name: one.callbacks for name, one in isolated.items()},
        {name: shared + one.seconds for name, one in isolated.items()},
        trainer.current_epoch,
        shared,
        float(best[0].best_model_score) if best and best[0].best_model_score is not None else None,
        _stopped(trainer, monitor),
        {name: one.diverged for name, one in isolated.items() if one.diverged is not None},
    )


def _stopped(trainer: Trainer, monitor: Monitor | None) -> str | None:
    """When and why a training with a non-finite last validation metric stopped; None for other trainings."""
    value = None if monitor is None else trainer.callback_metrics.get(monitor.name)
    if monitor is None or value is None or math.isfinite(value):
        return None
    count = "1 epoch" if trainer.current_epoch == 1 else f"{trainer.current_epoch} epochs"
    return f"after {count}, as {monitor.name} was {float(value):g}"


def keepers(
    module: LightningModule, monitor: Monitor | None, directory: str, patience: int
) -> tuple[list[Callback], list[ModelCheckpoint]]:
    """The callbacks that stop a training and keep its best epoch; none without a monitor."""
    if monitor is None:
        return [], []
    stopping, checkpoint = in_tree_of(module, EarlyStopping), in_tree_of(module, ModelCheckpoint)
    return (
        [stopping(monitor.name, patience=patience, mode=monitor.mode)],
        [checkpoint(directory, "best", monitor=monitor.name, mode=monitor.mode, save_weights_only=True)],
    )


class _Epochs(Callback):
    """Reports every epoch."""

    def __init__(self, progress: Progress, method: str, seed: int) -> None:
        self.progress, self.method, self.seed = progress, method, seed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.epoch(self.method, self.seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with every random state set to ``seed``; the states are restored afterwards."""
    with isolate_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # what a method may use is the global state
        torch.manual_seed(seed)
        yield

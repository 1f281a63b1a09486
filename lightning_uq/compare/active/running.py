"""Running an active-learning experiment, round by round."""

import functools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_uq.active_learning import PoolDataModule, acquisition_rounds, balanced_positions, read_rounds
from lightning_uq.compare.active.configuration import ActiveConfiguration
from lightning_uq.compare.active.data import PoolData, open_pool
from lightning_uq.compare.active.results import ActiveResult
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.training.quiet import one_thread, quiet
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError
from lightning_uq.method import Setting

LEARNING_RATE = 1e-3


def run_active(
    configuration: ActiveConfiguration, folder: Path, progress: Progress | None = None, *, resume: bool = False
) -> ActiveResult:
    """Run every strategy with every seed. The first labels of a seed are the same for all.

    Args:
        configuration: What to run.
        folder: Where each round is written, ``rounds/METHOD/STRATEGY/SEED/round-<k>.json``.
        progress: Told of each run, and of each round as of an epoch.
        resume: Whether rounds that the folder holds are kept, and the runs go on after them.

    Raises:
        InputError: The folder holds rounds already, or those of another configuration.
    """
    progress = progress or Progress()
    recorded = _check_folder(configuration, folder, resume)
    names = configuration.scores
    progress.start(len(names) * configuration.seeds, configuration.num_rounds, 0)
    rounds: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    notes: tuple[str, ...] = ()
    with one_thread(), quiet():
        for seed in range(configuration.seed, configuration.seed + configuration.seeds):
            data = open_pool(
                configuration.data,
                seed,
                root=configuration.root,
                target=configuration.target,
                network=configuration.network,
            )
            notes = data.notes
            recorded.parent.mkdir(parents=True, exist_ok=True)
            recorded.write_text(json.dumps(configuration.recorded, indent=1) + "\n")
            for name in names:
                start = time.perf_counter()
                progress.training(name, seed)
                strategy, method = configuration.parts(name)
                own = folder / "rounds" / method / strategy / str(seed)
                for _ in _run(configuration, data, name, seed, own):
                    progress.epoch(name, seed)
                rounds[name].append(read_rounds(own)[: configuration.num_rounds])
                progress.trained(name, seed, configuration.num_rounds, time.perf_counter() - start)
    return ActiveResult(configuration, rounds, notes)


def _run(configuration: ActiveConfiguration, data: PoolData, name: str, seed: int, folder: Path) -> Iterator[None]:
    """The rounds of one strategy and seed that the folder does not hold yet."""
    strategy, method_name = configuration.parts(name)
    pool = PoolDataModule(
        data.pool,
        first_labels(data, configuration.initial, seed),
        val=data.val,
        batch_size=configuration.training.batch_size,
        samples_per_epoch=configuration.training.samples,
        seed=seed,
    )
    train = functools.partial(_train, configuration, data, method_name, seed)

    def measure(module: LightningModule) -> dict[str, float]:
        metrics = _metrics(module, data.test)
        if data.is_ambiguous is not None:
            metrics["ambiguous"] = float(data.is_ambiguous[pool.labelled].double().mean())
        return metrics

    done = len(read_rounds(folder))
    loop = acquisition_rounds(train, pool, configuration.num, strategy, measure=measure, folder=folder)
    for _ in range(configuration.num_rounds - done):
        next(loop)
        yield


def first_labels(data: PoolData, number: int, seed: int) -> Tensor:
    """The first labels of a seed, the same number of each class; no ambiguous samples.

    Raises:
        InputError: The number is no multiple of the number of classes.
    """
    num_classes = len(torch.unique(data.labels))
    if number % num_classes:
        raise InputError(f"`initial` must be a multiple of the {num_classes} classes, but it is {number}.")
    candidates = torch.arange(len(data.labels))
    if data.is_ambiguous is not None:
        candidates = candidates[~data.is_ambiguous]
    return candidates[balanced_positions(data.labels[candidates], number // num_classes, seed)]


def _train(
    configuration: ActiveConfiguration, data: PoolData, method_name: str, seed: int, pool: PoolDataModule
) -> LightningModule:
    """A new module of a method, trained on what is labelled."""
    known = methods()
    method = known[method_name]
    setting = Setting(
        data=data.name,
        task=data.task,
        input_shape=data.input_shape,
        num_targets=data.task.num_classes,  # type: ignore[attr-defined]  # open_pool opens classes alone
        num_train=len(pool.labelled),
        backbone=data.backbone,
        optimizer=functools.partial(torch.optim.Adam, lr=LEARNING_RATE),
    )
    with seeded(seed * 1000 + len(pool.labelled)):
        module = known[method.trainee].make_module(setting)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=configuration.training.epochs,
            callbacks=method.make_callbacks(setting),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1.0,
            check_val_every_n_epoch=configuration.training.epochs,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, pool)
    return module.eval()


@torch.no_grad()
def _metrics(module: LightningModule, test: Dataset[Any]) -> dict[str, float]:
    """Accuracy and NLL on the test data."""
    right, nll, number = 0, 0.0, 0
    for x, y in DataLoader(test, 500):
        prediction: Any = module.predict_step((x, y), 0)
        log_probs = prediction.log_probs
        right += int((log_probs.argmax(1) == y).sum())
        nll -= float(log_probs.double().gather(1, y[:, None]).sum())
        number += len(y)
    return {"accuracy": right / number, "nll": nll / number}


def _check_folder(configuration: ActiveConfiguration, folder: Path, resume: bool) -> Path:
    """Refuse rounds that are not to be continued; the file that records on what rounds depend."""
    path = folder / "rounds" / "configuration.json"
    recorded = json.loads(json.dumps(configuration.recorded))
    if path.exists():
        if not resume:
            raise InputError(
                f"`out`: {folder} holds rounds already. Pass `resume` to go on after them, or another directory."
            )
        found = json.loads(path.read_text())
        if found != recorded:
            differing = _differences(found, recorded)
            raise InputError(
                f"`out`: {folder} holds rounds with another value of {', '.join(differing)}. Choose another directory."
            )
    return path


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which two differ, also of those inside a setting."""
    names = []
    for name, value in wanted.items():
        old = found.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            names += _differences(old, value)
        elif old != value:
            names.append(name)
    return names

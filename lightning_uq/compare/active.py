"""Active learning by several strategies on the same data: learning curves, their areas, and what beats random acquisition."""

import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_uq.active_learning import (
    STRATEGIES,
    PoolDataModule,
    acquisition_rounds,
    balanced_positions,
    read_rounds,
)
from lightning_uq.active_learning.strategies import as_strategy
from lightning_uq.compare.active_data import PoolData, open_pool
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.training.quiet import one_thread, quiet
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.functional.student_t import student_t_cdf, student_t_quantile
from lightning_uq.method import Method, Setting
from lightning_uq.report import learning_figure, to_png, write_files
from lightning_uq.report.table import Column

BASELINE = "random"
DEFAULT_SCORES = (BASELINE, "predictive_entropy", "mutual_information", "epig", "badge", "core_set")
LEARNING_RATE = 1e-3
LEVEL = 0.95

COLUMNS = (
    Column("accuracy", "At end", "higher", "prediction", lambda value: f"{value:.3f}", "Accuracy after the last round"),
    Column("area", "Area", "higher", "prediction", lambda value: f"{value:.4f}", "Mean accuracy over the label range"),
    Column(
        "gain", "Gain", "higher", "prediction", lambda value: f"{value:.4f}", "Area minus that of random acquisition"
    ),
    Column("p", "p", None, "prediction", lambda value: f"{value:.3f}", "Of a paired t-test of the gain over seeds"),
    Column("ambiguous", "Ambig.", "lower", "prediction", lambda value: f"{value:.2f}", "Ambiguous share of the labels"),
)


@dataclass(frozen=True)
class ActiveTraining:
    """How each module is trained: Adam for a fixed number of epochs, whose last weights are kept.

    Attributes:
        epochs: Number of epochs.
        samples: Samples drawn in an epoch, for any number of labels.
        batch_size: Samples per batch.
    """

    epochs: int = 20
    samples: int = 640
    batch_size: int = 64

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "samples", "batch_size")


@dataclass(frozen=True)
class ActiveConfiguration:
    """Data, strategies and trainings of an experiment.

    Attributes:
        data: ``"digits"``, ``"mnist"``, ``"dirty_mnist"``, or a path; see :func:`~lightning_uq.compare.active_data.open_pool`.
        scores: Strategies by name. ``strategy@method`` trains another method than ``method``.
        method: The method that is trained, by its name in the comparison.
        seeds: Number of seeds n, ``seed`` ... ``seed + n - 1``: of the split, the first labels and the trainings.
        seed: The first seed.
        initial: Labels at the beginning, the same number of each class.
        num: Labels that are acquired in each round.
        until: Labels at which the last module is trained.
        training: How each module is trained.
        root: Folder of the files.
        target: Target column of a table.
        network: Backbone; None: one that suits the inputs.

    Raises:
        InputError: A number is out of range, or a name unknown.
    """

    data: str = "digits"
    scores: Sequence[str] = DEFAULT_SCORES
    method: str = "ensemble"
    seeds: int = 5
    seed: int = 0
    initial: int = 20
    num: int = 20
    until: int = 300
    training: ActiveTraining = field(default_factory=ActiveTraining)
    root: str | None = None
    target: Sequence[str] = ()
    network: str | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "seeds", "initial", "num")
        if self.until < self.initial:
            raise InputError(f"`until` must be at least `initial`, {self.initial}, but it is {self.until}.")
        if self.seed < 0 or self.seed + self.seeds > 2**32:
            raise InputError(f"`seed` must lie in [0, 2^32 - {self.seeds}], but it is {self.seed}.")
        if not self.scores:
            raise InputError(f"`scores` must name strategies, such as {','.join(STRATEGIES)}, but it is empty.")
        object.__setattr__(self, "scores", tuple(dict.fromkeys(self.scores)))  # the dataclass is frozen
        for score in self.scores:
            strategy, method = self.parts(score)
            as_strategy(strategy)
            if method not in methods():
                raise InputError(f"The method must be one of {', '.join(methods())}, but it is {method!r}.")

    def parts(self, score: str) -> tuple[str, str]:
        """The strategy and the method of an entry of ``scores``."""
        strategy, _, method = score.partition("@")
        return strategy, method or self.method

    @property
    def num_rounds(self) -> int:
        """Number of trainings of a run."""
        return 1 + math.ceil((self.until - self.initial) / self.num)

    @property
    def recorded(self) -> dict[str, Any]:
        """Everything on which a run's rounds depend, but the seed and the strategy."""
        left_out = ("scores", "method", "seeds", "seed", "until", "root")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class ActiveResult:
    """The rounds of all runs.

    Attributes:
        configuration: What was run.
        rounds: For each score and each seed, the rounds as :func:`~lightning_uq.active_learning.read_rounds` reads them.
        notes: Sentences about the data.
    """

    configuration: ActiveConfiguration
    rounds: dict[str, list[list[dict[str, Any]]]]
    notes: tuple[str, ...]

    @property
    def labels(self) -> list[int]:
        """The number of labels of each round [K]."""
        runs = next(iter(self.rounds.values()))
        return [len(one["labelled"]) for one in runs[0]]

    def curve(self, score: str, metric: str = "accuracy") -> Tensor:
        """A metric of each seed and round [S, K], in float64."""
        return torch.tensor(
            [[one["metrics"][metric] for one in run] for run in self.rounds[score]], dtype=torch.float64
        )

    def area(self, score: str) -> Tensor:
        """Mean accuracy over the range of labels, by the trapezoidal rule, of each seed [S]."""
        labels = torch.tensor(self.labels, dtype=torch.float64)
        curve = self.curve(score)
        if len(labels) == 1:
            return curve[:, 0]
        return torch.trapezoid(curve, labels, dim=1) / (labels[-1] - labels[0])

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per score: mean and standard error over seeds of each of :data:`COLUMNS`."""
        rows = []
        for score in self.rounds:
            row: dict[str, Any] = {"method": score, "accuracy": _summary(self.curve(score)[:, -1])}
            row["area"] = _summary(self.area(score))
            if BASELINE in self.rounds and score != BASELINE:
                gain = self.area(score) - self.area(BASELINE)
                row["gain"] = _summary(gain)
                if len(gain) > 1:
                    row["p"] = {"mean": paired_t_test(gain)["p"], "se": None}
            if "ambiguous" in self.rounds[score][0][0]["metrics"]:
                row["ambiguous"] = _summary(self.curve(score, "ambiguous")[:, -1])
            rows.append(row)
        return rows

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``."""
        tests = {}
        if BASELINE in self.rounds and self.configuration.seeds > 1:
            tests = {
                score: paired_t_test(self.area(score) - self.area(BASELINE))
                for score in self.rounds
                if score != BASELINE
            }
        return {
            "configuration": asdict(self.configuration),
            "notes": list(self.notes),
            "labels": self.labels,
            "rows": self.rows(),
            "gain_over_random": tests,
            "curves": {
                score: {metric: self.curve(score, metric).tolist() for metric in runs[0][0]["metrics"]}
                for score, runs in self.rounds.items()
            },
        }


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


def write(result: ActiveResult, directory: Path) -> None:
    """Write ``results.json`` and ``learning_curves.png`` into a directory that exists, both or none."""
    configuration = result.configuration
    figure = learning_figure(
        result.labels,
        {score: result.curve(score) for score in result.rounds},
        baseline=BASELINE,
        title=f"{configuration.data}, {configuration.method}, {configuration.seeds} seeds",
    )
    text = json.dumps(result.results(), indent=1, allow_nan=False) + "\n"
    write_files(directory, {"results.json": text.encode(), "learning_curves.png": to_png(figure)})


def paired_t_test(differences: Tensor) -> dict[str, float]:
    """Mean of paired differences [S] of at least two seeds, its 95 % interval, and the two-sided p-value of Student's t-test.

    Example:
        >>> {name: round(value, 3) for name, value in paired_t_test(torch.tensor([0.1, 0.2, 0.3, 0.2])).items()}
        {'mean': 0.2, 'lower': 0.07, 'upper': 0.33, 'p': 0.016}
    """
    differences = differences.double()
    mean, error = differences.mean(), differences.std() / len(differences) ** 0.5
    df, zero, one = torch.tensor(len(differences) - 1.0), torch.zeros(()), torch.ones(())
    half = student_t_quantile((1 + LEVEL) / 2, df, zero, one) * error
    p = 1.0
    if float(error) > 0:
        p = 2 * float(student_t_cdf(-(mean / error).abs(), df, zero, one))
    elif float(mean) != 0:
        p = 0.0
    return {"mean": float(mean), "lower": float(mean - half), "upper": float(mean + half), "p": p}


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
    method: Method = known[method_name]
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


def _check_positive(configuration: Any, *names: str) -> None:
    for name in names:
        if getattr(configuration, name) < 1:
            raise InputError(f"`{name}` must be at least 1, but it is {getattr(configuration, name)}.")


def _summary(values: Tensor) -> Mapping[str, float | None]:
    return {"mean": float(values.mean()), "se": standard_error(values.tolist())}

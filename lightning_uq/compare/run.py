"""The comparison: every method on the same splits, with the same backbone and training, one row each.

Out-of-distribution data is not seen before the last step: a method's score is fixed in its file, and the evaluated weights
are those of the epoch with the best validation NLL.
"""

import functools
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_uq.compare.configuration import HIDDEN_SIZES, Configuration
from lightning_uq.compare.discovery import find_methods, methods
from lightning_uq.compare.evaluation import Pooled, evaluate
from lightning_uq.compare.testbed import AGENTS, DEFAULT_AGENTS, AgentSetting, agent_setting, num_epochs
from lightning_uq.compare.training import Progress, seeded, train
from lightning_uq.data import ArrayDataModule, TestbedDataModule
from lightning_uq.errors import InputError
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.method import Method, Setting
from lightning_uq.networks.mlp import MLP
from lightning_uq.report.table import ALL_COLUMNS


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        configuration: What was compared, every default filled in.
        rows: One mapping a method, as in ``results.json``.
        pooled: Each method's predictions over all seeds.
        methods: The methods by name.
        num_hypotheses: Each method's Z; None where predictions have no members.
        setting: What the methods knew of the data, for the last seed.
        sizes: Number of samples of each part of the data, for the last seed.
    """

    configuration: Configuration
    rows: list[dict[str, Any]]
    pooled: dict[str, Pooled]
    methods: dict[str, Method]
    num_hypotheses: dict[str, int | None]
    setting: Setting
    sizes: dict[str, int]

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``."""
        return {"data": self.configuration.data, "rows": self.rows}


def compare(configuration: Configuration, progress: Progress | None = None) -> Comparison:
    """Train and evaluate every method with every seed.

    Networks this small run fastest on one thread, and with one thread a result does not depend on the number of cores.

    Args:
        configuration: What to compare.
        progress: Told of every training and epoch.

    Raises:
        InputError: An unknown method or data, an argument out of range, a file that does not hold what it should.
        MissingExtraError: The digits without scikit-learn.

    Example:
        >>> from lightning_uq.compare import Recipe
        >>> quick = Configuration(methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
        >>> row = compare(quick).rows[0]
        >>> row["method"], row["parameters"]
        ('softmax', {'mean': 25864, 'se': None})
    """
    progress = progress or Progress()
    data = configuration.make_data(configuration.seed)
    setting = make_setting(configuration, data)
    chosen, known = choose_methods(configuration.methods, setting)
    configuration = replace(configuration, ood_classes=data.ood_classes, methods=tuple(configuration.methods or chosen))
    groups = share_trainings(chosen)
    epochs = configuration.recipe.max_epochs
    if configuration.recipe.steps is not None:
        epochs = max(num_epochs(trainee, setting) for trainee in groups)
    progress.start(len(groups) * configuration.seeds, epochs)

    values: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    pooled = {name: Pooled() for name in chosen}
    num_hypotheses: dict[str, int | None] = {}
    with _quiet(), one_thread():
        for seed in configuration.all_seeds:
            data = configuration.make_data(seed)
            setting = make_setting(configuration, data)
            for trainee, readers in groups.items():
                trained = train(known[trainee], readers, setting, data, seed, configuration, progress)
                for method in readers:
                    with seeded(seed):
                        evaluation = evaluate(method, trained, data, configuration.accelerator, pooled[method.name])
                    values[method.name].append(evaluation.values)
                    num_hypotheses[method.name] = evaluation.num_hypotheses
    return Comparison(
        configuration,
        rows=[{"method": name, **summarize(values[name])} for name in chosen],
        pooled=pooled,
        methods=chosen,
        num_hypotheses=num_hypotheses,
        setting=setting,
        sizes={part: len(data.dataset(part)) for part in ("train", "val", "test", "ood")},
    )


def summarize(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over seeds of every key; the error is None with one seed, both are where a value is not finite.

    Example:
        >>> summarize([{"nll": 1.0}, {"nll": 3.0}])
        {'nll': {'mean': 2.0, 'se': 1.0}}
    """
    summary: dict[str, dict[str, float | None]] = {}
    for key in (column.key for column in ALL_COLUMNS):
        column = [one[key] for one in values if key in one]
        if not column:
            continue
        if not all(map(math.isfinite, column)):
            summary[key] = {"mean": None, "se": None}  # JSON has no NaN
            continue
        summary[key] = {"mean": statistics.mean(column), "se": standard_error(column)}
    return summary


def choose_methods(names: Sequence[str] | None, setting: Setting) -> tuple[dict[str, Method], dict[str, Method]]:
    """The methods to compare, and all that are known: on a testbed problem its agents replace the methods of their names.

    Args:
        names: Names, ``.py`` files or modules (:func:`~lightning_uq.compare.discovery.find_methods`), in the order of the
            rows; None: all methods, or on a testbed problem its default agents.
        setting: The problem.

    Raises:
        InputError: A method cannot be found, or the method whose network it reads cannot.
    """
    known, testbed = methods(), isinstance(setting, AgentSetting)
    if testbed:
        known |= AGENTS
    if names is None:
        order = list(known)
        # A method that reads another's network stands below that one.
        names = DEFAULT_AGENTS if testbed else sorted(known, key=lambda name: order.index(known[name].trainee))
    chosen, known = find_methods(names, known)
    for name in find_methods([known[name].trainee for name in chosen], known)[0]:
        if known[name].build is None:
            raise InputError(
                f"methods: {name} trains no network that another method could read, since it reads one itself."
            )
    return {name: known[name] for name in chosen}, known


def share_trainings(chosen: Mapping[str, Method]) -> dict[str, list[Method]]:
    """Methods by the one whose training they read. That one is trained once per seed, even if it has no row."""
    groups: dict[str, list[Method]] = {}
    for method in chosen.values():
        groups.setdefault(method.trainee, []).append(method)
    return groups


def make_setting(configuration: Configuration, data: ArrayDataModule) -> Setting:
    """What the methods may know of the data."""
    if isinstance(data, TestbedDataModule):
        return agent_setting(data, configuration.recipe.learning_rate)
    return Setting(
        data=data.name,
        num_features=data.num_features,
        num_classes=data.num_classes,
        num_train=data.num_train,
        network=functools.partial(
            MLP, in_features=data.num_features, out_features=data.num_classes, hidden_sizes=HIDDEN_SIZES
        ),
        optimizer=functools.partial(torch.optim.Adam, lr=configuration.recipe.learning_rate),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch's, as many as there were afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on devices, workers and loggers, once a training; its other warnings are let through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            warnings.filterwarnings("ignore", ".*GPU available but not used.*")
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

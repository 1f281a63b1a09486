"""What a comparison has to do: its methods, and one training per seed for all methods that read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.discovery import find_methods, methods
from lightning_uq.compare.problem import Problem, make_problem
from lightning_uq.compare.testbed import AGENTS, DEFAULT_AGENTS, num_epochs
from lightning_uq.errors import InputError
from lightning_uq.method import Method


@dataclass(frozen=True)
class Job:
    """One training and the methods that read it, for one seed.

    Attributes:
        trainee: Name of the method that is trained.
        readers: Names of the methods that read the training; the trainee itself may be among them.
        seed: The seed.
    """

    trainee: str
    readers: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Plan:
    """The methods of a comparison and its trainings.

    Attributes:
        problem: The data of the first seed.
        chosen: The methods with a row, by name.
        known: All methods by name, since one without a row may be trained for others.
        jobs: All trainings: those of one method after those of another.
        epochs: Epochs that a training takes at most.
    """

    problem: Problem
    chosen: dict[str, Method]
    known: dict[str, Method]
    jobs: tuple[Job, ...]
    epochs: int


def make_plan(configuration: Configuration) -> Plan:
    """Find data and methods, before anything is trained.

    Raises:
        InputError: Data or methods cannot be found, or do not go together.
        MissingExtraError: A package that reads the data is not installed.
    """
    problem = make_problem(configuration, configuration.seed)
    chosen, known = choose_methods(configuration.methods, problem)
    groups = share_trainings(chosen)
    epochs = configuration.recipe.for_task(problem.data.task).max_epochs
    assert epochs is not None
    if configuration.recipe.steps is not None:
        epochs = max(num_epochs(trainee, problem.setting) for trainee in groups)
    jobs = tuple(
        Job(trainee, tuple(method.name for method in readers), seed)
        for trainee, readers in groups.items()
        for seed in configuration.all_seeds
    )
    return Plan(problem, chosen, known, jobs, epochs)


def choose_methods(names: Sequence[str] | None, problem: Problem) -> tuple[dict[str, Method], dict[str, Method]]:
    """The methods to compare, and all that are known: on a testbed problem its agents replace the methods of their names.

    Args:
        names: Names, ``.py`` files or modules (:func:`~lightning_uq.compare.discovery.find_methods`), in the order of the
            rows; None: all methods for the task, without those that only detect where there are no out-of-distribution data; on a testbed
            problem its default agents.
        problem: The problem.

    Raises:
        InputError: A method cannot be found or is not for the task, or the method whose network it reads cannot.
    """
    known = methods(problem.data.task)
    if problem.is_testbed:
        known |= AGENTS
    if names is None:
        order = list(known)
        has_outside = bool(problem.data.ood_dataloaders())
        offered = [name for name in known if has_outside or not known[name].detects_only]
        # A method that reads another's network stands below that one.
        names = (
            DEFAULT_AGENTS if problem.is_testbed else sorted(offered, key=lambda name: order.index(known[name].trainee))
        )
    chosen, known = find_methods(names, known, problem.data.task)
    for name in find_methods([known[name].trainee for name in chosen], known, problem.data.task)[0]:
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

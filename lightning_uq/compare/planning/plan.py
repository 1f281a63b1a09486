"""The plan of a comparison: its methods, and one training per seed for all methods that use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.planning.discovery import find_methods, methods, register
from lightning_uq.compare.planning.marks import Marks, marks_of_seeds
from lightning_uq.compare.planning.own_module import MODULE, module_methods
from lightning_uq.compare.planning.trial import try_methods
from lightning_uq.compare.problem import Problem, make_problem
from lightning_uq.compare.testbed import AGENTS, DEFAULT_AGENTS, num_epochs
from lightning_uq.compare.training.monitor import find_monitor
from lightning_uq.compare.training.quiet import one_thread, quiet
from lightning_uq.errors import InputError
from lightning_uq.method import Method, Monitor


@dataclass(frozen=True)
class Job:
    """One training and the methods that use it, for one seed.

    Attributes:
        trainee: Name of the trained method.
        readers: Names of the methods that use the training, possibly including the trainee. A trial of tuning has none.
        seed: The seed.
        settings: Tuned settings by name, instead of those of the recipe and of the method.
    """

    trainee: str
    readers: tuple[str, ...]
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def is_trial(self) -> bool:
        """Whether it is a trial of tuning, of which only the validation metric is used."""
        return not self.readers


@dataclass(frozen=True)
class Plan:
    """The methods of a comparison and its trainings.

    Attributes:
        problem: The data of the first seed.
        chosen: The methods with a row, by name.
        known: All methods by name, since a method without a row may be trained for others.
        jobs: All trainings, grouped by method.
        epochs: Maximum number of epochs of a training.
        left_out: The methods that cannot run on these data with this network, and why.
        monitors: For each trained method, the validation metric whose best epoch is kept; None: the last weights are kept.
        marks: The marks of each seed's data.
    """

    problem: Problem
    chosen: dict[str, Method]
    known: dict[str, Method]
    jobs: tuple[Job, ...]
    epochs: int
    left_out: dict[str, str] = field(default_factory=dict)
    monitors: dict[str, Monitor | None] = field(default_factory=dict)
    marks: dict[int, Marks] = field(default_factory=dict)


def make_plan(configuration: Configuration) -> Plan:
    """Find data and methods, and try each method, before any training.

    Raises:
        InputError: Data or methods cannot be found, or are incompatible. Incompatible methods that were not named explicitly are left out instead.
        MissingExtraError: A package for reading the data is not installed.
    """
    with quiet():  # the notes on the data include the reports of a table
        problem = make_problem(configuration, configuration.seed)
    chosen, known, required = choose_methods(configuration, problem)
    _check_baseline(configuration, problem, known)
    left_out: dict[str, str] = {}
    monitors: dict[str, Monitor | None] = {}
    with quiet(), one_thread():
        if not problem.is_testbed:
            left_out = try_methods(share_trainings(chosen), known, required, problem, configuration)
            chosen = {name: method for name, method in chosen.items() if name not in left_out}
        groups = share_trainings(chosen)
        if configuration.recipe.steps is None:
            for name in groups:
                monitors[name] = find_monitor(known[name], problem.setting, problem.data, configuration.accelerator)
        marks = marks_of_seeds(configuration, problem)
    epochs = configuration.recipe.for_task(problem.data.task).max_epochs
    assert epochs is not None
    if configuration.recipe.steps is not None:
        epochs = max(num_epochs(trainee, problem.setting) for trainee in groups)
    jobs = tuple(
        Job(trainee, tuple(method.name for method in readers), seed)
        for trainee, readers in groups.items()
        for seed in configuration.all_seeds
    )
    return Plan(problem, chosen, known, jobs, epochs, left_out, monitors, marks)


def choose_methods(
    configuration: Configuration, problem: Problem
) -> tuple[dict[str, Method], dict[str, Method], set[str]]:
    """The methods to compare, all known methods, and the names of those that must run.

    The rows of a user's own module, and the methods of ``method_file``, are added to the named methods. Without names, all methods of
    this package for the task are compared, or, with a module, only its rows. Methods that only detect are left out without out-of-distribution data. On a testbed problem, its agents replace the methods with
    the same names.

    Args:
        configuration: The configuration.
        problem: The data of one seed.

    Raises:
        InputError: A method, or the method whose network it uses, cannot be found or is for another task.
    """
    task, names = problem.data.task, configuration.methods
    known = methods(task)
    if problem.is_testbed:
        known |= AGENTS
    own = module_methods(configuration, problem)
    added, known = register(configuration.method_file, {**known, **own}, task)
    chosen: list[str] = []
    if names is not None:
        chosen, known = find_methods(names, known, task)
    elif problem.is_testbed:
        chosen = list(DEFAULT_AGENTS)
    elif not own:
        has_outside = bool(problem.data.ood_dataloaders())
        offered = [name for name in known if has_outside or not known[name].detects_only]
        chosen = [name for name in offered if name not in added]
    rows = [] if set(own) & set(chosen) else list(own)
    required = {*chosen, *added} if names is not None else set(added)
    order = list(known)
    chosen = list(dict.fromkeys([*rows, *chosen, *added]))
    if names is None and not problem.is_testbed:  # a method that uses another's network comes after it
        chosen.sort(key=lambda name: order.index(known[name].trainee))
    for name in find_methods([known[name].trainee for name in chosen], known, task)[0]:
        if known[name].build is None:
            raise InputError(
                f"methods: {name} trains no network for other methods, since it uses another's network itself."
            )
    if configuration.baseline is not None:
        required.add(configuration.baseline)
    return {name: known[name] for name in chosen}, known, required | {MODULE} & set(own)


def _check_baseline(configuration: Configuration, problem: Problem, known: Mapping[str, Method]) -> None:
    """Reject the name of an unknown method. A known one that is not chosen may be in the directory to which this run adds rows."""
    if configuration.baseline is not None and configuration.baseline not in known:
        raise InputError(
            f"`baseline` is {configuration.baseline!r}, but no method for {problem.data.task} has this name. Choose from {', '.join(known)}."
        )


def share_trainings(chosen: Mapping[str, Method]) -> dict[str, list[Method]]:
    """Methods by the one whose training they use. That method is trained once per seed, even if it has no row."""
    groups: dict[str, list[Method]] = {}
    for method in chosen.values():
        groups.setdefault(method.trainee, []).append(method)
    return groups

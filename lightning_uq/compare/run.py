"""The comparison: every method on the same splits, with the same backbone and training, one row each.

Out-of-distribution data is not seen before the last step: a method's score is fixed in its file, and the evaluated weights
are those of the epoch with the best validation NLL.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.evaluation import evaluate
from lightning_uq.compare.monitor import Monitor
from lightning_uq.compare.plan import Job, Plan, make_plan
from lightning_uq.compare.problem import Problem, make_problem
from lightning_uq.compare.quiet import one_thread, quiet
from lightning_uq.compare.records import Record
from lightning_uq.compare.results import make_results, make_rows
from lightning_uq.compare.training import Progress, seeded, train
from lightning_uq.method import Method


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        configuration: What was compared, every default filled in.
        problem: The data of the first seed.
        methods: The methods by name.
        records: Each method's records, one per seed.
        left_out: Methods that could not run on this data with this network, and why.
        monitors: For each trained method the validation metric whose best epoch was kept; None: the last weights were kept.
    """

    configuration: Configuration
    problem: Problem
    methods: dict[str, Method]
    records: dict[str, list[Record]]
    left_out: dict[str, str] = field(default_factory=dict)
    monitors: dict[str, Monitor | None] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per method, as in ``results.json``."""
        return make_rows(self.records)

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``."""
        return make_results(self.configuration, self.problem, self.methods, self.records, self.left_out, self.monitors)


def compare(
    configuration: Configuration, progress: Progress | None = None, directory: Path | None = None
) -> Comparison:
    """Train and evaluate every method with every seed.

    Networks this small run fastest on one thread, and with one thread a result does not depend on the number of cores.

    Args:
        configuration: What to compare.
        progress: Told of every training and epoch.
        directory: An existing directory in which each record is written as soon as it is there.

    Raises:
        InputError: An unknown method or data, an argument out of range, a file that does not hold what it should.
        MissingExtraError: The digits without scikit-learn.

    Example:
        >>> from lightning_uq.compare import Recipe
        >>> quick = Configuration(methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
        >>> row = compare(quick).rows[0]
        >>> row["method"], row["parameters"]
        ('softmax', {'mean': 25864, 'se': None, 'seeds': [25864]})
    """
    progress = progress or Progress()
    plan = make_plan(configuration)
    configuration = configuration.filled(plan.problem.data, tuple(plan.chosen))
    progress.start(len(plan.jobs), plan.epochs)
    found: dict[str, list[Record]] = {name: [] for name in plan.chosen}
    with quiet(), one_thread():
        for job in plan.jobs:
            for record in run_job(job, plan, configuration, progress):
                found[record.method].append(record)
                if directory is not None:
                    record.save(directory)
    return Comparison(configuration, plan.problem, plan.chosen, found, plan.left_out, plan.monitors)


def run_job(job: Job, plan: Plan, configuration: Configuration, progress: Progress) -> list[Record]:
    """Train once, and evaluate each method that reads the training."""
    problem = make_problem(configuration, job.seed)
    readers = [plan.known[name] for name in job.readers]
    trained = train(plan.known[job.trainee], readers, problem, job.seed, configuration, progress)
    records = []
    for method in readers:
        with seeded(job.seed):
            records.append(evaluate(method, trained, problem, job.seed, configuration.accelerator))
    return records

"""The comparison: every method on the same splits, with the same backbone and training, one row each.

Out-of-distribution data is not seen before the last step: a method's score is fixed in its file, and the evaluated weights
are those of the epoch with the best validation NLL.
"""

import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.directory.run_directory import RunDirectory, open_run
from lightning_uq.compare.directory.writing import write_results
from lightning_uq.compare.interrupts import Interrupted, signals_interrupt
from lightning_uq.compare.jobs.jobs import Workshop, run_jobs
from lightning_uq.compare.planning.plan import Job, Plan, make_plan
from lightning_uq.compare.planning.tuning import Tuning, check_optuna
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.records import Record
from lightning_uq.compare.results import make_results, make_rows
from lightning_uq.errors import InputError, is_interrupt


@dataclass(frozen=True)
class RunOptions:
    """How a comparison is run. No number of its results depends on it.

    Attributes:
        resume: Go on with an interrupted comparison: no training whose records are there is repeated.
        overwrite: Remove an earlier comparison from the directory.
        jobs: Number of processes that train at the same time. A script that asks for several must guard its start with
            ``if __name__ == "__main__":``, since the processes import it.
        save_predictions: Write the predictions of the test rows, too.

    Raises:
        InputError: ``jobs`` is not positive.
    """

    resume: bool = False
    overwrite: bool = False
    jobs: int = 1
    save_predictions: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"`jobs` must be at least 1, but it is {self.jobs}.")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        configuration: What was compared, every default filled in.
        problem: The data of the first seed.
        methods: What a page says of each method, by name.
        records: Each method's records, one per seed; fewer while the comparison is not complete.
        left_out: Methods that could not run on this data with this network, and why.
        tuned: For each method the settings that tuning chose for its training; empty without tuning.
    """

    configuration: Configuration
    problem: Problem
    methods: dict[str, dict[str, Any]]
    records: dict[str, list[Record]]
    left_out: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per method with all seeds, as in ``results.json``."""
        return make_rows({name: one for name, one in self.records.items() if len(one) == self.configuration.seeds})

    def results(self, *, statistics: bool = True) -> dict[str, Any]:
        """The contents of ``results.json``.

        Args:
            statistics: Whether to say which differences can be told from chance. They take seconds.
        """
        results = make_results(
            self.configuration, self.problem, self.methods, self.records, self.left_out, statistics=statistics
        )
        return {**results, "tuned": {row["method"]: self.tuned.get(row["method"], {}) for row in results["rows"]}}


def compare(
    configuration: Configuration,
    progress: Progress | None = None,
    directory: Path | None = None,
    options: RunOptions | None = None,
) -> Comparison:
    """Train and evaluate every method with every seed.

    Networks this small run fastest on one thread, and with one thread a result does not depend on the number of cores.

    In a directory, each record is written as soon as it is there, and ``results.json`` after each training with the rows that are complete. So a run that
    was killed goes on with ``resume``, and its results are those of an uninterrupted one. Methods that are not there yet can join a complete comparison
    if its configuration and data are the same.

    Args:
        configuration: What to compare.
        progress: Told of every training and epoch.
        directory: An existing directory for the records.
        options: How to run; None: from the start, in this process.

    Raises:
        InputError: An unknown method or data, an argument out of range, a file that does not hold what it should, or a directory that holds another
            comparison.
        Interrupted: A signal ended the work. It has what is complete.
        MissingExtraError: The digits without scikit-learn.

    Example:
        >>> from lightning_uq.compare import Recipe
        >>> quick = Configuration(methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
        >>> row = compare(quick).rows[0]
        >>> row["method"], row["parameters"]
        ('softmax', {'mean': 25864, 'se': None, 'seeds': [25864]})
    """
    progress, options = progress or Progress(), options or RunOptions()
    if configuration.recipe.tune:
        check_optuna()
    with ExitStack() as stack:
        stack.enter_context(signals_interrupt())
        plan = make_plan(configuration)
        configuration = configuration.filled(plan.problem.data, tuple(plan.chosen))
        path = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run, notes = open_run(
            path,
            configuration,
            plan,
            resume=options.resume,
            overwrite=options.overwrite,
            save_predictions=options.save_predictions,
        )
        for note in [*notes_on_data(configuration, plan.problem), *notes]:
            progress.note(note)
        return _run(configuration, plan, run, progress, options, can_resume=directory is not None)


def notes_on_data(configuration: Configuration, problem: Problem) -> list[str]:
    """What a user should know of data of their own before hours of training: the task, and what was done to the values.

    Example:
        >>> from lightning_uq.compare.problem import make_problem
        >>> given = Configuration(data="diabetes")
        >>> notes_on_data(given, make_problem(given, 0))
        ['The task is regression, as the targets of diabetes say; --task overrules it.']
    """
    data = problem.data
    if problem.is_testbed or configuration.data in ("digits", "shapes"):
        return list(data.notes)
    source = (
        f"as the targets of {data.name} say; --task overrules it" if configuration.task == "auto" else "as --task says"
    )
    return [f"The task is {data.task}, {source}.", *data.notes]


def _run(
    configuration: Configuration,
    plan: Plan,
    run: RunDirectory,
    progress: Progress,
    options: RunOptions,
    *,
    can_resume: bool,
) -> Comparison:
    """Do what is left to do.

    Args:
        configuration: That of this run; the comparison in the directory may have further methods.
        plan: The plan of this run.
        run: The directory.
        progress: Told of every training and epoch.
        options: How to run.
        can_resume: Whether the directory outlives the run.
    """
    merged = run.state["configuration"]
    whole = replace(
        configuration,
        methods=tuple(merged["methods"]),
        method_file=tuple(merged["method_file"]),
        baseline=merged["baseline"],
        module=merged["module"],
        config=merged["config"],
        contents=merged["contents"],
    )

    def found() -> Comparison:
        records = run.records(configuration.all_seeds)
        tuned = {name: tuning.chosen(one["trained_as"] or name) for name, one in run.methods.items()}
        return Comparison(whole, plan.problem, run.methods, records, run.state["left_out"], tuned)

    tuning = Tuning(run.path, configuration, plan)
    left = open_jobs(plan.jobs, run)
    trainees = _trainees(left)
    total = len(plan.jobs) + configuration.recipe.tune * sum(tuning.tunes(name) for name in _trainees(plan.jobs))
    done = total - len(left) - sum(tuning.left(name) for name in trainees)

    def next_jobs(trainee: str) -> list[Job]:
        trial = tuning.next_trial(trainee)
        if trial is not None:
            return [trial]
        settings = tuple(tuning.chosen(trainee).items())
        return [replace(job, settings=settings) for job in left if job.trainee == trainee]

    workshop = Workshop(configuration, run.path, plan.known, options.save_predictions)
    try:
        progress.start(total, plan.epochs, done)
        jobs = deque(job for name in trainees for job in next_jobs(name))
        for job, finished in run_jobs(jobs, workshop, progress, options.jobs):
            done += 1
            progress.trained(job.trainee, job.seed, finished.epochs, finished.seconds)
            if job.is_trial:
                tuning.tell(job, finished.best, finished.epochs, finished.seconds)
                jobs.extendleft(reversed(next_jobs(job.trainee)))
            elif can_resume:
                write_results(found().results(statistics=False), run.path)
    except BaseException as error:
        comparison = found()
        run.discard_if_empty()
        if is_interrupt(error):
            raise Interrupted(comparison, done, total, can_resume=can_resume and run.has_work) from error
        raise
    return found()


def open_jobs(jobs: Sequence[Job], run: RunDirectory) -> list[Job]:
    """The jobs that are not done, each with the readers that lack a record."""
    left = [replace(job, readers=tuple(name for name in job.readers if not run.has(name, job.seed))) for job in jobs]
    return [job for job in left if job.readers]


def _trainees(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(job.trainee for job in jobs))

"""The comparison: every method on the same splits, with the same backbone and training, one row each.

Out-of-distribution data are not used before the last step. A method's score is fixed in its file, and the evaluated weights
are those of the epoch with the best validation NLL.
"""

import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.directory.lock import locked
from lightning_uq.compare.directory.run_directory import RunDirectory, open_run
from lightning_uq.compare.directory.writing import write_results
from lightning_uq.compare.interrupts import Interrupted, Signals, signals_interrupt
from lightning_uq.compare.jobs.jobs import Workshop, run_jobs
from lightning_uq.compare.planning.plan import Job, Plan, make_plan
from lightning_uq.compare.planning.tuning import Tuning, check_optuna
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.records import Record
from lightning_uq.compare.results import make_results, make_rows
from lightning_uq.errors import InputError, NotFiniteError, is_interrupt


@dataclass(frozen=True)
class RunOptions:
    """How to run a comparison. These options do not affect its results.

    Attributes:
        resume: Whether to continue an interrupted comparison. Trainings with existing records are not repeated.
        overwrite: Whether to remove an earlier comparison from the directory.
        jobs: Number of processes that train at the same time. With several, a script must guard its start with
            ``if __name__ == "__main__":``, since the processes import it.
        save_predictions: Whether to write the predictions of the test rows too.

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
    """The result of :func:`compare`.

    Attributes:
        configuration: The configuration, with all defaults filled in.
        problem: The data of the first seed.
        methods: What a page shows of each method, by name.
        records: Each method's records, one per seed; fewer while the comparison is incomplete.
        left_out: Methods without a row, and why: they could not run on these data with this network, or diverged.
        tuned: For each method, the settings that tuning chose for its training on each seed; empty without tuning.
    """

    configuration: Configuration
    problem: Problem
    methods: dict[str, dict[str, Any]]
    records: dict[str, list[Record]]
    left_out: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per method with all seeds, as in ``results.json``."""
        return make_rows({name: one for name, one in self.records.items() if len(one) == self.configuration.seeds})

    def results(self, *, statistics: bool = True) -> dict[str, Any]:
        """The contents of ``results.json``.

        Args:
            statistics: Whether to compute which differences are significant, which takes seconds.
        """
        return make_results(
            self.configuration,
            self.problem,
            self.methods,
            self.records,
            self.left_out,
            self.tuned,
            statistics=statistics,
        )


def compare(
    configuration: Configuration,
    progress: Progress | None = None,
    directory: Path | None = None,
    options: RunOptions | None = None,
    plan: Plan | None = None,
) -> Comparison:
    """Train and evaluate every method with every seed.

    Such small networks run fastest on one thread, and with one thread, the results do not depend on the number of cores.

    In a directory, each record is written as soon as it exists, and after each training ``results.json`` is written with the complete rows. A killed
    run can therefore be continued with ``resume``, with the results of an uninterrupted one. New methods can be added to a complete comparison
    with the same configuration and data, and so can seeds, with ``resume``.

    A method whose training diverges with a seed has no row, and :attr:`Comparison.left_out` says why. The others continue.

    Args:
        configuration: The configuration.
        progress: Gets every training and epoch.
        directory: An existing directory for the records.
        options: How to run; None: from the start, in this process.
        plan: The plan of this configuration; None: the plan is made here.

    Raises:
        InputError: A method or data are unknown, an argument is out of range, a file is invalid, the directory holds another
            comparison or another process writes to it, or the data have different test rows each time they are built.
        NotFiniteError: Every method diverged with some seed.
        Interrupted: A signal ended the work. The exception has the completed parts.
        MissingExtraError: A package is missing, such as scikit-learn for the digits.

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
        signals = stack.enter_context(signals_interrupt())
        path = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(locked(path))
        plan = plan or make_plan(configuration)
        configuration = configuration.filled(plan.problem.data, tuple(plan.chosen))
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
        return _run(configuration, plan, run, progress, options, signals, can_resume=directory is not None)


def notes_on_data(configuration: Configuration, problem: Problem) -> list[str]:
    """Notes about the user's data before hours of training: the task, and the changes to the values.

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
    signals: Signals,
    *,
    can_resume: bool,
) -> Comparison:
    """Do the remaining work.

    Args:
        configuration: The configuration of this run; the comparison in the directory may have more methods.
        plan: The plan of this run.
        run: The directory.
        progress: Gets every training and epoch.
        options: How to run.
        signals: Reports an interrupt between trainings.
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
        tuned = {
            name: [tuning.chosen(one["trained_as"] or name, seed) for seed in configuration.all_seeds]
            for name, one in run.methods.items()
        }
        return Comparison(whole, plan.problem, run.methods, records, run.left_out, tuned)

    tuning = Tuning(run.path, configuration, plan)
    left = {(job.trainee, job.seed): job for job in open_jobs(plan.jobs, run)}
    count = configuration.recipe.tune
    total = len(plan.jobs) + count * sum(tuning.tunes(job.trainee) for job in plan.jobs)

    def done() -> int:
        missing = open_jobs(plan.jobs, run)
        return total - len(missing) - sum(tuning.left(job.trainee, job.seed) for job in missing)

    test_marks = {seed: marks["test"] for seed, marks in plan.marks.items()}
    workshop = Workshop(configuration, run.path, plan.monitors, test_marks, plan.known, options.save_predictions)

    def next_job(job: Job) -> Job:
        coming = tuning.next_job(job)
        if coming.is_trial:
            progress.trial(job.trainee, job.seed, count - tuning.left(job.trainee, job.seed) + 1, count)
        return coming

    try:
        if left and len(plan.jobs) < len(plan.chosen) * configuration.seeds:
            progress.note(
                f"{_counted(len(plan.jobs), 'training')} for {len(plan.chosen)} methods with {_counted(configuration.seeds, 'seed')}: some methods use "
                "the network of another one."
            )
        progress.start(total, plan.epochs, done())
        jobs = deque(map(next_job, left.values()))
        signals.check()
        # Closed before what is complete is counted: no other process completes one more meanwhile.
        with closing(run_jobs(jobs, workshop, progress, options.jobs)) as results:
            for job, finished in results:
                progress.trained(job.trainee, job.seed, finished.epochs, finished.seconds)
                if job.is_trial:
                    tuning.tell(job, finished.best, finished.epochs, finished.seconds)
                    if not tuning.left(job.trainee, job.seed):
                        progress.note(tuning.outcome(job.trainee, job.seed))
                    jobs.appendleft(next_job(left[job.trainee, job.seed]))
                    signals.check()
                    continue
                for name, reason in finished.diverged.items():
                    run.add_diverged(name, job.seed, reason)
                    progress.note(f"{name} has no row: it diverged at seed {job.seed} ({reason}).")
                if can_resume:
                    write_results(found().results(statistics=False), run.path)
                signals.check()
    except BaseException as error:
        comparison = found()
        run.discard_if_empty()
        if is_interrupt(error):
            raise Interrupted(comparison, done(), total, can_resume=can_resume and run.has_work) from error
        raise
    comparison = found()
    if not comparison.rows:
        reasons = " ".join(f"{name}: {reason}." for name, reason in comparison.left_out.items())
        raise NotFiniteError(f"methods: No method has a row. {reasons}")
    return comparison


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def open_jobs(jobs: Sequence[Job], run: RunDirectory) -> list[Job]:
    """The jobs that are not done, each with the methods that lack a record."""
    left = [
        replace(job, readers=tuple(name for name in job.readers if not run.is_done(name, job.seed))) for job in jobs
    ]
    return [job for job in left if job.readers]

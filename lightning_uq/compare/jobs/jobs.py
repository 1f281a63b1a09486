"""One job of a comparison, from the data to the files of its records, in this process or in one of several."""

import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.jobs.workers import run_in_processes
from lightning_uq.compare.planning.marks import check_test_samples
from lightning_uq.compare.planning.plan import Job, choose_methods
from lightning_uq.compare.planning.tuning import tuned_configuration
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.progress.warning_notes import at_work, reported_warnings
from lightning_uq.compare.training.evaluation import evaluate
from lightning_uq.compare.training.quiet import one_thread, quiet
from lightning_uq.compare.training.saved_predictions import prediction_path
from lightning_uq.compare.training.training import seeded, train
from lightning_uq.errors import NotFiniteError, without_period
from lightning_uq.method import Method, Monitor


@dataclass(frozen=True)
class Finished:
    """The outcome of a job, besides its files.

    Attributes:
        epochs: Number of epochs of the training.
        seconds: Time of the training.
        best: The best value of its validation metric; None if it has none, or diverged.
        diverged: The methods without a record, because the training or its results are not finite, and why.
    """

    epochs: int
    seconds: float
    best: float | None = None
    diverged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workshop:
    """The shared inputs of all jobs, as plain data that can be sent to another process.

    Attributes:
        configuration: The configuration of the comparison.
        directory: The run's directory, for the records.
        monitors: For each trained method, the validation metric whose best epoch is kept; None: the last weights are kept.
        test_marks: For each seed, the mark of its test samples.
        known: All methods by name; None: they are found again from the configuration, as in another process.
        save_predictions: Whether to write the predictions of the test rows too.
    """

    configuration: Configuration
    directory: Path
    monitors: dict[str, Monitor | None]
    test_marks: dict[int, str]
    known: dict[str, Method] | None = None
    save_predictions: bool = False

    def run(self, job: Job, devices: int | list[int], progress: Progress) -> Finished:
        """Train once, and evaluate each method that uses the training. Each record is written atomically.

        Args:
            job: The job.
            devices: Lightning's devices.
            progress: Gets the training and its epochs.

        Raises:
            InputError: The test samples are not those of the plan.
        """
        with reported_warnings(progress, job.trainee, job.seed):
            return self._run(job, devices, progress)

    def _run(self, job: Job, devices: int | list[int], progress: Progress) -> Finished:
        configuration, own = tuned_configuration(self.configuration, dict(job.settings))
        problem = make_problem(configuration, job.seed)
        check_test_samples(problem.data, self.test_marks[job.seed])
        problem = replace(problem, setting=replace(problem.setting, tuned=own))
        known = self.known or choose_methods(configuration, problem)[1]
        readers = [known[name] for name in job.readers]
        start = time.perf_counter()
        try:
            monitor = self.monitors.get(job.trainee)
            trained = train(
                known[job.trainee], readers, problem, job.seed, configuration, progress, devices, monitor=monitor
            )
        except NotFiniteError as error:
            reasons = dict.fromkeys(job.readers, without_period(error))
            return Finished(0, time.perf_counter() - start, diverged=reasons)
        diverged = dict(trained.diverged)
        for method in readers:
            if method.name in diverged:
                continue
            saved = prediction_path(self.directory, method.name, job.seed) if self.save_predictions else None
            try:
                with seeded(job.seed), at_work(method.name):
                    record = evaluate(method, trained, problem, job.seed, configuration.accelerator, devices, saved)
            except NotFiniteError as error:
                diverged[method.name] = without_period(error)
            else:
                record.save(self.directory)
        return Finished(trained.epochs, trained.shared_seconds, trained.best, diverged)


def run_jobs(
    jobs: deque[Job], workshop: Workshop, progress: Progress, processes: int = 1
) -> Generator[tuple[Job, Finished], None, None]:
    """Run jobs, and yield each when it is done: in order, or, with several processes, in the order of completion.

    Args:
        jobs: The jobs. The caller may add some while iterating; started jobs are removed.
        workshop: The shared inputs of all jobs.
        progress: Gets trainings and epochs.
        processes: Number of processes.

    Raises:
        InputError: The error of a job. The jobs of other processes are stopped.
    """
    if processes == 1:
        with quiet(), one_thread():
            while jobs:
                job = jobs.popleft()
                yield job, workshop.run(job, 1, progress)
        return
    accelerator = workshop.configuration.accelerator
    devices = [devices_of(accelerator, number) for number in range(processes)]
    remote = replace(workshop, known=None)  # the methods of a user's file cannot be pickled
    yield from run_in_processes(jobs, _work_in_process, remote, devices, progress)


def _work_in_process(workshop: Workshop, job: Job, devices: int | list[int], progress: Progress) -> Finished:
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(one_thread())
        return workshop.run(job, devices, progress)


def devices_of(accelerator: str, number: int) -> int | list[int]:
    """Lightning's ``devices`` for the process with this number: one GPU per process, in turn.

    Example:
        >>> devices_of("cpu", 3)
        1
    """
    uses_cuda = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    return [number % torch.cuda.device_count()] if uses_cuda else 1

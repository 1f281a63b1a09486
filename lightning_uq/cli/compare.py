"""``lightning-uq compare``."""

import traceback
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_uq.cli.errors import UsageError, one_line, recoverable_errors
from lightning_uq.cli.options import Accelerator, Names
from lightning_uq.cli.output import make_console, output_directory
from lightning_uq.cli.tables import TableFormat, print_results
from lightning_uq.errors import UQError

if TYPE_CHECKING:
    from lightning_uq.compare import Configuration
    from lightning_uq.compare.planning.plan import Plan


def compare(
    *,
    data: str = "digits",
    data_module: str | None = None,
    target: Names | None = None,
    task: str = "auto",
    root: str | None = None,
    problem: str | None = None,
    ood_classes: Names | None = None,
    ood: str | None = None,
    network: str | None = None,
    module: str | None = None,
    config: str | None = None,
    methods: Names | None = None,
    method_file: Names | None = None,
    baseline: str | None = None,
    seeds: int = 3,
    seed: int = 0,
    max_epochs: int | None = None,
    tune: int = 0,
    accelerator: Accelerator = "cpu",
    format: TableFormat = "terminal",
    out: Path = Path("runs/compare"),
    resume: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
    save_predictions: bool = False,
) -> None:
    """Train and evaluate uncertainty methods side by side on one data set, or on several one after another.

    All methods share the splits, the backbone and the training recipe. The command prints one table, and writes results.json,
    report.html and figures.

    Args:
        data: digits, diabetes, shapes, a UCI data set (with --root), testbed (with --problem), or the path of a table (.csv, .parquet), an .npz file
            with x and y, or a folder of images. Separate several data sets by commas. Each is written to a folder of its own, and one page
            covers all of them.
        data_module: A LightningDataModule of your own, instead of --data: my.module:MyDataModule. --config holds its arguments.
        target: Columns of a table to predict, such as price.
        task: classification, binary, multilabel or regression; auto infers it from the targets.
        root: Folder with the files of a UCI data set.
        problem: Stored problem of the Neural Testbed (.npz). Each row then also has kl_tau1 and kl_tau10.
        ood_classes: Labels to hold out as out-of-distribution data, such as 8,9 (default: 8,9 for digits, none for other data).
        ood: Table of out-of-distribution rows, with the same columns as the table of --data. It needs no target.
        network: Backbone of all methods: a name such as resnet18, timm:NAME, or package.module:factory (default: chosen by the kind of input).
        module: A LightningModule of your own, unmodified: my.module:LitModel. It adds the module as it is, an ensemble of 5, and the
            module with each callback for its task to --methods. --methods can also select some of these rows: module,module_ensemble.
        config: YAML or JSON file with the arguments of --module (module.init_args) and of --data-module or --data (data.init_args). A table takes
            sep, decimal, drop, categorical, na_values and others: {data: {init_args: {sep: ";", drop: [id]}}}.
        methods: Names of methods to compare, such as softmax,ensemble. A .py file or a module stands for all methods in it (default: all
            methods of the package for the task).
        method_file: File (.py) or import path of a module with methods of your own, which are compared in addition to --methods. It defines
            METHOD, a lightning_uq.Method, or METHODS, a list of them. Separate several files by commas.
        baseline: Method to compare the others with (default: the plain network).
        seeds: Number of seeds.
        seed: First seed.
        max_epochs: Maximum number of epochs per training (default: 100, or 300 for regression).
        tune: Number of settings to try per trained method and seed. A setting is a learning rate, a weight decay and values for the
            parameters that the method names. The setting with the best validation metric is used.
        accelerator: Lightning's accelerator. Results are exactly reproducible only on cpu.
        format: Format of the printed table.
        out: Directory to write to. If it holds a comparison with the same data, seeds and training, new methods are added to it.
        resume: Continue a comparison that was interrupted or had fewer seeds. Finished trainings are not repeated.
        overwrite: Remove an earlier comparison from the directory first. Other files are kept.
        jobs: Number of processes that train at the same time, each on one thread or, if there are enough, on a GPU of its own.
        save_predictions: Also write the predictions of the test rows to predictions/METHOD-SEED.npz, with arrays such as index, target and probs.
    """
    options = dict(locals())
    if "," in data and not Path(data).exists():
        _compare_each(Names.parse(data), options)
    else:
        _compare_one(_configuration(**options), options, out)


def _configuration(
    *, ood_classes: Names | None, methods: Names | None, max_epochs: int | None, tune: int, **options: Any
) -> "Configuration":
    from lightning_uq.compare import Configuration, Recipe

    labels = None if ood_classes is None else tuple(int(one) if one.isdigit() else one for one in ood_classes)
    taken = {field.name for field in fields(Configuration)}
    given = {name: value for name, value in options.items() if name in taken and value is not None}
    recipe = Recipe(max_epochs=max_epochs, tune=tune)
    return Configuration(ood_classes=labels, methods=methods, recipe=recipe, **given)


def _compare_one(
    configuration: "Configuration", options: Mapping[str, Any], out: Path, plan: "Plan | None" = None
) -> None:
    """Compare on one data set: print the table, and write the directory."""
    from lightning_uq.compare import Interrupted, RunOptions, compare, write
    from lightning_uq.compare.progress.terminal import TerminalProgress

    running = RunOptions(**{field.name: options[field.name] for field in fields(RunOptions)})
    console, stderr, table = make_console(), make_console(stderr=True), options["format"]
    interrupted = None
    with output_directory(out):
        try:
            with TerminalProgress(make_console(stderr=True)) as progress:
                comparison = compare(configuration, progress, out, running, plan)
        except Interrupted as error:
            interrupted, comparison = error, error.comparison
            if not any(comparison.records.values()):
                raise
        results = comparison.results(statistics=interrupted is None)
        files = write(results, comparison.records, out)
    print_results(results, table, console)
    left_out = [f"Left out {name}: {reason}." for name, reason in results["left_out"].items()]
    for sentence in (*results["notes"], *left_out):
        stderr.print(sentence, highlight=False, soft_wrap=True, markup=False)
    figures = sum(name.endswith(".png") for name in files)
    message = f"Wrote results.json, report.html and {figures} figures to {out}"
    make_console(stderr=table != "terminal").print(message, highlight=False, soft_wrap=True)
    for name, count in results["missing"].items():
        seeds_missing = f"{count} of {comparison.configuration.seeds} seeds " + ("is" if count == 1 else "are")
        stderr.print(f"{name} has no row: {seeds_missing} missing.", highlight=False, soft_wrap=True)
    if interrupted is not None:
        raise interrupted


def _compare_each(data: Names, options: Mapping[str, Any]) -> None:
    """Compare on each of several data sets, in a folder of its own, and write the page over all.

    All are planned before the first training, so that a mistake in the last one is found at once. If one fails later, the others continue.

    Raises:
        UsageError: Two would have the same folder, or some failed.
    """
    from lightning_uq.compare.directory.index import find_runs, write_index
    from lightning_uq.compare.planning.plan import make_plan

    out: Path = options["out"]
    folders = {Path(one).stem: one for one in data}
    if len(folders) < len(data):
        raise UsageError(
            f"--data: two of {', '.join(data)} would be written to the same folder of {out}. Rename one of the files."
        )
    stderr = make_console(stderr=True)
    planned = {}
    for folder, one in folders.items():
        configuration = _configuration(**{**options, "data": one})
        try:
            planned[folder] = configuration, make_plan(configuration)
        except UQError as error:
            raise UsageError(f"{one}: {one_line(error)} Nothing was trained.") from error
    failed: dict[str, Exception] = {}
    for folder, one in folders.items():
        stderr.print(f"{one}:", highlight=False, markup=False)
        configuration, plan = planned.pop(folder)  # so that the data are freed after their comparison
        try:
            _compare_one(configuration, options, out / folder, plan)
        except (
            Exception
        ) as error:  # the others must not lose hours of training; the error is printed here and again at the end
            failed[one] = error
            if not isinstance(error, recoverable_errors()):
                traceback.print_exception(error)
            stderr.print(f"{one} failed: {one_line(error)}", highlight=False, soft_wrap=True, markup=False)
    finished = [folder for folder in folders if (out / folder / "results.json").is_file()]
    if finished:
        write_index({name: run for name, run in find_runs(out).items() if name in finished}, out)
        stderr.print(
            f"Wrote the page over {len(finished)} data sets to {out / 'report.html'}", highlight=False, soft_wrap=True
        )
    if failed:
        reasons = "; ".join(f"{one} ({type(error).__name__})" for one, error in failed.items())
        raise UsageError(f"{len(failed)} of {len(data)} data sets failed: {reasons}. See their errors above.")

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

    All methods share the splits, the backbone and the training. The command prints one table and writes results.json,
    report.html and figures.

    Args:
        data: digits, diabetes, shapes, a UCI data set (with --root), testbed (with --problem), or the path of a table (.csv, .parquet), an .npz file
            with x and y, or a folder of images. Several, separated by commas, are compared one after another, each in a folder of its own, with
            a page over all of them.
        data_module: Instead of --data, a LightningDataModule of your own: my.module:MyDataModule. Its arguments are in --config.
        target: Columns of a table that are predicted, such as price.
        task: classification, binary, multilabel or regression, if it is not the one that the targets say.
        root: Folder with the files of a UCI data set.
        problem: Path of a stored problem of the Neural Testbed (.npz). It adds kl_tau1 and kl_tau10 to each row.
        ood_classes: Labels held out as out-of-distribution data, such as 8,9 (default: 8,9 of the digits, none of other data).
        ood: A table with the same columns as the one of --data, whose rows are out-of-distribution data. It needs no target.
        network: Backbone that all methods share: a name such as resnet18, timm:NAME, or package.module:factory (default: one that suits the inputs).
        module: A LightningModule of your own, unmodified: my.module:LitModel. Its rows are the module as it is, an ensemble of 5, and the
            module with each callback for its task. They come beside --methods, which may also name some of them: module,module_ensemble.
        config: YAML or JSON file with the arguments of --module and of --data-module or --data, as module.init_args and data.init_args. For a table
            these are, among others, sep, decimal, drop, categorical and na_values: {data: {init_args: {sep: ";", drop: [id]}}}.
        methods: Methods to compare, by name, such as softmax,ensemble; a .py file or a module stands for all methods in it (default: all
            methods of the package for the task).
        method_file: File with methods of your own (.py), or the dotted path of a module, compared beside --methods. It defines METHOD, a
            lightning_uq.Method, or METHODS, several. Separate several files by commas.
        baseline: Method that the others are compared with (default: the plain network).
        seeds: Number of seeds.
        seed: The first seed.
        max_epochs: Largest number of epochs of a training (default: 100, or 300 for regression).
        tune: Number of settings that are tried for each trained method with each seed. They are learning rates, weight decays and what the
            method itself names; the one with the best validation metric is compared.
        accelerator: Lightning's accelerator. Results repeat exactly on cpu alone.
        format: How the table is printed.
        out: Directory to write to. Methods that it does not hold yet join a comparison that is there, if data, seeds and training are the same.
        resume: Go on with a comparison that was interrupted, or that had fewer seeds. Trainings whose results are in the directory are not repeated.
        overwrite: Remove an earlier comparison from the directory first. Other files stay.
        jobs: Number of processes that train at the same time, each on one thread, or on a GPU of its own as far as there are enough.
        save_predictions: Write the predictions of the test rows too: predictions/METHOD-SEED.npz, with arrays such as index, target and probs.
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

    All are planned before the first training, so that a mistake in the last one costs nothing. If one fails later, the others go on.

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
        configuration, plan = planned.pop(folder)  # so that the data are not held longer than they are needed
        try:
            _compare_one(configuration, options, out / folder, plan)
        except (
            Exception
        ) as error:  # hours of training on the others must not be lost to it; it is told here, and again at the end
            failed[one] = error
            if not isinstance(error, recoverable_errors()):
                traceback.print_exception(error)
            stderr.print(f"{one} failed: {one_line(error)}", highlight=False, soft_wrap=True, markup=False)
    there = [folder for folder in folders if (out / folder / "results.json").is_file()]
    if there:
        write_index({name: run for name, run in find_runs(out).items() if name in there}, out)
        stderr.print(
            f"Wrote the page over {len(there)} data sets to {out / 'report.html'}", highlight=False, soft_wrap=True
        )
    if failed:
        reasons = "; ".join(f"{one} ({type(error).__name__})" for one, error in failed.items())
        raise UsageError(f"{len(failed)} of {len(data)} data sets failed: {reasons}. Their errors stand above.")

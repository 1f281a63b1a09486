"""``lightning-uq compare``."""

from pathlib import Path

from lightning_uq.cli.options import Accelerator, Integers, Names
from lightning_uq.cli.output import make_console, output_directory


def compare(
    *,
    data: str = "digits",
    problem: str | None = None,
    ood_classes: Integers | None = None,
    methods: Names | None = None,
    seeds: int = 3,
    seed: int = 0,
    max_epochs: int | None = None,
    accelerator: Accelerator = "cpu",
    out: Path = Path("runs/compare"),
) -> None:
    """Train and evaluate uncertainty methods side by side on one data set.

    All methods share the splits, the backbone and the training. The command prints one table and writes results.json,
    report.html and figures.

    Args:
        data: digits, testbed (with --problem), or the path of an .npz file with numbers x [N, ...] and integer labels y [N].
        problem: Path of a stored problem of the Neural Testbed (.npz). It adds kl_tau1 and kl_tau10 to each row.
        ood_classes: Labels held out as out-of-distribution data, such as 8,9 (default: 8,9 of the digits, none of a file).
        methods: Methods to compare, such as softmax,ensemble,my_method.py. Each is a name, the path of a .py file or the dotted
            path of a module; a file or module defines METHOD, a lightning_uq.Method (default: all methods of the package).
        seeds: Number of seeds.
        seed: The first seed.
        max_epochs: Largest number of epochs of a training (default: 100).
        accelerator: Lightning's accelerator. Results repeat exactly on cpu alone.
        out: Directory to write to.
    """
    console = make_console()
    from lightning_uq.compare import Configuration, Recipe, compare, write
    from lightning_uq.compare.terminal import TerminalProgress
    from lightning_uq.report import print_table

    recipe = Recipe() if max_epochs is None else Recipe(max_epochs=max_epochs)
    configuration = Configuration(data, ood_classes, methods, seeds, seed, accelerator, recipe, problem)
    with output_directory(out):
        with TerminalProgress(make_console(stderr=True)) as progress:
            comparison = compare(configuration, progress)
        files = write(comparison, out)
    print_table(comparison.rows, console)
    figures = sum(name.endswith(".png") for name in files)
    console.print(f"Wrote results.json, report.html and {figures} figures to {out}", highlight=False, soft_wrap=True)

"""``lightning-uq active``."""

from pathlib import Path

from lightning_uq.cli.options import Names
from lightning_uq.cli.output import make_console, output_directory


def active(
    *,
    data: str = "digits",
    score: Names | None = None,
    method: str = "ensemble",
    seeds: int = 5,
    seed: int = 0,
    initial: int = 20,
    num: int = 20,
    until: int = 300,
    epochs: int = 20,
    samples: int = 640,
    batch_size: int = 64,
    root: str | None = None,
    target: Names | None = None,
    network: str | None = None,
    out: Path = Path("runs/active"),
    resume: bool = False,
) -> None:
    """Compare strategies of active learning: train on a few labels, let a strategy choose the next ones, and repeat.

    With each seed, all strategies start from the same labels. The command prints a table and writes a JSON file per round,
    results.json and learning_curves.png.

    Args:
        data: digits, mnist or dirty_mnist (files in --root), or the path of a table (.csv, .parquet), an .npz file, or a folder of images.
        score: Strategies, such as random,mutual_information,badge,core_set,epig,batch_bald,density_then_entropy, or a score of the
            predictions. score@method trains another method than --method: log_density@ddu.
        method: Method that is trained in each round, by its name in `lightning-uq compare`.
        seeds: Number of seeds.
        seed: The first seed.
        initial: Number of labels at the beginning, the same for each class.
        num: Number of labels acquired in each round.
        until: Number of labels at which the last round trains.
        epochs: Epochs of each training.
        samples: Samples drawn in an epoch, for any number of labels.
        batch_size: Samples per batch.
        root: Folder of the files of MNIST (default: data).
        target: Target column of a table.
        network: Backbone, such as mlp, lenet or resnet18 (default: one that suits the inputs).
        out: Directory to write to.
        resume: Continue an experiment that was interrupted, or that had fewer seeds, strategies or labels.
    """
    console = make_console()
    from lightning_uq.compare.active import (
        COLUMNS,
        DEFAULT_SCORES,
        ActiveConfiguration,
        ActiveTraining,
        run_active,
        write,
    )
    from lightning_uq.compare.progress.terminal import TerminalProgress
    from lightning_uq.report import print_table

    configuration = ActiveConfiguration(
        data,
        DEFAULT_SCORES if score is None else score,
        method,
        seeds,
        seed,
        initial,
        num,
        until,
        ActiveTraining(epochs, samples, batch_size),
        root,
        target or (),
        network,
    )
    with output_directory(out):
        with TerminalProgress(make_console(stderr=True), "rounds") as progress:
            result = run_active(configuration, out, progress, resume=resume)
        write(result, out)
    rows = result.rows()
    print_table(rows, console, columns=[column for column in COLUMNS if any(column.key in row for row in rows)])
    for sentence in result.notes:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    console.print(f"Wrote results.json, learning_curves.png and rounds/ to {out}", highlight=False, soft_wrap=True)

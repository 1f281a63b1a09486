"""``lightning-uq score``."""

from pathlib import Path
from typing import Literal

from lightning_uq.cli.options import Names
from lightning_uq.cli.output import make_console, removing_new_directories


def score(
    model: Path,
    data: Path,
    *,
    out: Path,
    columns: Names | None = None,
    drop: Names = Names(),  # noqa: B008  # a tuple
    id: str | None = None,
    input: str | None = None,
    nonfinite: Literal["inf", "error"] = "inf",
    batch_size: int = 1024,
    device: Literal["cpu", "cuda"] = "cpu",
    network: str | None = None,
    task: str | None = None,
    monitor: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write predictions and scores for each row of a file as Parquet, in constant memory.

    The columns are index, which is the row's number from 0, and the outputs under the names that PredictionWriter uses, such as label,
    confidence, prob_0, log_density and ood_score. The file is created when all rows are written.

    Args:
        model: A -uq.ckpt file, which callbacks write after training, or a graph from export_fitted (.pt2, .onnx).
        data: A table (.csv, .parquet) of numeric columns, or an array [N, ...] (.npy, .npz).
        out: Parquet file to write.
        columns: Input columns of a table, in the order that the model expects (default: the columns that the model names; if it names
            none, all except --drop and --id).
        drop: Columns of a table to ignore, such as the target.
        id: Column of a table to copy into the output. It may have any type; from a CSV file, it is copied as text.
        input: Name of the array in an .npz file (default: x).
        nonfinite: Result for a row with a missing value or infinity: an ood_score of infinity and probabilities of NaN (inf), or
            an error that names the row (error).
        batch_size: Number of rows per call of the model.
        device: Device to compute on.
        network: Function or class that builds the module or its network, such as my_project.models:make_network. A checkpoint needs
            it if the module cannot be rebuilt from the file.
        task: Name of the task, such as regression. A checkpoint needs it if its callbacks had a task.
        monitor: File with the state of a DriftMonitor, which this run updates with the ood_score of each row. If it does not exist, it is
            created from the alarm in a -uq.ckpt. The file changes only if the run succeeds.
        overwrite: Replace a file that exists.
    """
    stderr = make_console(stderr=True)
    from lightning_uq import score as scoring
    from lightning_uq.score.terminal import ScoreProgress

    settings = scoring.Settings(
        model, data, out, network, task, columns, drop, id, input, nonfinite, batch_size, device
    )
    folders = [path.parent for path in (out, monitor) if path is not None]
    with removing_new_directories(*folders), ScoreProgress(stderr) as progress:
        summary = scoring.score(
            settings,
            progress,
            notify=lambda text: stderr.print(text, soft_wrap=True, highlight=False, markup=False),
            overwrite=overwrite,
            monitor=monitor,
        )
    parts = [f"{summary.rows:,} rows in {summary.seconds:.1f} s"]
    if summary.nonfinite_rows:
        parts.append(f"{summary.nonfinite_rows:,} with NaN or infinity")
    if summary.alarms is not None:
        parts.append(f"alarms {100 * summary.alarms / summary.rows:.2f} %")
    if summary.monitor is not None:
        row, num_rows = summary.monitor.drift_row, summary.monitor.num_rows
        parts.append(f"{'no drift in' if row is None else f'drift after row {row:,} of'} {num_rows:,} monitored rows")
    print(f"{', '.join(parts)}. Wrote {out}{'' if monitor is None else f' and {monitor}'}")

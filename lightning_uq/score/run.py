"""All rows of a file through a model, a batch at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_uq.callbacks.drift_monitor import DriftMonitor
from lightning_uq.callbacks.prediction_files import Block, import_pyarrow
from lightning_uq.errors import InputError, NotFiniteError, UQError
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.networks.finite import nonfinite_rows
from lightning_uq.networks.graph_files import first_lines
from lightning_uq.report import writable_directory
from lightning_uq.score.bad_rows import first_bad_row
from lightning_uq.score.models import Model, load_model
from lightning_uq.score.monitor import ALARM, SCORE, check_alarm, open_monitor
from lightning_uq.score.output import ScoreFile, make_block, without_maps
from lightning_uq.score.rows import Piece, Rows, open_rows
from lightning_uq.writing import replacing

Progress = Callable[[int, int | None], None]
"""Called after each batch with the number of rows so far, and of all rows or None."""

Notify = Callable[[str], None]
"""Called with a sentence for the user that is not an error, such as a column that is ignored."""


@dataclass(frozen=True)
class Settings:
    """The model, the data, the output file and the options of a run.

    Args:
        model: A ``-uq.ckpt``, or a graph, ``.pt2`` or ``.onnx``.
        data: A ``.csv``, ``.parquet``, ``.npy`` or ``.npz``.
        out: The Parquet file to write.
        network: See :func:`~lightning_uq.score.models.load_model`.
        task: Likewise.
        columns: See :func:`~lightning_uq.score.rows.open_rows`.
        drop: Likewise.
        id: Likewise.
        input: Likewise.
        nonfinite: A row with NaN or infinity: ``"inf"`` has a score of infinity and probabilities of NaN, ``"error"`` ends the run.
        batch_size: Rows per call of the model.
        device: ``"cpu"`` or ``"cuda"``.
    """

    model: str | Path
    data: str | Path
    out: str | Path
    network: str | None = None
    task: str | None = None
    columns: Sequence[str] | None = None
    drop: Sequence[str] = ()
    id: str | None = None
    input: str | None = None
    nonfinite: Literal["inf", "error"] = "inf"
    batch_size: int = 1024
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Summary:
    """The counts of a run.

    Args:
        rows: The number of rows.
        nonfinite_rows: How many of them hold NaN or infinity.
        seconds: The time that reading, scoring and writing took.
        alarms: How many rows raised an alarm; None where the model has none.
        monitor: The monitor with these rows; None without one.
    """

    rows: int
    nonfinite_rows: int
    seconds: float
    alarms: int | None
    monitor: DriftMonitor | None = None


def score(
    settings: Settings,
    progress: Progress = lambda done, total: None,
    *,
    notify: Notify = lambda text: None,
    overwrite: bool = False,
    monitor: str | Path | None = None,
) -> Summary:
    """Write the model's outputs for each row of the data.

    The file's columns are ``index``, the row's number from 0, the column ``id``, and the outputs. The file is created when all rows are
    written: an error or an interrupt leaves no file, and does not change a monitor's file.

    Args:
        settings: The model, the data and the file.
        progress: Called after each batch.
        notify: Called with a sentence about columns that were matched or ignored, and about maps that are not written.
        overwrite: Whether a file that exists is replaced.
        monitor: A file with the state of a :class:`~lightning_uq.DriftMonitor`, to which the rows' scores are added, in order. With a ``-uq.ckpt``,
            a missing file is made.

    Raises:
        InputError: An argument is not as documented, the model does not take these rows, or the data holds none.
        NotFiniteError: A row holds NaN or infinity, or its outputs hold NaN, with ``nonfinite="error"``.
        MissingExtraError: pyarrow is not installed, or onnxruntime for an ``.onnx``.
    """
    out = Path(settings.out)
    check_integer("batch_size", settings.batch_size, 1)
    check_choice("nonfinite", settings.nonfinite, ("inf", "error"))
    check_choice("device", settings.device, ("cpu", "cuda"))
    import_pyarrow("`lightning-uq score` writes Parquet with it.")
    if out.suffix != ".parquet":
        raise InputError(f"`out` must end in .parquet, but it is {out}.")
    if out.resolve() == Path(settings.data).resolve():
        raise InputError(f"`out` must differ from DATA, but both are {out}.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"`out`: {out} already exists. Choose another file, or pass `overwrite`.")
    if monitor is not None:
        others = [Path(path).resolve() for path in (settings.model, settings.data, out)]
        if Path(monitor).resolve() in others:
            raise InputError(f"`monitor` must differ from MODEL, DATA and `out`, but {monitor} is one of them.")
    writable_directory(out.parent)
    model = load_model(settings.model, settings.network, settings.task, settings.device)
    rows = open_rows(
        settings.data,
        columns=settings.columns,
        drop=settings.drop,
        id=settings.id,
        input=settings.input,
        names=model.columns,
    )
    _notify_of_columns(rows, model, settings, notify)
    drift: DriftMonitor | None = None
    if monitor is not None:
        if model.outputs is not None:
            check_alarm(settings.model, model.outputs)
        drift = open_monitor(monitor, settings.model)
    start = time.perf_counter()
    file: ScoreFile | None = None
    done = bad = alarms = 0
    has_alarms = False
    try:
        for piece in rows.pieces(settings.batch_size):
            block, is_bad = _scored(model, piece, rows, settings, done, notify)
            if file is None:
                file = ScoreFile(out, block, {} if settings.id is None else {settings.id: rows.id_type})
            file.add(block)
            if drift is not None:
                check_alarm(settings.model, block)
                drift.update(torch.from_numpy(block[SCORE]))
            done, bad = done + len(is_bad), bad + int(is_bad.sum())
            has_alarms = ALARM in block
            alarms += int(block[ALARM].sum()) if has_alarms else 0
            progress(done, rows.total)
        if file is None:
            raise InputError(f"{settings.data} holds no rows.")
        file.close()
        with ExitStack() as stack:
            if monitor is not None and drift is not None:
                stack.enter_context(replacing(monitor)).write_text(drift.to_json())
            file.partial.replace(out)
    except BaseException:  # an interrupt, too
        if file is not None:
            file.discard()
        raise
    return Summary(done, bad, time.perf_counter() - start, alarms if has_alarms else None, drift)


def _notify_of_columns(rows: Rows, model: Model, settings: Settings, notify: Notify) -> None:
    """Say how a table's columns were matched with the model's."""
    if rows.columns is None:
        return
    if list(rows.columns) != list(model.columns):
        taken = rows.columns if len(rows.columns) <= 4 else [*rows.columns[:3], "...", rows.columns[-1]]
        why = "have other names than the model's" if model.columns else "are not named in the model"
        names = f"{', '.join(taken)} ({len(rows.columns)} in this order)"
        notify(f"The columns of {settings.data} {why}, so they are matched by position: {names}.")
    if rows.left_out:
        ignored = "1 column" if rows.left_out == 1 else f"{rows.left_out} columns"
        notify(f"The model ignores {ignored} of {settings.data}.")


def _scored(
    model: Model, piece: Piece, rows: Rows, settings: Settings, start: int, notify: Notify
) -> tuple[Block, Tensor]:
    """A batch's columns, and the mask of its rows that are not finite."""
    x = model.cast(torch.from_numpy(piece.x))
    found = nonfinite_rows(x)
    bad = torch.zeros(len(x), dtype=torch.bool) if found is None else found
    if settings.nonfinite == "error" and bool(bad.any()):
        row = int(bad.nonzero()[0])
        where = "" if rows.columns is None else f" in column {rows.columns[int((~x[row].isfinite()).nonzero()[0])]!r}"
        raise NotFiniteError(f"Row {start + row} of {settings.data} holds NaN or infinity{where}.")
    with _naming_bad_row(model, x, rows, settings, start):
        outputs = model(x)
    if any(values.shape[:1] != x.shape[:1] for values in outputs.values()):
        shapes = {name: list(values.shape) for name, values in outputs.items()}
        raise InputError(f"The model must return one output per row, but for {len(x)} rows it returns {shapes}.")
    if settings.nonfinite == "error":
        for name, values in outputs.items():
            if bool(values.isnan().any()):
                row = int(values.isnan().flatten(1 if values.ndim > 1 else 0).reshape(len(x), -1).any(1).nonzero()[0])
                raise NotFiniteError(
                    f"`{name}` of row {start + row} of {settings.data} is NaN, although the row is finite."
                )
    numbers = without_maps(outputs)
    maps = [f"`{name}` {list(values.shape[1:])}" for name, values in outputs.items() if name not in numbers]
    if not numbers:
        raise InputError(
            f"The model returns only maps, which a table cannot hold: {', '.join(maps)}. Use `PredictionWriter(format='npz')`."
        )
    if maps and start == 0:
        notify(f"{settings.out} does not contain the maps {', '.join(maps)}.")
    columns = make_block(numbers, model.result)
    first: Block = {"index": np.arange(start, start + len(x))}
    if settings.id is not None and piece.ids is not None:
        names = {"index", *columns, *(f"{'prob' if name == 'probs' else name}_0" for name in columns)}
        if settings.id in names:
            raise InputError(
                f"`id`: the output has a column {settings.id!r} of its own. Rename that of {settings.data}."
            )
        first[settings.id] = piece.ids
    return first | columns, bad


@contextmanager
def _naming_bad_row(model: Model, x: Tensor, rows: Rows, settings: Settings, start: int) -> Iterator[None]:
    """Turn an error of the model into one that names the row or, if the model accepts no such row, the shape or columns that it was given."""
    try:
        yield
    except UQError:
        raise
    except Exception as error:  # of torch, onnxruntime, or the user's network
        bad_row = first_bad_row(model, x)
        if bad_row is not None:
            row, reason = bad_row
            raise InputError(
                f"{settings.model} fails on row {start + row} of {settings.data} (counted from 0): {first_lines(reason)}"
            ) from error
        given = f"rows of shape {list(x.shape[1:])} and dtype {str(x.dtype).removeprefix('torch.')}"
        if rows.columns is not None:
            names = ", ".join(rows.columns[:12]) + (", ..." if len(rows.columns) > 12 else "")
            given = f"the {len(rows.columns)} columns {names} (`columns` or `drop` choose others)"
        raise InputError(f"{settings.model} fails on {given}: {first_lines(error)}") from error

"""Opens data by name: built-in data, a file, or a folder."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_uq.data.arrays import ArrayDataModule, given_task, listed
from lightning_uq.data.digits import DigitsDataModule
from lightning_uq.data.image_folder import ImageFolderDataModule
from lightning_uq.data.interface import TaskName
from lightning_uq.data.npz import NpzDataModule
from lightning_uq.data.regression_sets import DiabetesDataModule, UCIDataModule
from lightning_uq.data.shapes import ShapesDataModule
from lightning_uq.data.table_files import read_table
from lightning_uq.data.tables import TableDataModule
from lightning_uq.errors import InputError

BUILT_IN: dict[str, tuple[type[ArrayDataModule], TaskName]] = {
    "digits": (DigitsDataModule, "classification"),
    "diabetes": (DiabetesDataModule, "regression"),
    "shapes": (ShapesDataModule, "segmentation"),
}
"""Data that need no file, and their tasks."""

UCI_ROOT = "data/uci"


def open_data(
    name: str,
    *,
    target: str | Sequence[str] = (),
    task: str = "auto",
    ood_classes: Sequence[int | str] | None = None,
    ood: str | None = None,
    root: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **arguments: Any,
) -> ArrayDataModule:
    """The data module for a name or path, read and split.

    Args:
        name: ``"digits"``, ``"diabetes"`` or ``"shapes"``; the path of an ``.npz`` file, of a ``.csv`` or ``.parquet`` table, or of a
            folder with one subfolder of images per class; or a UCI table, whose ``data.txt`` is in ``<root>/<name>``.
        target: Target columns of a table.
        task: The task, if it is not the one that the data imply.
        ood_classes: Classes held out as out-of-distribution data; None: 8 and 9 for the digits, and none for other data.
        ood: For a table, the path of another one with out-of-distribution rows.
        root: Folder of the UCI tables; None: ``data/uci``.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch.
        **arguments: Further arguments of the data module, such as ``flatten``, ``image_size``, ``drop`` or ``sep``.

    Raises:
        InputError: The data do not exist or are invalid, or do not take an argument.
        MissingExtraError: A package for reading the data is not installed.

    Example:
        >>> data = open_data("digits", ood_classes=[3])
        >>> data.task, data.input_shape, data.num_outputs, list(data.ood_dataloaders())
        ('classification', (64,), 9, ['digits_3'])
    """
    is_table = name.endswith((".csv", ".parquet"))
    columns = (target,) if isinstance(target, str) else tuple(target)
    if columns and not is_table:
        raise InputError(f"`target` names columns of a .csv or .parquet table, but `data` is {name!r}.")
    if ood is not None and not is_table:
        raise InputError(f"`ood` is a table beside a .csv or .parquet table, but `data` is {name!r}.")
    kind, only_task, first = _resolve(name, root)
    if only_task is None:
        arguments["task"] = task
    elif task not in ("auto", only_task):
        given_task(task)
        raise InputError(f"The task of data={name!r} is {only_task!r}, but `task` is {task!r}.")
    if kind is TableDataModule:
        if not columns:
            csv = {key: value for key, value in arguments.items() if key not in inspect.signature(kind).parameters}
            found = [f"{column!r}" for column in read_table(name, csv if name.endswith(".csv") else {}).columns]
            raise InputError(
                f"data={name!r} needs `target`, the name of the column to predict, one of {listed(found)}."
            )
        arguments["target"] = columns if len(columns) > 1 else columns[0]
        if ood is not None:
            arguments["files"] = {**arguments.get("files", {}), "ood": ood}
    parameters = inspect.signature(kind).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if ood_classes and "ood_classes" not in parameters:
        raise InputError(
            f"`ood_classes` must be empty for data={name!r}, since a {only_task} has no classes that can be held out, but it is "
            f"{listed(list(ood_classes))}."
        )
    if ood_classes is not None and "ood_classes" in parameters:
        arguments["ood_classes"] = ood_classes
    unknown = [key for key in arguments if key in first or (key not in parameters and not takes_any)]
    if unknown:
        raise InputError(
            f"data={name!r} takes no argument `{unknown[0]}`. Its arguments are {listed([key for key in parameters if key not in first])}."
        )
    data = kind(**first, seed=seed, batch_size=batch_size, **arguments)
    data.setup()
    return data


def _resolve(name: str, root: str | None) -> tuple[type[ArrayDataModule], TaskName | None, dict[str, Any]]:
    """The class of the data module, its task if there is only one, and the arguments that locate the data."""
    if name in BUILT_IN:
        return *BUILT_IN[name], {}
    if name.endswith(".npz"):
        return NpzDataModule, None, {"path": name}
    if name.endswith((".csv", ".parquet")):
        return TableDataModule, None, {"path": name}
    folder = Path(root or UCI_ROOT)
    if (folder / name / "data.txt").is_file():
        return UCIDataModule, "regression", {"table": name, "root": str(folder)}
    if Path(name).is_dir():
        return ImageFolderDataModule, None, {"path": name}
    tables = sorted(found.parent.name for found in folder.glob("*/data.txt"))
    uci = f"a UCI table in {folder} ({listed(tables) or 'there is none'}; pass another folder as `root`)"
    raise InputError(
        f"`data` must be {', '.join(BUILT_IN)}, the path of an .npz, .csv or .parquet file or of a folder of images, or {uci}, but it is "
        f"{name!r}."
    )

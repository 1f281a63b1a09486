"""A user's own table, CSV or Parquet, whose columns become features and whose target column determines the task."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_uq.data.arrays import ArrayDataModule, given_task, listed
from lightning_uq.data.interface import TaskName
from lightning_uq.data.splits import SPLIT
from lightning_uq.data.table_encoder import Category, TableEncoder
from lightning_uq.data.table_files import check_table, import_pandas, passed, place_of, read_table
from lightning_uq.data.table_targets import read_targets
from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess


class TableDataModule(ArrayDataModule):
    r"""A ``.csv`` or ``.parquet`` file with a header, as features [B, d] and targets.

    All statistics come from the training rows only:

    - Numbers are standardized by mean and standard deviation. A missing one becomes the mean, and an additional feature marks it.
    - Text, booleans and categorical columns become one feature per level (one-hot). Missing values are a separate level.
    - Columns that are constant in the training rows are left out.
    - The last feature, ``unseen``, is 1 in rows with something that is not in the training rows: a level, whose features are then all 0,
      or a missing value in a column that was complete. It is 0 in training, so its weights stay random. Members of an ensemble
      therefore disagree about such a row, and a density finds it unlikely. Use ``unseen="error"`` for tables in which it can only be a mistake.
      A table of numbers without missing values has no such feature, and a missing value in a new table raises.

    Text, booleans, and integers with at most 20 different values are classes. Floats and other integers are regressed, in their
    units. ``task`` overrides this: with ``"regression"``, integers are numbers, and booleans are 0 and 1. Several columns of booleans, or of integers 0 and 1, are the labels of a multilabel task. A message reports the task and
    the encoding of the columns.

    A Trainer's checkpoint stores the encoding, so :meth:`transform` of the restored module encodes new tables equally. The
    stored encoding is used if the module is restored before or after :meth:`setup`.

    Args:
        path: The file.
        target: Name of the target column, or of several: numbers to regress, or labels of a multilabel task.
        task: ``"classification"``, ``"binary"``, ``"multilabel"`` or ``"regression"``; ``"auto"`` infers it from the target.
        categorical: Columns of numbers whose values are categories.
        drop: Columns to leave out.
        unseen: ``"indicator"``, or ``"error"`` to raise if validation or test rows, or new tables, have something unseen.
        fractions: Shares of training, validation and test rows. Parts with their own file have no share, and the others divide the rows of ``path``.
        files: Paths of further files by their part: ``"val"``, ``"test"`` or ``"ood"``. The last is out-of-distribution data with
            the same columns and encoding, which need no target.
        ood_classes: Names of classes held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch.
        **csv: Arguments of :func:`pandas.read_csv`: ``sep``, ``decimal``, ``thousands``, ``encoding``, ``quotechar``, ``na_values``,
            ``keep_default_na``, ``comment``, ``skiprows``, ``skipinitialspace``.

    Raises:
        InputError: An argument is out of range. From :meth:`setup` on: the file cannot be read, targets are missing, or a
            column cannot be encoded (dates, ids, numbers as text, more than 50 levels); the message names it.
        MissingExtraError: pandas is not installed, or pyarrow for Parquet.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "flats.csv"
        >>> rows = [f"{20 + i},{['east', 'west'][i % 2]},{300.5 + 12 * i}" for i in range(50)]
        >>> _ = path.write_text("\n".join(["size,side,rent", *rows]))
        >>> data = TableDataModule(str(path), target="rent")
        >>> data.task, data.num_train, data.feature_names
        ('regression', 30, ['size', 'side=east', 'side=west', 'unseen'])
        >>> import pandas
        >>> data.transform(pandas.DataFrame({"size": [45.0], "side": ["north"]}))[0, 1:]
        tensor([0., 0., 1.])
    """

    def __init__(
        self,
        path: str,
        target: str | Sequence[str],
        *,
        task: TaskName | Literal["auto"] = "auto",
        categorical: Sequence[str] = (),
        drop: Sequence[str] = (),
        unseen: Literal["indicator", "error"] = "indicator",
        fractions: Sequence[float] = SPLIT,
        files: Mapping[str, str] | None = None,
        ood_classes: Sequence[int | str] = (),
        seed: int = 0,
        batch_size: int = 64,
        **csv: Any,
    ) -> None:
        super().__init__(ood_classes=ood_classes, seed=seed, batch_size=batch_size, task=given_task(task))
        if unseen not in ("indicator", "error"):
            raise InputError(f"`unseen` must be one of indicator, error, but it is {unseen!r}.")
        if (
            not isinstance(fractions, Sequence)
            or len(fractions) != 3
            or min(fractions) <= 0
            or abs(sum(fractions) - 1) > 1e-6
        ):
            raise InputError(f"`fractions` must be three positive numbers that sum to 1, but it is {fractions}.")
        self.paths = {"train": str(path)}
        unknown = [part for part in files or {} if part not in ("val", "test", "ood")]
        if unknown:
            raise InputError(f"`files` must hold files of val, test or ood, but it holds {listed(unknown)}.")
        self.paths |= {part: str((files or {})[part]) for part in ("val", "test", "ood") if part in (files or {})}
        has_csv = any(one.endswith(".csv") for one in self.paths.values())
        for one in self.paths.values():
            check_table(one, csv if one.endswith(".csv") or not has_csv else {})
        self.name = Path(path).stem
        self.target = (target,) if isinstance(target, str) else tuple(target)
        self.categorical = _names("categorical", categorical)
        self.drop = _names("drop", drop)
        self.unseen = unseen
        self.fractions = tuple(fractions)
        self.csv = csv
        self._encoder: TableEncoder | None = None
        self._outside: Dataset[Any] | None = None
        self._restored: dict[str, Any] | None = None
        # Not logged, since arguments such as `task` have other values in the module.
        self.save_hyperparameters(
            {
                "path": str(path),
                "target": target if isinstance(target, str) else list(target),
                "task": task,
                "categorical": list(categorical),
                "drop": list(drop),
                "unseen": unseen,
                "fractions": list(fractions),
                "files": {part: path for part, path in self.paths.items() if part != "train"},
                "ood_classes": list(ood_classes),
                "seed": seed,
                "batch_size": batch_size,
                **csv,
            },
            logger=False,
        )

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """The concatenated features [N, d] and targets of all parts, without held-out classes."""
        parts = [self.dataset(part).tensors for part in ("train", "val", "test")]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode the rows, once; every stage and every process has the same split.

        Raises:
            InputError: See the class.
        """
        if self._parts:
            return
        frames = {part: self._read(part) for part in self.paths}
        outside = frames.pop("ood", None)
        pandas = import_pandas()
        task = self._restored["task"] if self._restored else self._given_task
        # Targets are read together, so that a class has the same label in all files.
        together = pandas.concat([frame[list(self.target)] for frame in frames.values()], ignore_index=True)
        starts = [0, *accumulate(map(len, frames.values()))]

        def place(row: int) -> str:
            number = bisect_right(starts, row) - 1
            return self._place(list(frames)[number], row - starts[number])

        targets = read_targets(together, self.target, task, place)
        self._task = targets.task
        fixed = {
            part: torch.arange(starts[number], starts[number + 1])
            for number, part in enumerate(frames)
            if part != "train"
        }
        rows = self._split(targets.values, targets.names, self.fractions, fixed)
        features = [name for name in frames["train"].columns if name not in self.target]
        train = frames["train"].iloc[rows["train"].numpy()]
        encoder = self._encoder or TableEncoder.fit(
            train, features, self.categorical, self.unseen, partial(self._place, "train")
        )
        num_missing = sum(int(encoder.missing_rows(frame).sum()) for frame in frames.values())
        if self._encoder is None and encoder.is_numeric and not num_missing:
            encoder = replace(encoder, unseen="error")
        x = torch.cat([encoder.transform(frame, partial(self._place, part)) for part, frame in frames.items()])
        if targets.task == "multilabel":
            self._classes = self.target
        if outside is not None:
            self._outside = TensorDataset(encoder.transform(outside, partial(self._place, "ood")))
        self._fill(x, targets.values, rows, targets.names)
        if self._restored:
            self._check_restored(self._restored)
        self._encoder = encoder
        self._notes += self._made_notes(x, rows, num_missing, sum(map(len, frames.values())))
        report_guess(self._report(len(features)), self)
        if targets.is_doubtful:
            report_guess(
                f"Column `{self.target[0]}` of {self.paths['train']} is regressed, but its values are whole, as class labels are. If they are "
                "classes, pass task='classification'.",
                None,  # each seed of a comparison has its own module
                is_doubtful=self._given_task is None and self._restored is None,
            )

    def ood_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Batches of the held-out classes, and of the file of out-of-distribution data, by name; empty if there are none."""
        found = super().ood_dataloaders()
        if self._outside is not None:
            found[Path(self.paths["ood"]).stem] = self._loader(self._outside)
        return found

    def transform(self, frame: Any) -> Tensor:
        """Features [N, d] of the rows of a ``pandas.DataFrame``, encoded like the training rows.

        Columns may be in any order; targets and other columns that are not encoded are ignored.

        Raises:
            InputError: A column is missing or has invalid values.
        """
        return self._fitted.transform(frame)

    @property
    def feature_names(self) -> list[str]:
        """Names of the features: a column's own, or ``column=level``, ``column=missing`` and ``unseen``."""
        return self._fitted.feature_names

    @property
    def num_features(self) -> int:
        """Number of features d of one row."""
        return len(self.feature_names)

    def state_dict(self) -> dict[str, Any]:
        """The encoding and the kind of the targets, as plain data."""
        encoder = self._fitted
        return {
            "format": 1,
            "encoder": encoder.state(),
            "target": list(self.target),
            "task": self.task,
            "classes": list(self._classes),
            "target_scale": None if self._target_scale is None else [list(part) for part in self._target_scale],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a stored encoding; a table that was read with another one is read again.

        Raises:
            InputError: The state has another format or other target columns.
        """
        if state_dict.get("format") != 1 or tuple(state_dict["target"]) != self.target:
            raise InputError(
                f"The stored table has targets {listed(state_dict.get('target', []))} in format {state_dict.get('format')}, but this "
                f"TableDataModule has {listed(self.target)} in format 1."
            )
        was_read = bool(self._parts)
        if was_read and state_dict == self.state_dict():
            return
        self._encoder = TableEncoder.from_state(state_dict["encoder"])
        self._restored = state_dict
        self._parts = {}
        self._take_over(state_dict)
        if was_read:
            self.setup()

    def _take_over(self, state: dict[str, Any]) -> None:
        scale = state["target_scale"]
        self._task = state["task"]
        self._classes = tuple(state["classes"])
        self._target_scale = None if scale is None else (tuple(scale[0]), tuple(scale[1]))

    def _check_restored(self, state: dict[str, Any]) -> None:
        """Check that the data agree with a restored network: its outputs mean the stored classes in order, and targets in the stored scale."""
        found = list(self._classes)
        self._take_over(state)
        if found != state["classes"]:
            self._parts = {}
            raise InputError(
                f"{self.paths['train']} must have the classes of the stored run ({listed(state['classes'])}), but it has {listed(found)}."
            )

    @property
    def _fitted(self) -> TableEncoder:
        if self._encoder is None:
            self.setup()
        assert self._encoder is not None
        return self._encoder

    def _place(self, part: str, row: int) -> str:
        """The place of a row of a part in its file."""
        path = self.paths[part]
        return f"{place_of(path, self.csv, row)} of {path}"

    def _read(self, part: str) -> Any:
        path = self.paths[part]
        frame = read_table(path, self.csv if path.endswith(".csv") else {})
        for argument, names in (("target", self.target), ("drop", self.drop), ("categorical", self.categorical)):
            for name in names:
                if name not in frame.columns:
                    # A further file may lack a column that is not used.
                    if (argument == "drop" and part != "train") or (argument == "target" and part == "ood"):
                        continue
                    close = get_close_matches(name, frame.columns, n=1)
                    hint = f" Did you mean {close[0]!r}?" if close else ""
                    raise InputError(
                        f"`{argument}` must name columns of {path} ({listed([repr(column) for column in frame.columns])}), but it holds {name!r}.{hint}"
                    )
        both = [name for name in self.target if name in (*self.drop, *self.categorical)]
        if both:
            raise InputError(f"`target` must not be in `drop` or `categorical` too, but {both[0]!r} is.")
        frame = frame.drop(columns=[name for name in self.drop if name in frame.columns])
        unnamed = [name for name in frame.columns if name.startswith("Unnamed: ")]
        if unnamed:
            raise InputError(
                f"Every column of {path} needs a name, but `{unnamed[0]}` has none. Row numbers are often written like this. Name the column, or leave "
                f"it out with {passed(drop=[unnamed[0]])}."
            )
        return frame

    def _made_notes(self, x: Tensor, rows: dict[str, Tensor], num_missing: int, num_rows: int) -> tuple[str, ...]:
        encoder = self._fitted
        notes = []
        categories = [column.name for column in encoder.columns if isinstance(column, Category)]
        if categories:
            notes.append(f"Categories become one feature per level: {listed(categories)}.")
        if num_missing:
            notes.append(
                f"{num_missing} of {num_rows} rows miss values: a number becomes the training mean, and a category a separate level."
            )
        left_out = [*self.drop, *(f"{name} (constant)" for name in encoder.constant)]
        left_out += [f"{name} (no values)" for name in encoder.empty]
        if left_out:
            notes.append(f"Columns left out: {listed(left_out)}.")
        if self._outside is not None:
            notes.append(f"Out-of-distribution data: {len(self._outside)} rows of {self.paths['ood']}.")  # type: ignore[arg-type]
        held = torch.cat([rows["val"], rows["test"]])
        if encoder.unseen == "indicator" and (num := int(x[held, -1].sum())):
            notes.append(f"{num} validation and test rows have something that is not in the training rows.")
        return tuple(notes)

    def _report(self, num_columns: int) -> str:
        what = f"{self.task} of {listed(self.target)}"
        if self.task in ("classification", "binary"):
            what += f" ({self.num_classes} classes: {listed(self.class_names[:10])}{', ...' * (self.num_classes > 10)})"
        text = f"{self.paths['train']}: {what}; {self.num_train} training rows; {num_columns} columns become {self.num_features} features."
        return " ".join([text, *self._notes, "To change this, pass `task`, `categorical` or `drop`."])


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"`{argument}` must be a list of column names, but it is {names!r}.")
    return tuple(map(str, names))

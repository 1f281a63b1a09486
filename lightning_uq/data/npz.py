"""A user's own arrays in an ``.npz`` file."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from lightning_uq.data.arrays import MAX_CLASSES, ArrayDataModule, given_task, listed, may_be_labels
from lightning_uq.data.extremes import LIMIT, WHAT_TO_DO, extreme_row
from lightning_uq.data.interface import TaskName
from lightning_uq.errors import InputError, without_period
from lightning_uq.guessing import report_guess


class NpzDataModule(ArrayDataModule):
    """A user's own ``.npz`` file: arrays ``x`` [N, ...] of numbers, and ``y``, whose type determines the task.

    As in tables, booleans and integers [N] with at most 20 different values are class labels. Floats and other integers, [N] or [N, D],
    are regressed in their units. Booleans, or integers 0 and 1, [N, L] with L > 1, are labels of a multilabel task.

    Args:
        path: The file.
        ood_classes: Labels held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch.
        standardize: Whether to scale every feature by the training samples' mean and standard deviation.
        flatten: Whether to flatten x to [B, d].
        task: ``"classification"``, ``"binary"``, ``"multilabel"`` or ``"regression"``; ``"auto"`` infers it from ``y``.

    Raises:
        InputError: The file cannot be read, or an array is missing or invalid; the message names both. Or ``y`` does not
            match ``task``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rings.npz"
        >>> np.savez(path, x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
        >>> data = NpzDataModule(str(path), ood_classes=[2])
        >>> data.num_features, data.num_classes, data.num_train, list(data.ood_dataloaders())
        (2, 2, 12, ['rings_2'])
        >>> np.savez(path, x=np.arange(60.0).reshape(30, 2), y=np.arange(30) / 2)
        >>> data = NpzDataModule(str(path))
        >>> data.task, data.num_targets, data.dataset("train").tensors[1].shape
        ('regression', 1, torch.Size([18, 1]))
    """

    def __init__(
        self,
        path: str,
        ood_classes: Sequence[int] = (),
        seed: int = 0,
        batch_size: int = 64,
        standardize: bool = True,
        flatten: bool = True,
        task: TaskName | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            ood_classes=ood_classes,
            seed=seed,
            batch_size=batch_size,
            standardize=standardize,
            flatten=flatten,
            task=given_task(task),
        )
        self.path = Path(path)
        self.name = self.path.stem

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """The file's arrays, checked."""
        arrays = read_npz(self.path, ("x", "y"))
        x, y = arrays["x"], arrays["y"]
        if x.ndim < 2 or x.size == 0 or x.dtype.kind not in "fiub":
            raise InputError(
                f"Array `x` of {self.path} must hold numbers [N, ...], but it is {x.dtype} of shape {list(x.shape)}."
            )
        targets = self._targets(y, len(x))
        with np.errstate(over="ignore"):  # overflow gives infinity, which raises below
            features = torch.from_numpy(x.astype(np.float32))
        finite = features.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise InputError(
                f"Array `x` of {self.path} must be finite in float32, but {int((~finite).sum())} of {len(x)} rows hold "
                f"NaN or infinity, the first at row {first}."
            )
        if self.standardize:
            self._check_extreme("x", x)
        return features, targets

    def _targets(self, y: np.ndarray[Any, Any], num: int) -> Tensor:
        if y.dtype.kind not in "fiub":
            raise InputError(f"Array `y` of {self.path} must hold numbers or booleans, but its dtype is {y.dtype}.")
        task = self._given_task or _shown_task(y)
        if task == "regression":
            return self._regression_targets(y, num)
        labels = self._integer_labels(y, task)
        return self._flags(labels, num) if task == "multilabel" else self._labels(labels, num)

    def _integer_labels(self, y: np.ndarray[Any, Any], task: str) -> np.ndarray[Any, Any]:
        """The labels as integers."""
        broken = y[y != np.round(y)] if y.dtype.kind == "f" else y[:0]
        if broken.size:
            raise InputError(f"task={task!r} needs labels, but array `y` of {self.path} holds {broken.flat[0]:g}.")
        return y.astype(np.int64)

    def _labels(self, y: np.ndarray[Any, Any], num: int) -> Tensor:
        if y.shape != (num,):
            hint = " If they are numbers rather than classes, pass task='regression'." if len(y) == num else ""
            raise InputError(
                f"Array `y` of {self.path} must have shape [{num}], one label for each row of `x`, but its shape is "
                f"{list(y.shape)}.{hint}"
            )
        if int(y.min()) < 0 and self._given_task != "binary":
            raise InputError(f"Array `y` of {self.path} must hold labels from 0 on, but it holds {int(y.min())}.")
        return torch.from_numpy(y.astype(np.int64))

    def _flags(self, y: np.ndarray[Any, Any], num: int) -> Tensor:
        if y.ndim != 2 or len(y) != num or y.size == 0:
            raise InputError(
                f"A multilabel task needs labels [{num}, L], one row for each row of `x`, but array `y` of {self.path} has shape "
                f"{list(y.shape)}."
            )
        other = y[(y != 0) & (y != 1)]
        if other.size:
            raise InputError(
                f"A multilabel task needs labels 0 and 1, but array `y` of {self.path} holds {other.flat[0]:g}."
            )
        if (y.sum(1) == 1).all():
            report_guess(
                f"Array `y` of {self.path} is read as labels of a multilabel task, but each row has exactly one 1. If its columns are "
                "classes, save `y.argmax(1)`.",
                self,
                is_doubtful=self._given_task is None,
            )
        return torch.from_numpy(y.astype(np.int64))

    def _regression_targets(self, y: np.ndarray[Any, Any], num: int) -> Tensor:
        if y.shape[:1] != (num,) or y.ndim > 2 or y.size == 0:
            raise InputError(
                f"Array `y` of {self.path} must have shape [{num}] or [{num}, D], one target for each row of `x`, but its "
                f"shape is {list(y.shape)}."
            )
        with np.errstate(over="ignore"):
            targets = torch.from_numpy(y.astype(np.float32)).reshape(num, -1)
        if not bool(targets.isfinite().all()):
            bad = ~targets.isfinite().all(1)
            raise InputError(
                f"Array `y` of {self.path} must be finite in float32, but {int(bad.sum())} of {num} rows hold NaN or "
                f"infinity, the first at row {int(bad.nonzero()[0])}."
            )
        self._check_extreme("y", y.reshape(num, -1))
        if self._given_task is None and targets.shape[1] == 1 and may_be_labels(y):
            report_guess(
                f"Array `y` of {self.path} is regressed, but its values are whole, as class labels are. If they are classes, pass "
                "task='classification'.",
                None,  # each seed of a comparison has its own module
                is_doubtful=True,
            )
        return targets

    def _check_extreme(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Raise if one value dominates the scale of a column [N, ...]."""
        if values.dtype.kind != "f":
            return
        for column, found in enumerate(values.reshape(len(values), -1).T):
            row = extreme_row(found.astype(np.float64))
            if row is not None:
                raise InputError(
                    f"Array `{name}` of {self.path} holds {found[row]:g} in row {row} (from 0), column {column}, more than {LIMIT:.0e} times as "
                    f"far from the median as the other values are. {WHAT_TO_DO}"
                )


def _shown_task(y: np.ndarray[Any, Any]) -> TaskName:
    if y.dtype.kind == "f":
        return "regression"
    if y.ndim == 2 and y.shape[1] > 1:
        return "multilabel" if bool(((y == 0) | (y == 1)).all()) else "regression"
    return "classification" if len(np.unique(y)) <= MAX_CLASSES else "regression"


def read_npz(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays ``names`` of an ``.npz`` file, and those of ``optional`` that exist. Other arrays are not read.

    Raises:
        InputError: The file cannot be read, or an array is missing.
    """
    try:
        # Pickled objects are not loaded, since they could run any code.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} must be an .npz file with arrays {listed(names)}, but it is a single array.")
            missing = [name for name in names if name not in file.files]
            if missing:
                raise InputError(
                    f"{path} must hold arrays {listed(names)}, but {listed(missing)} is missing among "
                    f"{listed(sorted(file.files)) or 'none'}."
                )
            return {name: file[name] for name in (*names, *optional) if name in file.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"{path} must be an .npz file with arrays {listed(names)}, but there is no such file."
        ) from None
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} must be an .npz file with arrays {listed(names)} of plain numbers, but it cannot be read: {without_period(error)}."
        ) from error

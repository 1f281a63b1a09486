"""Features and targets in arrays, split by a seed, with whole classes held out as out-of-distribution data."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_uq.data.interface import TaskName
from lightning_uq.data.splits import SPLIT, random_split, stratified_split
from lightning_uq.errors import InputError

MAX_CLASSES = 20
"""Integers with at most this many different values are class labels, and so might be floats with integer values."""


class ArrayDataModule(LightningDataModule):
    """The base of data sets in memory. A subclass defines :meth:`load_arrays`. The targets determine the task, unless it is given.

    | Task | Targets | Batches |
    |---|---|---|
    | ``"classification"`` | integers [N] | y [B] in 0 ... C-1, in the order of the labels; the split is stratified |
    | ``"binary"``, if given | two different integers [N] | y [B], 0 for the lower label and 1 for the higher one |
    | ``"multilabel"`` | integers [N, L], 0 or 1 | y [B, L] |
    | ``"segmentation"``, if given | integers [N, *P] | y [B, *P] |
    | ``"regression"`` | floats [N, D] | y [B, D] in the targets' units |

    Held-out classes are not part of any split; only :meth:`ood_dataloaders` has them.

    A comparison uses the interface :class:`~lightning_uq.data.TaskData`: ``name``, ``task``, ``task_arguments``, ``input_shape``,
    ``num_outputs``, ``class_names``, ``num_train``, ``test_rows``, ``notes``, and the loaders for training, validation, test and
    out-of-distribution data. ``lightning_uq.tasks.task_for(data)`` is the task itself.

    Args:
        ood_classes: Labels held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch; evaluation reads them in order.
        standardize: Whether to scale every feature to mean 0 and variance 1 over the training samples (a constant one to 0).
        flatten: Whether to flatten x to [B, d].
        task: The task, if it is not the one that the targets imply.

    Attributes:
        name: Name of the data, which the comparison shows.
    """

    name: str

    def __init__(
        self,
        *,
        ood_classes: Sequence[int | str] = (),
        seed: int = 0,
        batch_size: int = 64,
        standardize: bool = False,
        flatten: bool = True,
        task: TaskName | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, but it is {batch_size}.")
        self.ood_classes: tuple[Any, ...] = tuple(sorted(set(ood_classes), key=lambda label: (str(type(label)), label)))
        self.seed = seed
        self.batch_size = batch_size
        self.standardize = standardize
        self.flatten = flatten
        self.num_workers = 0
        self._given_task = task
        self._task: TaskName | None = None
        self._parts: dict[str, Any] = {}
        self._test_rows = torch.empty(0, dtype=torch.int64)
        self._notes: tuple[str, ...] = ()
        self._classes: tuple[Any, ...] = ()
        self._target_scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @abstractmethod
    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All features [N, ...] in float32, and targets: labels in int64, or numbers [N, D] in float32. All are finite."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and relabel, once; every stage has the same split.

        Raises:
            InputError: A held-out label is not in the data, fewer than two classes remain (unless the task is binary with two
                classes), or classes are held out of a task that has none.
        """
        if self._parts:
            return
        x, targets = self.load_arrays()
        if self.flatten:
            x = x.flatten(1)
        self._task = self._given_task or _task_of(targets)
        names = None
        if self._task in ("classification", "binary"):
            names = {label: label for label in sorted(set(targets.tolist()))}
        rows = self._split(targets, names)
        if self.standardize:
            x = standardized(x, rows["train"])
        self._fill(x, targets, rows, names)

    def _split(
        self,
        targets: Tensor,
        names: Mapping[int, Any] | None,
        shares: Sequence[float] = SPLIT,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The rows of each part of the split.

        Args:
            targets: Labels [N] or numbers [N, D].
            names: Names of the labels, in the order of the labels; None for a task that does not have one class per row.
            shares: Shares of training, validation and test samples, among the other rows.
            fixed: The rows of given parts; held-out classes are removed from them too.
        """
        fixed = fixed or {}
        inside = torch.ones(len(targets), dtype=torch.bool)
        if names is not None:
            inside = torch.isin(targets, torch.tensor([label for label, _ in self._kept(names)]))
        elif self.ood_classes:
            hint = "" if self._given_task else " If its targets are classes, pass task='classification'."
            raise InputError(
                f"`ood_classes` must be empty for {self.name}, since a {self._task} has no classes that can be held out, but it is "
                f"{listed(self.ood_classes)}.{hint}"
            )
        free = inside.clone()
        for rows in fixed.values():
            free[rows] = False
        shares = [0.0 if part in fixed else share for part, share in zip(("train", "val", "test"), shares, strict=True)]
        shares = [share / sum(shares) for share in shares]
        candidates = free.nonzero().squeeze(1)
        if names is None:
            split = random_split(len(candidates), self.seed, shares)
        else:
            absent = [name for label, name in self._kept(names) if not (targets[candidates] == label).any()]
            if absent:
                raise InputError(
                    f"Every class of {self.name} needs training rows, but {listed(absent)} is only in the validation or test rows. "
                    "Remove these rows, or hold the class out with `ood_classes`."
                )
            split = stratified_split(targets[candidates], self.seed, shares, names)
        parts = {part: candidates[rows] for part, rows in zip(("train", "val", "test"), split, strict=True)}
        given = {part: rows[inside[rows]] for part, rows in fixed.items()}
        return {**parts, **given, "ood": (~inside).nonzero().squeeze(1)}

    def _kept(self, names: Mapping[int, Any]) -> list[tuple[int, Any]]:
        """The labels and names of the in-distribution classes."""
        known, held_out = (
            set(map(str, names.values())),
            set(map(str, self.ood_classes)),
        )  # the command line passes text
        unknown = [name for name in self.ood_classes if str(name) not in known]
        if unknown:
            raise InputError(
                f"`ood_classes` must hold labels of {self.name} ({listed(list(names.values()))}), but it holds {listed(unknown)}."
            )
        kept = [(label, name) for label, name in names.items() if str(name) not in held_out]
        if len(names) < 2:
            raise InputError(f"A classification needs at least 2 classes, but {self.name} has {len(names)}.")
        if len(kept) < 2:
            raise InputError(
                f"`ood_classes` must leave at least 2 classes of {self.name} in distribution, but {listed(self.ood_classes)} "
                f"leaves {len(kept)}."
            )
        if self._task == "binary" and len(kept) != 2:
            raise InputError(
                f"task='binary' needs 2 classes, but {self.name} has {len(kept)} in distribution. Pass task='classification', or hold "
                "the others out with `ood_classes`."
            )
        return kept

    def _fill(self, x: Any, targets: Tensor, rows: Mapping[str, Tensor], names: Mapping[int, Any] | None) -> None:
        y = targets
        if names is not None:
            kept = self._kept(names)
            self._classes = tuple(name for _, name in kept)
            y = torch.searchsorted(torch.tensor([label for label, _ in kept]), targets)
        elif self._task == "regression":
            self._target_scale = _scale_of(targets[rows["train"]], self.name)
        elif self._task == "multilabel":
            self._classes = self._classes or tuple(range(targets.shape[1]))
        self._test_rows = rows["test"]
        self._notes = ()
        if self._task == "binary":
            self._notes = (f"Label 1 stands for {self._classes[1]}, and 0 for {self._classes[0]}.",)
        self._parts = {
            part: self._dataset(x, targets if part == "ood" else y, of_part) for part, of_part in rows.items()
        }

    def _dataset(self, x: Any, y: Tensor, rows: Tensor) -> Dataset[Any]:
        """The samples in these rows."""
        return TensorDataset(x[rows], y[rows])

    def _ensure_setup(self) -> None:
        with torch.inference_mode(False):  # inference tensors could not be trained on
            self.setup()

    # ------------------------------------------------------------------ facts for networks and tasks

    @property
    def task(self) -> TaskName:
        """Name of the task."""
        if self._task is None:
            self._ensure_setup()
        assert self._task is not None
        return self._task

    @property
    def task_arguments(self) -> dict[str, Any]:
        """The arguments of the task that follow from the data: ``num_classes``, ``num_labels`` or ``target_scale``; none for a binary task."""
        name = self.task
        if name == "regression":
            return {"target_scale": self.target_scale}
        counted = {"multilabel": "num_labels", "binary": None}.get(name, "num_classes")
        return {} if counted is None else {counted: len(self._classes)}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.dataset("train")[0][0].shape)

    @property
    def num_outputs(self) -> int:
        """The number of outputs of a network for the task: C classes, L labels, D target dimensions, or 1 for a binary task."""
        if self.task == "regression":
            return self.num_targets
        return 1 if self.task == "binary" else len(self._classes)

    @property
    def classes(self) -> tuple[Any, ...]:
        """Original labels of classes 0 ... C-1.

        Raises:
            InputError: The task is a regression, or has several labels per input.
        """
        if self.task == "regression":
            raise InputError(
                f"{self.name} has no classes, because its targets are numbers and the task is a regression."
            )
        if self.task == "multilabel":
            raise InputError(
                f"{self.name} has no classes, but {len(self._classes)} labels per input. Use `class_names`."
            )
        return self._classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or of the labels of a multilabel task; none for a regression."""
        return tuple(map(str, self._classes if self.task else ()))

    @property
    def num_classes(self) -> int:
        """Number of classes in distribution, C."""
        return len(self.classes)

    @property
    def target_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training targets, per dimension: ``Regression(target_scale=...)``.

        Raises:
            InputError: The task is not a regression.
        """
        if self.task != "regression" or self._target_scale is None:
            raise InputError(f"{self.name} has no `target_scale`, because its targets are classes.")
        return self._target_scale

    @property
    def num_targets(self) -> int:
        """Number of target dimensions D of a regression."""
        return len(self.target_scale[0])

    @property
    def num_features(self) -> int:
        """Number of features of one input."""
        return math.prod(self.input_shape)

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self.dataset("train"))

    @property
    def test_rows(self) -> Tensor:
        """Positions [N] of the test samples in the whole data, in the order of the test loader."""
        self._ensure_setup()
        return self._test_rows

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data for readers of the results."""
        self._ensure_setup()
        return self._notes

    def dataset(self, part: str) -> Any:
        """The samples of ``"train"``, ``"val"``, ``"test"`` or ``"ood"`` (with their original labels), as a ``TensorDataset``."""
        self._ensure_setup()
        return self._parts[part]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, in an order determined by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(self.dataset("train"), shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches again."""
        return self.test_dataloader()

    def ood_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Batches of the held-out classes, by name (``digits_8_9``); empty if no class is held out."""
        held_out = self.dataset("ood")
        if not len(held_out):
            return {}
        name = "_".join([self.name, *map(str, self.ood_classes)])
        return {name: self._loader(held_out)}

    def _loader(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,  # by keyword, since Lightning rebuilds the loader for predictions
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **arguments,
        )


def _task_of(targets: Tensor) -> TaskName:
    if targets.is_floating_point():
        return "regression"
    return "classification" if targets.ndim == 1 else "multilabel"


def given_task(task: str) -> TaskName | None:
    """The value of an argument ``task``; None for ``"auto"``.

    Raises:
        InputError: Data of a table or file cannot have such a task.
    """
    allowed: tuple[TaskName, ...] = ("classification", "binary", "multilabel", "regression")
    if task == "auto":
        return None
    for name in allowed:
        if name == task:
            return name
    raise InputError(f"`task` must be one of {listed(('auto', *allowed))}, but it is {task!r}.")


def may_be_labels(values: np.ndarray[Any, Any]) -> bool:
    """Whether regressed numbers [N] also look like class labels, because they are integers, and either few or 0, 1, ... without a gap.

    Example:
        >>> [may_be_labels(np.array(values)) for values in ([2.0, 7.0, 2.0], [2.5, 7.0], list(range(30)) * 3, list(range(30)))]
        [True, False, True, False]
    """
    distinct, counts = np.unique(values, return_counts=True)
    if (distinct != distinct.round()).any():
        return False
    is_numbered = distinct[0] == 0 and distinct[-1] == len(distinct) - 1 and counts.min() >= 3
    return bool(len(distinct) <= MAX_CLASSES or is_numbered)


def standardized(x: Tensor, train: Tensor) -> Tensor:
    """Features [N, ...], scaled to mean 0 and variance 1 over the rows ``train``; a constant feature becomes 0."""
    # In float64, since rounding in float32 would dominate the variance of a large, nearly constant feature.
    rows = x[train].double()
    mean, std = rows.mean(0), rows.std(0, correction=0)
    std = torch.where(std > 1e-12 * mean.abs(), std, torch.inf)
    return ((x - mean) / std).float()


def _scale_of(targets: Tensor, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of targets [N, D], per dimension."""
    std, mean = torch.std_mean(targets.double(), 0, correction=0)
    constant = (std <= 1e-12 * mean.abs()).nonzero().flatten().tolist()
    if constant:
        raise InputError(
            f"The training targets of {name} must vary, but dimension {listed(constant)} is constant, so it cannot be regressed."
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def listed(values: Sequence[object]) -> str:
    """The values, separated by commas."""
    return ", ".join(map(str, values))

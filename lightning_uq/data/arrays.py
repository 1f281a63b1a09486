"""Features and targets in arrays, split by seed, with whole classes held out as out-of-distribution data."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.data.splits import SPLIT, random_split, stratified_split
from lightning_uq.errors import InputError

TaskName = Literal["classification", "regression"]
MAX_CLASSES = 20
"""Whole numbers with at most so many different values look like class labels."""


class ArrayDataModule(LightningDataModule):
    """The base of the flat data sets. A subclass provides :meth:`load_arrays`; the type of its targets is the task.

    Integer targets are classes, relabelled 0 ... C-1 in the order of their labels; batches are ``(x [B, ...], y [B])``, and
    the split keeps the share of every class. Float targets are regressed; batches are ``(x [B, ...], y [B, D])`` in the
    targets' units. Held-out classes never enter a split: they are there through :meth:`ood_dataloaders` alone.

    Args:
        ood_classes: Labels held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch; evaluation takes them in order.
        standardize: Scale every feature to mean 0 and variance 1 over the training samples (a constant one to 0).
        flatten: Whether x is [B, d] whatever its shape was.

    Attributes:
        name: Name of the data, as in the comparison.
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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, but it is {batch_size}.")
        self.ood_classes: tuple[Any, ...] = tuple(sorted(set(ood_classes), key=lambda label: (str(type(label)), label)))
        self.seed = seed
        self.batch_size = batch_size
        self.standardize = standardize
        self.flatten = flatten
        self._parts: dict[str, TensorDataset] = {}
        self._classes: tuple[Any, ...] = ()
        self._target_scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @abstractmethod
    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All features [N, ...] in float32, and targets: labels [N] in int64, or numbers [N, D] in float32; all finite."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and relabel, once; every stage has the same split.

        Raises:
            InputError: A held-out label is not in the data, fewer than two classes are left, or classes are held out of
                a regression.
        """
        if self._parts:
            return
        x, targets = self.load_arrays()
        if self.flatten:
            x = x.flatten(1)
        is_regression = targets.is_floating_point()
        names = None if is_regression else {label: label for label in sorted(set(targets.tolist()))}
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
        """The rows of each part.

        Args:
            targets: Labels [N] or numbers [N, D].
            names: Names of the labels, in the order of the labels; None for numbers.
            shares: Shares of training, validation and test samples, among the rows that are not fixed.
            fixed: Rows of parts that are given; a held-out class leaves them too.
        """
        fixed = fixed or {}
        inside = torch.ones(len(targets), dtype=torch.bool)
        if names is not None:
            inside = torch.isin(targets, torch.tensor([label for label, _ in self._kept(names)]))
        elif self.ood_classes:
            raise InputError(
                f"`ood_classes` must be empty for {self.name}, whose targets are numbers without classes, but it is "
                f"{listed(self.ood_classes)}."
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
                    f"Every class of {self.name} needs training rows, but {listed(absent)} is in the validation or test rows alone. "
                    "Leave these rows out, or hold the class out: `ood_classes`."
                )
            split = stratified_split(targets[candidates], self.seed, shares, names)
        parts = {part: candidates[rows] for part, rows in zip(("train", "val", "test"), split, strict=True)}
        given = {part: rows[inside[rows]] for part, rows in fixed.items()}
        return {**parts, **given, "ood": (~inside).nonzero().squeeze(1)}

    def _kept(self, names: Mapping[int, Any]) -> list[tuple[int, Any]]:
        """Labels and names of the classes in distribution."""
        unknown = [name for name in self.ood_classes if name not in names.values()]
        if unknown:
            raise InputError(
                f"`ood_classes` must hold labels of {self.name} ({listed(list(names.values()))}), but it holds {listed(unknown)}."
            )
        kept = [(label, name) for label, name in names.items() if name not in self.ood_classes]
        if len(names) < 2:
            raise InputError(f"A classification needs at least 2 classes, but {self.name} has {len(names)}.")
        if len(kept) < 2:
            raise InputError(
                f"`ood_classes` must leave at least 2 classes of {self.name} in distribution, but {listed(self.ood_classes)} "
                f"leaves {len(kept)}."
            )
        return kept

    def _fill(self, x: Tensor, targets: Tensor, rows: Mapping[str, Tensor], names: Mapping[int, Any] | None) -> None:
        y = targets
        if names is None:
            self._target_scale = _scale_of(targets[rows["train"]], self.name)
        else:
            kept = self._kept(names)
            self._classes = tuple(name for _, name in kept)
            y = torch.searchsorted(torch.tensor([label for label, _ in kept]), targets)
        self._parts = {
            part: TensorDataset(x[of_part], (targets if part == "ood" else y)[of_part])
            for part, of_part in rows.items()
        }

    # ------------------------------------------------------------------ what a network needs to know

    @property
    def task(self) -> TaskName:
        """``"classification"`` or ``"regression"``."""
        if not self._classes and self._target_scale is None:
            self.setup()
        return "classification" if self._classes else "regression"

    @property
    def classes(self) -> tuple[Any, ...]:
        """Original labels of classes 0 ... C-1.

        Raises:
            InputError: The task is a regression.
        """
        if self.task == "regression":
            raise InputError(f"{self.name} has no classes: its targets are numbers, which makes the task a regression.")
        return self._classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' labels as text."""
        return tuple(map(str, self.classes))

    @property
    def num_classes(self) -> int:
        """Number of classes in distribution, C."""
        return len(self.classes)

    @property
    def target_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training targets, per dimension: ``Regression(target_scale=...)``.

        Raises:
            InputError: The task is a classification.
        """
        if self.task == "classification" or self._target_scale is None:
            raise InputError(f"{self.name} has no `target_scale`: its targets are classes.")
        return self._target_scale

    @property
    def num_targets(self) -> int:
        """Number of target dimensions D of a regression."""
        return len(self.target_scale[0])

    @property
    def num_features(self) -> int:
        """Number of features of one input."""
        return self.dataset("train").tensors[0][0].numel()

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self.dataset("train"))

    def dataset(self, part: str) -> TensorDataset:
        """The samples of ``"train"``, ``"val"``, ``"test"`` or ``"ood"`` (there with their original labels)."""
        with torch.inference_mode(False):  # its tensors could not be trained on later
            self.setup()
        return self._parts[part]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, in an order that follows the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.dataset("train"), batch_size=self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return DataLoader(self.dataset("val"), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return DataLoader(self.dataset("test"), batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches again."""
        return self.test_dataloader()

    def ood_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Batches of the held-out classes, by name (``digits_8_9``); empty where none is held out."""
        held_out = self.dataset("ood")
        if not len(held_out):
            return {}
        name = "_".join([self.name, *map(str, self.ood_classes)])
        return {name: DataLoader(held_out, batch_size=self.batch_size)}


def standardized(x: Tensor, train: Tensor) -> Tensor:
    """Features [N, ...], scaled to mean 0 and variance 1 over the rows ``train``; a constant feature becomes 0."""
    # In float64: the variance of a large, nearly constant feature is rounding in float32.
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
            f"The training targets of {name} must vary, but dimension {listed(constant)} is constant: there is nothing to regress."
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def listed(values: Sequence[object]) -> str:
    """The values, separated by commas."""
    return ", ".join(map(str, values))

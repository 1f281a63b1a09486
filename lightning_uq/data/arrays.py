"""Features and class labels in arrays, split by seed, with whole classes held out as out-of-distribution data."""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.errors import InputError

SPLIT = (0.6, 0.2, 0.2)
"""Shares of training, validation and test samples."""


def stratified_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a 60/20/20 split that keeps the share of every class, each part in random order.

    Args:
        labels: Class labels [N].
        seed: Seed of the split; it moves no global random state.

    Returns:
        Indices of the training, validation and test samples.

    Raises:
        InputError: A class has fewer than three samples, so that a part would lack it.

    Example:
        >>> train, val, test = stratified_split(torch.tensor([0, 1]).repeat(10), seed=0)
        >>> len(train), len(val), len(test)
        (12, 4, 4)
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) < 3:
            raise InputError(
                f"Every class in distribution needs at least 3 samples, one for each part of the split, but "
                f"class {label} has {len(rows)}. Merge it, leave it out, or hold it out."
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = [max(1, round(share * len(rows))) for share in SPLIT[1:]]
        for part, chunk in zip(parts, rows.split([len(rows) - sum(held), *held]), strict=True):
            part.append(chunk)
    # Metrics over pairs of consecutive rows need an order in which a row tells nothing about the next one's class.
    joined = [torch.cat(part) for part in parts]
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in joined)  # type: ignore[return-value]


class ArrayDataModule(LightningDataModule):
    """The base of the flat classification data sets. A subclass provides :meth:`load_arrays`.

    Classes in distribution are relabelled 0 ... C-1 in the order of their labels; batches are ``(x [B, ...], y [B])``.
    Held-out classes never enter a split: they are there through :meth:`ood_dataloaders` alone.

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
        ood_classes: Sequence[int] = (),
        seed: int = 0,
        batch_size: int = 64,
        standardize: bool = False,
        flatten: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, but it is {batch_size}.")
        self.ood_classes = tuple(sorted(set(ood_classes)))
        self.seed = seed
        self.batch_size = batch_size
        self.standardize = standardize
        self.flatten = flatten
        self._parts: dict[str, TensorDataset] = {}
        self._classes: tuple[int, ...] = ()

    @abstractmethod
    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All features [N, ...] in float32 and their labels [N] in int64, finite and not negative."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and relabel, once; every stage has the same split.

        Raises:
            InputError: A held-out label is not in the data, or fewer than two classes are left.
        """
        if self._parts:
            return
        x, labels = self.load_arrays()
        if self.flatten:
            x = x.flatten(1)
        known = sorted(set(labels.tolist()))
        unknown = [label for label in self.ood_classes if label not in known]
        if unknown:
            raise InputError(
                f"`ood_classes` must hold labels of {self.name} ({_listed(known)}), but it holds {_listed(unknown)}."
            )
        self._classes = tuple(label for label in known if label not in self.ood_classes)
        if len(self._classes) < 2:
            raise InputError(
                f"`ood_classes` must leave at least 2 classes of {self.name} in distribution, but {_listed(self.ood_classes)} "
                f"leaves {len(self._classes)}."
            )
        inside = torch.isin(labels, torch.tensor(self._classes))
        outside = x[~inside], labels[~inside]
        x, labels = x[inside], labels[inside]
        split = stratified_split(labels, self.seed)
        if self.standardize:
            # In float64: the variance of a large, nearly constant feature is rounding in float32.
            train = x[split[0]].double()
            mean, std = train.mean(0), train.std(0, correction=0)
            std = torch.where(std > 1e-12 * mean.abs(), std, torch.inf)
            x, outside = ((x - mean) / std).float(), (((outside[0] - mean) / std).float(), outside[1])
        y = torch.searchsorted(torch.tensor(self._classes), labels)
        for part, rows in zip(("train", "val", "test"), split, strict=True):
            self._parts[part] = TensorDataset(x[rows], y[rows])
        self._parts["ood"] = TensorDataset(*outside)

    # ------------------------------------------------------------------ what a network needs to know

    @property
    def classes(self) -> tuple[int, ...]:
        """Original labels of classes 0 ... C-1."""
        self.setup()
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes in distribution, C."""
        return len(self.classes)

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


class NpzDataModule(ArrayDataModule):
    """A user's own ``.npz`` file: arrays ``x`` [N, ...] of numbers and ``y`` [N] of integer labels.

    Args:
        path: The file.
        ood_classes: Labels held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch.
        standardize: Scale every feature by the training samples' mean and standard deviation.
        flatten: Whether x is [B, d] whatever its shape was.

    Raises:
        InputError: The file cannot be read, an array is missing or holds what it must not; the message names both.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rings.npz"
        >>> np.savez(path, x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
        >>> data = NpzDataModule(str(path), ood_classes=[2])
        >>> data.num_features, data.num_classes, data.num_train, list(data.ood_dataloaders())
        (2, 2, 12, ['rings_2'])
    """

    def __init__(
        self,
        path: str,
        ood_classes: Sequence[int] = (),
        seed: int = 0,
        batch_size: int = 64,
        standardize: bool = True,
        flatten: bool = True,
    ) -> None:
        super().__init__(
            ood_classes=ood_classes, seed=seed, batch_size=batch_size, standardize=standardize, flatten=flatten
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
        if y.dtype.kind not in "iu":
            hint = " Convert whole numbers with `y.astype(int)`." if y.dtype.kind == "f" else ""
            raise InputError(f"Array `y` of {self.path} must hold integer labels, but its dtype is {y.dtype}.{hint}")
        if y.shape != x.shape[:1]:
            raise InputError(
                f"Array `y` of {self.path} must have shape [{len(x)}], one label for each row of `x`, but its shape is "
                f"{list(y.shape)}."
            )
        if int(y.min()) < 0:
            raise InputError(f"Array `y` of {self.path} must hold labels from 0 on, but it holds {int(y.min())}.")
        with np.errstate(over="ignore"):  # what overflows is infinite, and told below
            features = torch.from_numpy(x.astype(np.float32))
        finite = features.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise InputError(
                f"Array `x` of {self.path} must be finite in float32, but {int((~finite).sum())} of {len(x)} rows hold "
                f"NaN or infinity, the first at row {first}."
            )
        return features, torch.from_numpy(y.astype(np.int64))


def read_npz(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of an ``.npz`` file: all of ``names``, and those of ``optional`` that it has; no other is opened.

    Raises:
        InputError: The file cannot be read, or an array is missing.
    """
    try:
        # Pickled objects stay shut: opening them could run anything.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} must be an .npz file with arrays {_listed(names)}, but it is a single array.")
            missing = [name for name in names if name not in file.files]
            if missing:
                raise InputError(
                    f"{path} must hold arrays {_listed(names)}, but {_listed(missing)} is missing among "
                    f"{_listed(sorted(file.files)) or 'none'}."
                )
            return {name: file[name] for name in (*names, *optional) if name in file.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"{path} must be an .npz file with arrays {_listed(names)}, but there is no such file."
        ) from None
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} must be an .npz file with arrays {_listed(names)} of plain numbers, but it cannot be read: {error}."
        ) from error


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))

"""Regression tables of the literature: scikit-learn's diabetes, and the UCI sets with their published splits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_uq.data.arrays import ArrayDataModule, listed
from lightning_uq.data.splits import random_split
from lightning_uq.errors import InputError, MissingExtraError, without_period

NUM_SPLITS = 20


class DiabetesDataModule(ArrayDataModule):
    """Scikit-learn's diabetes: 442 patients with 10 measurements, and the progress of the disease one year later.

    The data come with scikit-learn, without a download. Features are standardized; targets [B, 1] stay in their units.

    Args:
        seed: Seed of the split (60/20/20) and of the order of the training batches.
        batch_size: Samples per batch.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Source: Efron et al., "Least angle regression", Annals of Statistics 32 (2004).

    Example:
        >>> data = DiabetesDataModule()
        >>> data.task, data.num_features, data.num_targets, data.num_train
        ('regression', 10, 1, 266)
    """

    name = "diabetes"

    def __init__(self, seed: int = 0, batch_size: int = 64) -> None:
        super().__init__(seed=seed, batch_size=batch_size, standardize=True)

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All 442 patients and their targets."""
        try:
            from sklearn.datasets import load_diabetes
        except ImportError as error:
            raise MissingExtraError(
                "The diabetes data need scikit-learn. Install the extra `data`: pip install 'lightning-uq[data]'."
            ) from error
        table = load_diabetes(scaled=False)
        return torch.from_numpy(table.data).float(), torch.from_numpy(table.target).float().unsqueeze(1)


class UCIDataModule(ArrayDataModule):
    """A UCI regression table in the layout of the literature: ``<root>/<table>/data.txt``, numbers separated by spaces.

    The last column is the target; ``naval-propulsion-plant`` has its target in column 16, and column 17 is not used. Features are
    standardized; targets [B, 1] stay in their units.

    Args:
        table: Name of the table's folder, for example ``"concrete"``.
        root: Folder of the tables.
        split: Number of the published split, 0 to 19: its 10 % of the rows are for testing, and a fifth of the others for validation. None: a 60/20/20
            split by ``seed``.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Samples per batch.

    Raises:
        InputError: ``split`` is out of range; from ``setup`` on: there is no such table, or it does not hold finite numbers.

    Source: Hernandez-Lobato & Adams, ICML 2015 (arXiv 1502.05336); the splits are those of Gal & Ghahramani's files
    (arXiv 1506.02142).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "yacht"
        >>> folder.mkdir()
        >>> np.savetxt(folder / "data.txt", np.random.default_rng(0).normal(size=(100, 7)))
        >>> data = UCIDataModule("yacht", root=str(folder.parent), split=3)
        >>> data.num_features, [len(data.dataset(part)) for part in ("train", "val", "test")]
        (6, [72, 18, 10])
    """

    def __init__(
        self, table: str, root: str = "data/uci", split: int | None = None, seed: int = 0, batch_size: int = 64
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size, standardize=True)
        if split is not None and not 0 <= split < NUM_SPLITS:
            raise InputError(f"`split` must be None or from 0 to {NUM_SPLITS - 1}, but it is {split}.")
        self.name = table
        self.root = Path(root)
        self.split = split

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All rows of the table."""
        path = self.root / self.name / "data.txt"
        if not path.is_file():
            found = sorted(folder.parent.name for folder in self.root.glob("*/data.txt"))
            raise InputError(
                f"`table` must name a folder of {self.root} with a data.txt ({listed(found) or 'there is none'}), but it is {self.name!r}."
            )
        try:
            values = np.loadtxt(path, ndmin=2)
        except ValueError as error:
            raise InputError(
                f"{path} must hold numbers separated by spaces, but it cannot be read: {without_period(error)}."
            ) from error
        if not np.isfinite(values).all() or values.shape[1] < 2:
            raise InputError(
                f"{path} must hold finite numbers in at least 2 columns, but its shape is {list(values.shape)}, and "
                f"{int((~np.isfinite(values)).sum())} are not finite."
            )
        target = 16 if self.name == "naval-propulsion-plant" else values.shape[1] - 1
        table = torch.from_numpy(values).float()
        return table[:, :target], table[:, target : target + 1]

    def _split(self, targets: Tensor, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        if self.split is None:
            return super()._split(targets, *arguments, **named)
        num = len(targets)
        source = np.random.RandomState(1)  # the published splits come from this generator
        orders = [source.choice(num, num, replace=False) for _ in range(self.split + 1)]
        order = torch.from_numpy(orders[-1])
        num_rest = round(0.9 * num)
        rest, test = order[:num_rest], order[num_rest:]
        train, val, _ = random_split(num_rest, self.seed, (0.8, 0.2, 0.0))
        return {"train": rest[train], "val": rest[val], "test": test, "ood": order[:0]}

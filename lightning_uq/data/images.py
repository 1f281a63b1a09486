"""Small-image data sets from files, split and normalized as in the DDU experiments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_uq.data.image_dataset import ImageDataset, shuffled_split
from lightning_uq.data.image_files import SOURCES, load_images
from lightning_uq.errors import InputError


class ImageDataModule(LightningDataModule):
    """The base of the image data sets. Batches are ``(x [B, C, H, W], y [B])``.

    A tenth of the official training set is for validation, and the official test set for testing. The files in ``root`` have
    torchvision's layout; only the files that are used need to exist.

    Args:
        root: Folder of the files.
        batch_size: Samples per batch.
        seed: Seed of the split, DDU's ``val_seed``, and of the order of the training batches.
        augment: Whether to augment the training batches, if the data set has an augmentation (CIFAR).
        ood_datasets: Names of the data sets whose test sets are the out-of-distribution data, with this data set's normalization:
            ``mnist``, ``fashion_mnist``, ``kmnist``, or ``cifar10``, ``cifar100``, ``svhn``.
        num_workers: Number of loading processes per loader.
        download: Whether torchvision may download missing files.

    Raises:
        InputError: The batch size is below 1, or an out-of-distribution data set is unknown, this one, or of another image size.

    Attributes:
        name: Name of the data.
        num_classes: Number of classes C.
        image_shape: Channels, height and width of an image.
    """

    name: str
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    has_augmentation: ClassVar[bool] = False
    num_classes: int
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        seed: int = 1,
        augment: bool = True,
        ood_datasets: Sequence[str] = (),
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, but it is {batch_size}.")
        source = SOURCES[self._source]
        self.num_classes, self.image_shape = source.num_classes, source.image_shape
        alike = [n for n, other in SOURCES.items() if n != self._source and other.image_shape == self.image_shape]
        for name in ood_datasets:
            if name not in alike:
                raise InputError(
                    f"`ood_datasets` of {self.name} must hold names from {', '.join(alike)}, whose images "
                    f"have the same size, but it holds {name!r}."
                )
        self.root = Path(root)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment and self.has_augmentation
        self.ood_datasets = tuple(ood_datasets)
        self.num_workers = num_workers
        self.download = download
        self._loaded: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def _source(self) -> str:
        """The name of the images' torchvision data set."""
        return self.name

    def prepare_data(self) -> None:
        """Download the files, if requested."""
        if self.download:
            for train in (True, False):
                load_images(self._source, self.root, train=train, download=True)
            for name in self.ood_datasets:
                load_images(name, self.root, train=False, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Load the files that ``stage`` needs, once."""
        if stage in ("fit", "validate", None):
            self._samples(train=True)
        if stage in ("test", "predict", None):
            self._samples(train=False)

    def load_samples(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, C, H, W], and for each sample its label [S] and the index of its image [S]."""
        images, labels = load_images(self._source, self.root, train=train)
        return images, labels, torch.arange(len(labels))

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self.dataset("train"))

    def dataset(self, part: Literal["train", "fit", "val", "test"]) -> Subset[tuple[Tensor, Tensor]]:
        """The samples of a part; ``"fit"`` is ``"train"`` without augmentation."""
        images, labels, rows = self._samples(train=part != "test")
        whole = ImageDataset(images, labels, self.mean, self.std, rows=rows, augment=self.augment and part == "train")
        if part == "test":
            return Subset(whole, range(len(whole)))
        train, val = shuffled_split(len(whole), self.seed)
        return Subset(whole, (val if part == "val" else train).tolist())

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented training batches, in an order determined by the seed."""
        return self._loader(self.dataset("train"), shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def uq_fit_dataloader(self) -> DataLoader[Any]:
        """The training samples in order and without augmentation, for fitting a density."""
        return self._loader(self.dataset("fit"))

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
        """Batches of the test sets of ``ood_datasets``, by name, with their own labels."""
        loaders = {}
        for name in self.ood_datasets:
            images, labels = load_images(name, self.root, train=False)
            loaders[name] = self._loader(ImageDataset(images, labels, self.mean, self.std))
        return loaders

    def _samples(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        if train not in self._loaded:
            self._loaded[train] = self.load_samples(train)
        return self._loaded[train]

    def _loader(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **arguments,
        )


class MNISTLike(ImageDataModule):
    """Images of 28 x 28 with MNIST's normalization."""

    mean, std = (0.1307,), (0.3081,)


class _CIFARLike(ImageDataModule):
    # The original uses CIFAR-10's numbers for all three.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class MNISTDataModule(MNISTLike):
    """Handwritten digits: 54,000 to train, 6,000 to validate, 10,000 to test. See :class:`ImageDataModule`.

    Source: LeCun et al., Proceedings of the IEEE 86 (1998).

    Example:
        >>> data = MNISTDataModule("data", ood_datasets=["fashion_mnist", "kmnist"])
        >>> data.name, data.num_classes, data.image_shape
        ('mnist', 10, (1, 28, 28))
    """

    name = "mnist"


class FashionMNISTDataModule(MNISTLike):
    """Pieces of clothing, as many as MNIST, with MNIST's normalization. See :class:`ImageDataModule`.

    Source: Xiao et al. (arXiv 1708.07747).

    Example:
        >>> FashionMNISTDataModule("data").image_shape
        (1, 28, 28)
    """

    name = "fashion_mnist"


class KMNISTDataModule(MNISTLike):
    """Cursive Japanese characters, as many as MNIST, with MNIST's normalization. See :class:`ImageDataModule`.

    Source: Clanuwat et al. (arXiv 1812.01718).

    Example:
        >>> KMNISTDataModule("data").num_classes
        10
    """

    name = "kmnist"


class CIFAR10DataModule(_CIFARLike):
    """Objects in ten classes: 45,000 to train, 5,000 to validate, 10,000 to test. See :class:`ImageDataModule`.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).

    Example:
        >>> CIFAR10DataModule("data", ood_datasets=["svhn", "cifar100"]).image_shape
        (3, 32, 32)
    """

    name = "cifar10"
    has_augmentation = True


class CIFAR100DataModule(_CIFARLike):
    """Objects in a hundred classes, as many as CIFAR-10 and normalized as it. See :class:`ImageDataModule`.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).

    Example:
        >>> CIFAR100DataModule("data").num_classes
        100
    """

    name = "cifar100"
    has_augmentation = True


class SVHNDataModule(_CIFARLike):
    """House numbers: 65,932 to train, 7,325 to validate, 26,032 to test; never augmented. See :class:`ImageDataModule`.

    Source: Netzer et al., NIPS workshop on deep learning (2011).

    Example:
        >>> SVHNDataModule("data").num_classes
        10
    """

    name = "svhn"

"""Small-image data sets on disk, split and normalized as in the DDU experiments."""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_uq.errors import InputError, MissingExtraError

VAL_SHARE = 0.1
"""Share of the official training set that validates."""

AMBIGUOUS_FILES = {
    "amnist_samples.pt": "4f7865093b1d28e34019847fab917722",
    "amnist_labels.pt": "3bfc055a9f91a76d8d493e8b898c3c95",
}
"""Files of Ambiguous-MNIST with the MD5 sums of its release data-v1.0.0."""

NUM_AMBIGUOUS_TRAIN = 60_000
"""Samples of the published Ambiguous-MNIST, each an image with one of its ten labels, that train; the others test."""


@dataclass(frozen=True)
class _Source:
    """A torchvision data set: its class there, and what its images are like."""

    torchvision_name: str
    num_classes: int
    image_shape: tuple[int, int, int]


_MNIST_SHAPE, _CIFAR_SHAPE = (1, 28, 28), (3, 32, 32)
_SOURCES = {
    "mnist": _Source("MNIST", 10, _MNIST_SHAPE),
    "fashion_mnist": _Source("FashionMNIST", 10, _MNIST_SHAPE),
    "kmnist": _Source("KMNIST", 10, _MNIST_SHAPE),
    "cifar10": _Source("CIFAR10", 10, _CIFAR_SHAPE),
    "cifar100": _Source("CIFAR100", 100, _CIFAR_SHAPE),
    "svhn": _Source("SVHN", 10, _CIFAR_SHAPE),
}


def shuffled_split(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and validation samples, as in the DDU code: the first tenth of a shuffle validates.

    Args:
        num_samples: Size N of the official training set.
        seed: Seed of numpy's legacy generator; the global one is not touched.

    Returns:
        Training and validation indices, together all of 0 ... N-1.

    Source: Mukhoti et al. (arXiv 2102.11582), its loaders (``np.random.seed``, ``np.random.shuffle``).

    Example:
        >>> shuffled_split(10, seed=1)
        (tensor([9, 6, 4, 0, 3, 1, 7, 8, 5]), tensor([2]))
    """
    order = np.arange(num_samples)
    np.random.RandomState(seed).shuffle(order)  # the legacy generator, whose splits are wanted
    num_val = int(VAL_SHARE * num_samples)
    indices = torch.from_numpy(order)
    return indices[num_val:], indices[:num_val]


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, augmented and normalized a batch at a time.

    Args:
        images: Images [N, C, H, W], uint8 in 0 ... 255 or floating point in 0 ... 1.
        labels: Labels [S] of the samples.
        mean: Mean of each channel, in units of images in 0 ... 1.
        std: Standard deviation of each channel.
        rows: The image [S] that each sample shows; by default sample i shows image i.
        augment: Shift each image by up to 4 pixels, over a border of zeros, and mirror half of them, anew at each look.

    Example:
        >>> data = ImageDataset(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 1]), [0.5], [0.25])
        >>> x, y = data[1]
        >>> x.shape, x.mean().item(), y.item()
        (torch.Size([1, 4, 4]), 2.0, 1)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        rows: Tensor | None = None,
        augment: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for: all samples of a batch at once."""
        chosen = torch.as_tensor(indices)
        x = self.images[self.rows[chosen]]
        if self.augment:
            x = _shift_and_mirror(x)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return list(zip((x - self.mean) / self.std, self.labels[chosen], strict=True))


class ImageDataModule(LightningDataModule):
    """What the image data sets share; batches are ``(x [B, C, H, W], y [B])``.

    A tenth of the official training set validates, the official test set tests. Files lie under ``root`` as torchvision
    lays them out; only those that are used need be there.

    Args:
        root: Folder of the files.
        batch_size: Samples a batch.
        seed: Seed of the split, DDU's ``val_seed``, and of the order of the training batches.
        augment: Augment the training batches, where the data set has an augmentation (CIFAR).
        ood_datasets: Names whose test sets are the out-of-distribution data, with this data set's normalization:
            ``mnist``, ``fashion_mnist``, ``kmnist``, or ``cifar10``, ``cifar100``, ``svhn``.
        num_workers: Processes that load, for each loader.
        download: Have torchvision download missing files.

    Raises:
        InputError: A batch size below 1, or an out-of-distribution data set that is unknown, this one, or of other images.

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
            raise InputError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}.")
        source = _SOURCES[self._source]
        self.num_classes, self.image_shape = source.num_classes, source.image_shape
        alike = [n for n, other in _SOURCES.items() if n != self._source and other.image_shape == self.image_shape]
        for name in ood_datasets:
            if name not in alike:
                raise InputError(
                    f"Expected argument `ood_datasets` of {self.name} to hold names among {', '.join(alike)}, whose images "
                    f"are as large, but got {name!r}."
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
        """The torchvision data set that the images come from."""
        return self.name

    def prepare_data(self) -> None:
        """Download, if that was asked for."""
        if self.download:
            for train in (True, False):
                load_images(self._source, self.root, train=train, download=True)
            for name in self.ood_datasets:
                load_images(name, self.root, train=False, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Load the files that ``stage`` needs; later calls find them loaded."""
        if stage in ("fit", "validate", None):
            self._samples(train=True)
        if stage in ("test", "predict", None):
            self._samples(train=False)

    def load_samples(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, C, H, W], and for each sample its label [S] and the image [S] that it shows."""
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
        """Training batches, augmented, in an order that follows the seed."""
        return self._loader(self.dataset("train"), shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def uq_fit_dataloader(self) -> DataLoader[Any]:
        """The training samples in order and without augmentation, to fit a density to."""
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


class _MNISTLike(ImageDataModule):
    mean, std = (0.1307,), (0.3081,)


class _CIFARLike(ImageDataModule):
    # The original has CIFAR-10's numbers for all three.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class MNISTDataModule(_MNISTLike):
    """Handwritten digits: 54,000 to train, 6,000 to validate, 10,000 to test. See :class:`ImageDataModule`.

    Source: LeCun et al., Proceedings of the IEEE 86 (1998).

    Example:
        >>> data = MNISTDataModule("data", ood_datasets=["fashion_mnist", "kmnist"])
        >>> data.name, data.num_classes, data.image_shape
        ('mnist', 10, (1, 28, 28))
    """

    name = "mnist"


class FashionMNISTDataModule(_MNISTLike):
    """Pieces of clothing, as many as MNIST, with MNIST's normalization. See :class:`ImageDataModule`.

    Source: Xiao et al. (arXiv 1708.07747).

    Example:
        >>> FashionMNISTDataModule("data").image_shape
        (1, 28, 28)
    """

    name = "fashion_mnist"


class KMNISTDataModule(_MNISTLike):
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


class DirtyMNISTDataModule(_MNISTLike):
    """MNIST and as many ambiguous digits, whose labels disagree: data with aleatoric uncertainty.

    Each ambiguous image comes ten times, with ten labels drawn from its label distribution. The published images are used
    where ``amnist_samples.pt`` and ``amnist_labels.pt`` lie under ``root`` or ``root/AmbiguousMNIST``: 6,000 train,
    6,000 test. Else the package makes its own *generated ambiguous digits* from MNIST (:func:`blend_digits`), 6,000 from
    its training digits and 6,000 from its test digits: results with these are not those of the published data. As in the
    original, the split is by sample, so that an image may train under one label and validate under another.

    Args:
        root: Folder of the files.
        batch_size: Samples a batch.
        seed: Seed of the split and of the order of the training batches.
        ood_datasets: See :class:`ImageDataModule`.
        num_workers: Processes that load, for each loader.
        download: Have torchvision download MNIST; the ambiguous digits are never downloaded.
        ambiguous: ``"published"`` (an error without the files), ``"generated"``, or ``"auto"`` as said above.
        num_generated: Number of generated images, for training and again for test.
        generation_seed: Seed of the generated images, apart from ``seed``: members of an ensemble share the data.

    Attributes:
        ambiguous_source: Once loaded, ``"published"`` (release data-v1.0.0), ``"published, another release"`` (by its
            checksum), or ``"generated ambiguous digits"``.

    Raises:
        InputError: An unknown ``ambiguous``, missing files, or files that do not hold ambiguous digits.

    Source: Mukhoti et al. (arXiv 2102.11582); package ddu_dirty_mnist, without its noise.

    Example:
        >>> DirtyMNISTDataModule("data", ood_datasets=["fashion_mnist"]).num_classes
        10
    """

    name = "dirty_mnist"

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        seed: int = 1,
        ood_datasets: Sequence[str] = (),
        num_workers: int = 0,
        download: bool = False,
        ambiguous: Literal["auto", "published", "generated"] = "auto",
        num_generated: int = 6000,
        generation_seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            batch_size,
            seed,
            augment=False,
            ood_datasets=ood_datasets,
            num_workers=num_workers,
            download=download,
        )
        if ambiguous not in ("auto", "published", "generated"):
            raise InputError(
                f"Expected argument `ambiguous` to be 'auto', 'published' or 'generated', but got {ambiguous!r}."
            )
        self.ambiguous = ambiguous
        self.num_generated = num_generated
        self.generation_seed = generation_seed
        self.ambiguous_source: str | None = None
        self._num_clean = 0

    @property
    def _source(self) -> str:
        return "mnist"

    def load_samples(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """MNIST's samples, then the ambiguous ones, ten in a row an image."""
        images, labels = load_images("mnist", self.root, train=train)
        blurred, many_labels = self._load_ambiguous(images, labels, train)
        if not train:
            self._num_clean = len(images)
        if blurred.is_floating_point():
            images = images.float() / 255
        rows = len(images) + torch.arange(len(blurred)).repeat_interleave(many_labels.shape[1])
        return (
            torch.cat([images, blurred]),
            torch.cat([labels, many_labels.flatten()]),
            torch.cat([torch.arange(len(images)), rows]),
        )

    def test_part_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """The test batches of ``"mnist"`` and ``"ambiguous"`` apart."""
        images, labels, rows = self._samples(train=False)
        whole = ImageDataset(images, labels, self.mean, self.std, rows=rows)
        parts = {"mnist": range(self._num_clean), "ambiguous": range(self._num_clean, len(whole))}
        return {name: self._loader(Subset(whole, indices)) for name, indices in parts.items()}

    def _load_ambiguous(self, images: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        folders = [self.root / "AmbiguousMNIST", self.root]
        folder = next((f for f in folders if all((f / name).is_file() for name in AMBIGUOUS_FILES)), None)
        if self.ambiguous == "published" and folder is None:
            raise InputError(
                f"Expected {' and '.join(AMBIGUOUS_FILES)} of Ambiguous-MNIST in {folders[0]} or {folders[1]}, but they are "
                "not there. Get them from the releases of github.com/BlackHC/ddu_dirty_mnist, or pass "
                "`ambiguous='generated'`."
            )
        if self.ambiguous == "generated" or folder is None:
            self.ambiguous_source = "generated ambiguous digits"
            generator = torch.Generator().manual_seed(2 * self.generation_seed + (not train))
            return blend_digits(images, labels, self.num_generated, generator=generator)
        blurred, many_labels, known = _read_ambiguous(folder)
        self.ambiguous_source = "published" if known else "published, another release"
        cut = NUM_AMBIGUOUS_TRAIN // many_labels.shape[1]
        if len(blurred) <= cut:
            raise InputError(
                f"Expected Ambiguous-MNIST in {folder} to hold more than {cut} images, but got {len(blurred)}."
            )
        part = slice(cut) if train else slice(cut, None)
        return blurred[part], many_labels[part]


def blend_digits(
    images: Tensor, labels: Tensor, num_images: int, num_labels: int = 10, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Generated ambiguous digits: pixel averages w a + (1 - w) b of two digits of different classes, w in [0.4, 0.6].

    They stand in for Ambiguous-MNIST, which a generative model made; they are easier to tell from digits than those.

    Args:
        images: Digits [N, 1, H, W] in uint8.
        labels: Their classes [N], at least two.
        num_images: Number M of blends.
        num_labels: Labels K that each blend gets.
        generator: Source of randomness.

    Returns:
        Blends [M, 1, H, W] in uint8, and labels [M, K], each a's class with probability w and b's else.

    Raises:
        InputError: One class alone, or no digits.

    Example:
        >>> digits = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> blends, labels = blend_digits(digits, torch.tensor([3, 8]), 4, generator=torch.Generator().manual_seed(0))
        >>> bool(((blends >= 80) & (blends <= 120)).all()), labels.unique()
        (True, tensor([3, 8]))
    """
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2:
        raise InputError(f"Expected argument `labels` to hold at least 2 classes to blend, but got {classes}.")
    first = torch.randint(len(labels), (num_images,), generator=generator)
    second = first.clone()
    while bool((same := labels[first] == labels[second]).any()):
        second[same] = torch.randint(len(labels), (int(same.sum()),), generator=generator)
    weight = 0.4 + 0.2 * torch.rand(num_images, generator=generator)
    w = weight.view(-1, 1, 1, 1)
    blends = (w * images[first].float() + (1 - w) * images[second].float()).round().to(torch.uint8)
    takes_first = torch.rand(num_images, num_labels, generator=generator) < weight.unsqueeze(1)
    return blends, torch.where(takes_first, labels[first].unsqueeze(1), labels[second].unsqueeze(1))


def load_images(name: str, root: str | Path, *, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """An official training or test set as tensors, read by torchvision from its files under ``root``.

    Args:
        name: ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``, ``cifar100`` or ``svhn``.
        root: Folder of the files; of the two sets only the one asked for need be there.
        train: The training set, else the test set.
        download: Have torchvision download missing files.

    Returns:
        Images [N, C, H, W] in uint8 and labels [N] in int64.

    Raises:
        InputError: An unknown name, or files that are missing or damaged.
        MissingExtraError: SVHN without scipy, which reads its files.

    Example:
        >>> load_images("mnist", "nowhere", train=False)
        Traceback (most recent call last):
            ...
        lightning_uq.errors.InputError: Expected the test files of MNIST in nowhere, as torchvision lays them out, but it \
says: Dataset not found. You can use download=True to download it
    """
    if name not in _SOURCES:
        raise InputError(f"Expected argument `name` to be one of {', '.join(_SOURCES)}, but got {name!r}.")
    datasets: Any = importlib.import_module("torchvision.datasets")
    base = getattr(datasets, _SOURCES[name].torchvision_name)
    # Torchvision wants the files of both sets; a subclass of the same name, after which folders are called, wants one.
    if issubclass(base, datasets.MNIST):
        needed: dict[str, Any] = {"resources": base.resources[:2] if train else base.resources[2:]}
    elif name == "svhn":
        needed = {}
    else:
        needed = {"test_list": []} if train else {"train_list": []}
    chosen: Any = type(base.__name__, (base,), needed)
    which: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        dataset = chosen(str(root), **which, download=download)
    except ImportError as error:
        raise MissingExtraError(
            f"Reading {base.__name__} needs scipy, which the extra `data` brings: pip install 'lightning-uq[data]'."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"Expected the {'training' if train else 'test'} files of {base.__name__} in {root}, as torchvision lays them "
            f"out, but it says: {error}"
        ) from error
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if name == "svhn" else dataset.targets
    return images.contiguous(), torch.as_tensor(labels).long()


def _read_ambiguous(folder: Path) -> tuple[Tensor, Tensor, bool]:
    """Images [M, 1, 28, 28] in 0 ... 1, labels [M, K], and whether the files are those of the known release."""
    tensors, known = [], True
    for name, checksum in AMBIGUOUS_FILES.items():
        path = folder / name
        known &= hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == checksum
        try:
            tensors.append(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises as many kinds as there are ways to damage a file
            raise InputError(f"Expected {path} to hold a tensor, but it cannot be read: {error}") from error
    images, labels = tensors
    if not (isinstance(images, Tensor) and images.shape[1:] == _MNIST_SHAPE and images.is_floating_point()):
        raise InputError(
            f"Expected {folder / 'amnist_samples.pt'} to hold floats [M, 1, 28, 28], but got {_said(images)}."
        )
    if not (bool((images >= 0).all()) and bool((images <= 1).all())):
        raise InputError(f"Expected {folder / 'amnist_samples.pt'} to hold values in [0, 1], but it does not.")
    if not (isinstance(labels, Tensor) and labels.ndim == 2 and len(labels) == len(images)):
        raise InputError(
            f"Expected {folder / 'amnist_labels.pt'} to hold labels [{len(images)}, K], but got {_said(labels)}."
        )
    if labels.is_floating_point() or not (bool((labels >= 0).all()) and bool((labels <= 9).all())):
        raise InputError(f"Expected {folder / 'amnist_labels.pt'} to hold digits 0 to 9, but it does not.")
    return images.float(), labels.long(), known


def _said(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _shift_and_mirror(x: Tensor, reach: int = 4) -> Tensor:
    """A random crop of each image [B, C, H, W], padded with zeros by ``reach``, and a mirror image of half of them."""
    batch, channels, height, width = x.shape
    top, left = torch.randint(2 * reach + 1, (2, batch, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    return F.pad(x, [reach] * 4)[
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(channels).view(1, -1, 1, 1),
        rows.view(batch, 1, height, 1),
        columns.view(batch, 1, 1, width),
    ]

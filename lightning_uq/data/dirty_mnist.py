"""Dirty-MNIST: digits, and ambiguous digits whose labels disagree."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_uq.data.ambiguous_digits import AMBIGUOUS_FILES, blend_digits, read_ambiguous
from lightning_uq.data.image_dataset import ImageDataset
from lightning_uq.data.image_files import load_images
from lightning_uq.data.images import MNISTLike
from lightning_uq.errors import InputError

NUM_AMBIGUOUS_TRAIN = 60_000
"""Number of samples of the published Ambiguous-MNIST (an image with one of its ten labels) for training; the rest are for testing."""


class DirtyMNISTDataModule(MNISTLike):
    """MNIST and as many ambiguous digits with conflicting labels: data with aleatoric uncertainty.

    Each ambiguous image occurs ten times, with ten labels drawn from its label distribution. The published images are used
    if ``amnist_samples.pt`` and ``amnist_labels.pt`` exist in ``root`` or ``root/AmbiguousMNIST``: 6,000 for training and
    6,000 for testing. Otherwise the package makes its own *generated ambiguous digits* from MNIST (:func:`blend_digits`), 6,000 from
    its training digits and 6,000 from its test digits; results with these differ from those with the published data. As in the
    original, the split is by sample, so an image may be in the training set with one label and in the validation set with another.

    Args:
        root: Folder of the files.
        batch_size: Samples per batch.
        seed: Seed of the split and of the order of the training batches.
        ood_datasets: See :class:`ImageDataModule`.
        num_workers: Number of loading processes per loader.
        download: Whether torchvision may download MNIST; the ambiguous digits are never downloaded.
        ambiguous: ``"published"`` (raises without the files), ``"generated"``, or ``"auto"`` as described above.
        num_generated: Number of generated images for training, and the same number for testing.
        generation_seed: Seed of the generated images, separate from ``seed``, so that members of an ensemble share the data.

    Attributes:
        ambiguous_source: Once loaded, ``"published"`` (release data-v1.0.0), ``"published, another release"`` (by its
            checksum), or ``"generated ambiguous digits"``.

    Raises:
        InputError: ``ambiguous`` is unknown, files are missing, or files do not hold ambiguous digits.

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
            raise InputError(f"`ambiguous` must be 'auto', 'published' or 'generated', but it is {ambiguous!r}.")
        self.ambiguous = ambiguous
        self.num_generated = num_generated
        self.generation_seed = generation_seed
        self.ambiguous_source: str | None = None
        self._num_clean = 0

    @property
    def _source(self) -> str:
        return "mnist"

    def load_samples(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """MNIST's samples, followed by the ambiguous ones, ten consecutive samples per image."""
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
        """Separate test batches of ``"mnist"`` and ``"ambiguous"``."""
        images, labels, rows = self._samples(train=False)
        whole = ImageDataset(images, labels, self.mean, self.std, rows=rows)
        parts = {"mnist": range(self._num_clean), "ambiguous": range(self._num_clean, len(whole))}
        return {name: self._loader(Subset(whole, indices)) for name, indices in parts.items()}

    def _load_ambiguous(self, images: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        folders = [self.root / "AmbiguousMNIST", self.root]
        folder = next((f for f in folders if all((f / name).is_file() for name in AMBIGUOUS_FILES)), None)
        if self.ambiguous == "published" and folder is None:
            raise InputError(
                f"{' and '.join(AMBIGUOUS_FILES)} of Ambiguous-MNIST must be in {folders[0]} or {folders[1]}, but they are "
                "not. Get them from the releases of github.com/BlackHC/ddu_dirty_mnist, or pass "
                "`ambiguous='generated'`."
            )
        if self.ambiguous == "generated" or folder is None:
            self.ambiguous_source = "generated ambiguous digits"
            generator = torch.Generator().manual_seed(2 * self.generation_seed + (not train))
            return blend_digits(images, labels, self.num_generated, generator=generator)
        blurred, many_labels, known = read_ambiguous(folder)
        self.ambiguous_source = "published" if known else "published, another release"
        cut = NUM_AMBIGUOUS_TRAIN // many_labels.shape[1]
        if len(blurred) <= cut:
            raise InputError(
                f"Ambiguous-MNIST in {folder} must hold more than {cut} images, but it holds {len(blurred)}."
            )
        part = slice(cut) if train else slice(cut, None)
        return blurred[part], many_labels[part]

"""A user's own images, in one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_uq.data.arrays import ArrayDataModule, given_task, listed
from lightning_uq.data.image_dataset import ImageDataset
from lightning_uq.data.image_folder_files import FolderFiles, FolderImages, channel_scale, find_files
from lightning_uq.data.splits import SPLIT
from lightning_uq.errors import InputError

MEMORY_LIMIT = 2**30
"""The largest size in bytes of all images in memory. Larger sets are read from their files, batch by batch."""


class ImageFolderDataModule(ArrayDataModule):
    """Images in ``<path>/<class>/``, split by a seed, or in ``<path>/train/<class>/``, ``val`` and ``test`` for a fixed split.

    Batches are ``(x [B, C, H, W], y [B])``, normalized per channel by the mean and standard deviation of the training images. C is 1 if
    all images are gray, else 3. If ``val`` or ``test`` is missing, its share is taken from ``train``. The
    images are read in :meth:`setup`, unless they need more than 1 GiB.

    Args:
        path: The folder.
        image_size: Height and width to which the images are resized, or one number for both. None: their own size, which must be equal.
        ood_classes: Names of classes held out as out-of-distribution data.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Images per batch.
        task: ``"classification"``, which ``"auto"`` selects, or ``"binary"``.
        num_workers: Number of loading processes per loader.

    Raises:
        InputError: An argument is out of range. From :meth:`setup` on: the folder has another layout, an image cannot be read, or
            the sizes differ; the message names the file.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp()) / "pets"
        >>> for i in range(20):
        ...     file = folder / ["cat", "dog"][i % 2] / f"{i}.png"
        ...     file.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (8, 8), (10 * i, 0, 100)).save(file)
        >>> data = ImageFolderDataModule(str(folder))
        >>> data.name, data.class_names, data.input_shape, data.num_train
        ('pets', ('cat', 'dog'), (3, 8, 8), 12)
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int | Sequence[int] | None = None,
        ood_classes: Sequence[int | str] = (),
        seed: int = 0,
        batch_size: int = 64,
        task: Literal["auto", "classification", "binary"] = "auto",
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            ood_classes=ood_classes,
            seed=seed,
            batch_size=batch_size,
            flatten=False,
            task=given_task(task) or "classification",
        )
        if self._given_task not in ("classification", "binary"):
            raise InputError(
                f"A folder with one subfolder per class is a classification or binary task, but `task` is {task!r}."
            )
        sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
            raise InputError(f"`image_size` must be one or two numbers of at least 1, but it is {image_size!r}.")
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.image_size = None if sizes is None else (int(sizes[0]), int(sizes[1]))
        self.num_workers = num_workers
        self._scale: tuple[list[float], list[float]] = ([], [])

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All images [N, C, H, W] in 0 ... 1, and labels in the order of the class names."""
        files = find_files(self.path)
        images = FolderImages(files.paths, self.image_size)
        return images[torch.arange(len(files.paths))].float() / 255, files.labels

    def setup(self, stage: str | None = None) -> None:
        """Find, split and read the images, once.

        Raises:
            InputError: See the class.
        """
        if self._parts:
            return
        files = find_files(self.path)
        self._task = self._given_task
        names: dict[int, Any] = dict(enumerate(files.classes))
        positions = {part: [i for i, one in enumerate(files.parts) if one == part] for part in ("val", "test")}
        fixed = {part: torch.tensor(rows) for part, rows in positions.items() if rows}
        rows = self._split(files.labels, names, SPLIT, fixed)
        found = FolderImages(files.paths, self.image_size)
        images: Any = found
        if found.num_bytes <= MEMORY_LIMIT:
            images = found[torch.arange(len(files.paths))]
        self._scale = channel_scale(images, rows["train"])
        self._fill(images, files.labels, rows, names)
        self._notes += self._made_notes(files, found)

    def _dataset(self, x: Any, y: Tensor, rows: Tensor) -> ImageDataset:
        return ImageDataset(x, y[rows], *self._scale, rows=rows)

    def _made_notes(self, files: FolderFiles, images: FolderImages) -> tuple[str, ...]:
        notes = []
        height, width = images.size
        if images.sizes != [images.size]:
            notes.append(f"Images of {len(images.sizes)} sizes are resized to {height} x {width}.")
        if files.ignored:
            shown = listed([one.name for one in files.ignored[:3]]) + ", ..." * (len(files.ignored) > 3)
            notes.append(
                f"{len(files.ignored)} files are skipped, because their names are not those of images: {shown}."
            )
        return tuple(notes)

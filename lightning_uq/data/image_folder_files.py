"""The image files of a folder: their paths, common properties, and pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_uq.errors import InputError, without_period

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
GREY, COLOURED = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA", "RGBX")
"""Pillow's 8-bit modes."""


@dataclass(frozen=True)
class FolderFiles:
    """The image files below a folder, in order.

    Attributes:
        paths: The files.
        classes: Names of the classes.
        labels: Class of each file [N].
        parts: The part of the split of each file; all are ``"train"`` if the folder has no parts.
        ignored: Files with other suffixes.
    """

    paths: list[Path]
    classes: list[str]
    labels: Tensor
    parts: list[str]
    ignored: list[Path]


def find_files(folder: Path) -> FolderFiles:
    """The files of ``<folder>/<class>/...``, or of ``<folder>/<part>/<class>/...`` with parts ``train``, ``val`` and ``test``.

    Raises:
        InputError: There is no such folder, or a class has no image.
    """
    if not folder.is_dir():
        raise InputError(f"`path` must be a folder of images, but {folder} is not a folder.")
    names = [one.name for one in _subfolders(folder)]
    has_parts = "train" in names and set(names) <= {"train", "val", "test"}
    roots = (
        [(part, folder / part) for part in ("train", "val", "test") if part in names]
        if has_parts
        else [("train", folder)]
    )
    classes = sorted({one.name for _, root in roots for one in _subfolders(root)})
    if not classes:
        raise InputError(
            f"{folder} must hold one subfolder of images per class, or train, val and test with such subfolders, but it holds "
            f"{', '.join(names) or 'no folders'}."
        )
    paths, labels, parts, ignored = [], [], [], []
    for part, root in roots:
        for label, name in enumerate(classes):
            files = sorted(one for one in (root / name).rglob("*") if one.is_file() and not one.name.startswith("."))
            images = [one for one in files if one.suffix.lower() in SUFFIXES]
            if (root / name).is_dir() and not images:
                raise InputError(
                    f"{root / name} must hold images ({', '.join(SUFFIXES)}), but it holds {len(files)} other files."
                )
            paths += images
            labels += [label] * len(images)
            parts += [part] * len(images)
            ignored += [one for one in files if one not in images]
    return FolderFiles(paths, classes, torch.tensor(labels), parts, ignored)


class FolderImages:
    """The pixels of image files, read on demand.

    Args:
        paths: The files.
        size: Height and width to which they are resized; None: their own size, which must be equal.

    Attributes:
        sizes: The different heights and widths of the files.
        size: Height and width of all images.
        mode: ``"L"`` if all files are gray, else ``"RGB"``.

    Raises:
        InputError: A file cannot be read or has more than 8 bits per channel, or the sizes differ.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None) -> None:
        self.paths = list(paths)
        heads = [_read(path, lambda image: (image.height, image.width, image.mode)) for path in self.paths]
        for path, (_, _, mode) in zip(self.paths, heads, strict=True):
            if mode not in GREY + COLOURED:
                raise InputError(
                    f"{path} must have 8 bits per channel, but its mode is {mode}. Convert it, for example to PNG."
                )
        self.sizes = sorted({(height, width) for height, width, _ in heads})
        self.mode = "L" if all(mode in GREY for _, _, mode in heads) else "RGB"
        if size is None and len(self.sizes) > 1:
            (low, left), (high, right) = self.sizes[0], self.sizes[-1]
            raise InputError(
                f"The images must have the same size, but there are {len(self.sizes)} sizes, such as {low} x {left} and {high} x {right}. Pass "
                "`image_size` to resize them."
            )
        self.size = size or self.sizes[0]

    @property
    def num_bytes(self) -> int:
        """The size of all images in memory, in bytes."""
        return len(self.paths) * (3 if self.mode == "RGB" else 1) * self.size[0] * self.size[1]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The images [n, C, H, W] of rows [n], in uint8."""
        return torch.stack([_read(self.paths[row], self._pixels) for row in rows.tolist()])

    def _pixels(self, image: Image.Image) -> Tensor:
        image = image.convert(self.mode)
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), resample=Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image))
        return pixels.unsqueeze(0) if self.mode == "L" else pixels.permute(2, 0, 1).contiguous()


def _read(path: Path, read: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return read(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image: {without_period(error)}. Repair it, or remove it."
        ) from error


def _subfolders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return (
        sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(hidden))
        if folder.is_dir()
        else []
    )


def channel_scale(images: Any, rows: Tensor) -> tuple[list[float], list[float]]:
    """The mean and standard deviation per channel, of images in 0 ... 1; the latter is 1 for a constant channel."""
    # All images have the same size, so the moments of all are the means of the images' moments.
    moments = []
    for chunk in torch.split(rows, 256):
        pixels = images[chunk].double() / 255
        moments.append(torch.stack([pixels.mean((2, 3)), pixels.square().mean((2, 3))]))
    mean, square = torch.cat(moments, 1).mean(1)
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.tolist(), torch.where(std > 1e-6, std, 1.0).tolist()

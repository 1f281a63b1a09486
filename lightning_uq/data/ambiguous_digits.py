"""Ambiguous digits: the published Ambiguous-MNIST from its files, and generated blends as a replacement."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from lightning_uq.data.image_files import MNIST_SHAPE
from lightning_uq.errors import InputError

AMBIGUOUS_FILES = {
    "amnist_samples.pt": "4f7865093b1d28e34019847fab917722",
    "amnist_labels.pt": "3bfc055a9f91a76d8d493e8b898c3c95",
}
"""Files of Ambiguous-MNIST with the MD5 sums of its release data-v1.0.0."""


def blend_digits(
    images: Tensor, labels: Tensor, num_images: int, num_labels: int = 10, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Generated ambiguous digits: pixel averages w a + (1 - w) b of two digits of different classes, w in [0.4, 0.6].

    They replace Ambiguous-MNIST, which was made by a generative model. Blends are easier to distinguish from digits.

    Args:
        images: Digits [N, 1, H, W] in uint8.
        labels: Their classes [N], at least two.
        num_images: Number M of blends.
        num_labels: Number K of labels per blend.
        generator: Source of randomness.

    Returns:
        Blends [M, 1, H, W] in uint8, and labels [M, K]: a's class with probability w, and b's otherwise.

    Raises:
        InputError: There is only one class, or there are no digits.

    Example:
        >>> digits = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> blends, labels = blend_digits(digits, torch.tensor([3, 8]), 4, generator=torch.Generator().manual_seed(0))
        >>> bool(((blends >= 80) & (blends <= 120)).all()), labels.unique()
        (True, tensor([3, 8]))
    """
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2:
        raise InputError(f"`labels` must hold at least 2 classes to blend, but it holds {classes}.")
    first = torch.randint(len(labels), (num_images,), generator=generator)
    second = first.clone()
    while bool((same := labels[first] == labels[second]).any()):
        second[same] = torch.randint(len(labels), (int(same.sum()),), generator=generator)
    weight = 0.4 + 0.2 * torch.rand(num_images, generator=generator)
    w = weight.view(-1, 1, 1, 1)
    blends = (w * images[first].float() + (1 - w) * images[second].float()).round().to(torch.uint8)
    takes_first = torch.rand(num_images, num_labels, generator=generator) < weight.unsqueeze(1)
    return blends, torch.where(takes_first, labels[first].unsqueeze(1), labels[second].unsqueeze(1))


def read_ambiguous(folder: Path) -> tuple[Tensor, Tensor, bool]:
    """Images [M, 1, 28, 28] in 0 ... 1, labels [M, K], and whether the files have the checksums of the known release."""
    tensors, known = [], True
    for name, checksum in AMBIGUOUS_FILES.items():
        path = folder / name
        known &= hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == checksum
        try:
            tensors.append(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises many types of errors for damaged files
            raise InputError(f"{path} must hold a tensor, but it cannot be read: {error}") from error
    images, labels = tensors
    if not (isinstance(images, Tensor) and images.shape[1:] == MNIST_SHAPE and images.is_floating_point()):
        raise InputError(
            f"{folder / 'amnist_samples.pt'} must hold floats [M, 1, 28, 28], but it is {_describe(images)}."
        )
    if not (bool((images >= 0).all()) and bool((images <= 1).all())):
        raise InputError(f"{folder / 'amnist_samples.pt'} must hold values in [0, 1], but it does not.")
    if not (isinstance(labels, Tensor) and labels.ndim == 2 and len(labels) == len(images)):
        raise InputError(
            f"{folder / 'amnist_labels.pt'} must hold labels [{len(images)}, K], but it is {_describe(labels)}."
        )
    if labels.is_floating_point() or not (bool((labels >= 0).all()) and bool((labels <= 9).all())):
        raise InputError(f"{folder / 'amnist_labels.pt'} must hold digits 0 to 9, but it does not.")
    return images.float(), labels.long(), known


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

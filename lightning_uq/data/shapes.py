"""Drawn shapes for segmentation, without a download, with both kinds of uncertainty by construction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.data.arrays import ArrayDataModule
from lightning_uq.data.splits import random_split
from lightning_uq.errors import InputError

SIZE = 32
IGNORED = 255
CLASS_NAMES = ("background", "disc", "square", "triangle")
DRAWING_SEED = 20240601
COLOURS = 1.6 * torch.eye(3)
"""The mean colors of discs, squares and triangles."""
AMBIGUOUS = 0.2
"""Share of the discs and squares that are drawn halfway between both, with either label."""
BOLDNESS = 0.12
"""Standard deviation of the radius of a label relative to the drawn radius."""


class ShapesDataModule(ArrayDataModule):
    """Images [B, 3, 32, 32] of one to three colored shapes on a cloudy background, and the class [B, 32, 32] of every pixel.

    The classes are background, disc, square and triangle. Each class has a usual color, from
    which a shape's own color differs. No model can be certain: the labels
    of a shape are slightly too large or too small, as if drawn by annotators, and a fifth of the discs and squares are drawn halfway
    between the two, with either label. The outermost pixels have the label 255, which does not count. Out-of-distribution
    images show crosses in mixtures of two of these colors, and their pixels also have the label 255. The images are the same for every seed; only the split differs.

    Args:
        num_images: Number of images, split 60/20/20. A fifth of this number of images with crosses is added.
        seed: Seed of the split and of the order of the training batches.
        batch_size: Images per batch.

    Raises:
        InputError: There are fewer than 10 images.

    Example:
        >>> data = ShapesDataModule(num_images=20)
        >>> data.task, data.task_arguments, data.num_train
        ('segmentation', {'num_classes': 4, 'ignore_index': 255}, 12)
        >>> x, y = next(iter(data.test_dataloader()))
        >>> x.shape, y.shape, list(data.ood_dataloaders())
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 32, 32]), ['shapes_cross'])
    """

    name = "shapes"

    def __init__(self, num_images: int = 250, seed: int = 0, batch_size: int = 64) -> None:
        super().__init__(ood_classes=("cross",), seed=seed, batch_size=batch_size, flatten=False, task="segmentation")
        if num_images < 10:
            raise InputError(f"`num_images` must be at least 10, but it is {num_images}.")
        self.num_images = num_images
        self._classes = CLASS_NAMES

    @property
    def task_arguments(self) -> dict[str, Any]:
        """The number of classes, and the label that does not count."""
        return {"num_classes": len(CLASS_NAMES), "ignore_index": IGNORED}

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All images and labels; those with crosses are last."""
        generator = torch.Generator().manual_seed(DRAWING_SEED)
        kinds = [False] * self.num_images + [True] * (self.num_images // 5)
        drawn = [_draw(has_crosses, generator) for has_crosses in kinds]
        return torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn])

    def _split(self, targets: Tensor, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        train, val, test = random_split(self.num_images, self.seed)
        return {"train": train, "val": val, "test": test, "ood": torch.arange(self.num_images, len(targets))}


def _draw(has_crosses: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image [3, 32, 32] with a mean of about 0 and a variance of about 1, and its labels [32, 32]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    clouds = F.interpolate(torch.randn(1, 3, 6, 6, generator=generator), size=(SIZE, SIZE), mode="bilinear")[0]
    image = 0.4 * clouds + uniform(-0.5, 0.5, 3, 1, 1)
    label = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        radius, top, left = uniform(4.0, 8.0, 1), uniform(6, SIZE - 6, 1), uniform(6, SIZE - 6, 1)
        kind = int(torch.randint(1, 4, (), generator=generator))
        is_ambiguous = kind < 3 and not has_crosses and bool(torch.rand((), generator=generator) < AMBIGUOUS)
        distance = _distance(0 if has_crosses else kind, (row - top) / radius, (column - left) / radius, is_ambiguous)
        inside = distance < 1
        usual = COLOURS[kind - 1] + (COLOURS[kind % 3] if has_crosses else 0)
        colour = usual.view(3, 1, 1) + 0.6 * torch.randn(3, 1, 1, generator=generator)
        image = torch.where(inside, colour + 0.2 * clouds, image)
        boldness = 1 + BOLDNESS * torch.randn((), generator=generator)
        label[distance < boldness] = IGNORED if has_crosses else kind
    label[0], label[-1], label[:, 0], label[:, -1] = IGNORED, IGNORED, IGNORED, IGNORED
    return image + 0.3 * torch.randn(3, SIZE, SIZE, generator=generator), label


def _distance(kind: int, v: Tensor, u: Tensor, is_ambiguous: bool) -> Tensor:
    """A distance that is below 1 inside a cross (0), disc (1), square (2) or triangle (3) of radius 1 around the origin."""
    u, v = u.abs(), v if kind == 3 else v.abs()
    if kind == 0:
        return torch.minimum(torch.maximum(u, 3 * v), torch.maximum(3 * u, v))
    if kind == 3:
        return torch.maximum(v, 2 * u - v)
    if is_ambiguous:
        return (u**4 + v**4) ** 0.25
    return (u**2 + v**2).sqrt() if kind == 1 else torch.maximum(u, v)

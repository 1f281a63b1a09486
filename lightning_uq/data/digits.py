"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with the package, without a download."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.data.arrays import ArrayDataModule
from lightning_uq.errors import MissingExtraError


class DigitsDataModule(ArrayDataModule):
    """Handwritten digits 0-9 as flat inputs [B, 64] in [0, 1], with some of the classes held out.

    Args:
        ood_classes: Digits held out as out-of-distribution data.
        seed: Seed of the split (60/20/20, stratified) and of the order of the training batches.
        batch_size: Samples per batch.
        flatten: Whether x is [B, 64]; else images [B, 1, 8, 8].

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Source: Alpaydin & Kaynak, UCI "Optical Recognition of Handwritten Digits" (1998), its test part.

    Example:
        >>> data = DigitsDataModule(ood_classes=(8, 9))
        >>> data.num_features, data.num_classes, data.num_train
        (64, 8, 867)
        >>> {name: len(loader.dataset) for name, loader in data.ood_dataloaders().items()}
        {'digits_8_9': 354}
    """

    name = "digits"

    def __init__(
        self, ood_classes: Sequence[int] = (8, 9), seed: int = 0, batch_size: int = 64, flatten: bool = True
    ) -> None:
        super().__init__(ood_classes=ood_classes, seed=seed, batch_size=batch_size, flatten=flatten)

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """All 1,797 images and their digits."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingExtraError(
                "The digits need scikit-learn. Install the extra `data`: pip install 'lightning-uq[data]'."
            ) from error
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        return images, torch.from_numpy(digits.target).long()

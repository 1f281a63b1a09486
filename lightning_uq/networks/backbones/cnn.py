"""A small convolutional network for images of any size, which trains in seconds on a CPU."""

from collections.abc import Sequence

from torch import nn

from lightning_uq.networks.mlp import check_sizes


class CNN(nn.Sequential):
    """Stages of a 3x3 convolution, GroupNorm, ReLU and max-pooling, then the mean over positions and a linear layer.

    Outputs are [B, C] for images [B, in_channels, H, W].
    GroupNorm has no batch statistics, so members can be stacked, and batches of one row can be trained on.

    Args:
        num_classes: Outputs C.
        in_channels: Channels of the input.
        widths: Channels of the stages, multiples of 8; each stage halves height and width.
        dropout: Probability of a zero after each stage.

    Raises:
        InputError: A size is below 1.

    Source: Wu & He, "Group normalization", ECCV 2018 (arXiv 1803.08494).

    Example:
        >>> import torch
        >>> CNN(10, in_channels=1)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        dropout: float = 0.0,
    ) -> None:
        check_sizes(num_classes=num_classes, in_channels=in_channels, widths=widths)
        layers: list[nn.Module] = []
        width = in_channels
        for size in widths:
            layers += [nn.Conv2d(width, size, 3, padding=1), nn.GroupNorm(8, size), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

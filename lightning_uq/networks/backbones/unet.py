"""A small fully convolutional network for maps, which trains in seconds on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.networks.mlp import check_sizes


class UNet(nn.Module):
    """An encoder and a decoder with skip connections at every resolution, and a 1x1 convolution ``head``.

    Every level has two 3x3 convolutions with GroupNorm and ReLU. Height and width may be any numbers.

    Args:
        num_classes: Outputs C per position.
        in_channels: Channels of the input.
        width: Channels of the first level, a multiple of 8; each level below has twice as many.
        depth: Levels below the first one.
        dropout: Probability of a zero after each level.

    Raises:
        InputError: A size is below 1.

    Source: Ronneberger et al., MICCAI 2015 (arXiv 1505.04597), smaller, and with padding.

    Example:
        >>> UNet(4)(torch.zeros(2, 3, 31, 20)).shape
        torch.Size([2, 4, 31, 20])
    """

    def __init__(
        self, num_classes: int = 2, *, in_channels: int = 3, width: int = 16, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _level(before, after, dropout) for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(_level(3 * size, size, dropout) for size in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, C, H, W] of images [B, in_channels, H, W]."""
        skips: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2, ceil_mode=True) if skips else x)
            skips.append(x)
        for level, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = level(torch.cat([skip, F.interpolate(x, size=skip.shape[2:])], 1))
        outputs: Tensor = self.head(x)
        return outputs


def _level(in_channels: int, channels: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (in_channels, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU()]
    return nn.Sequential(*layers, *[nn.Dropout(dropout)] * bool(dropout))

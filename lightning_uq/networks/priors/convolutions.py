"""Convolutions with TensorFlow's padding, and the small convolutional function of priors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError


def pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad [..., H, W] as TensorFlow's SAME: output size ceil(size / stride); an odd row is added at the end.

    Args:
        x: Images [..., H, W].
        kernel_size: Height and width of the window.
        stride: Stride of the window.
        value: The padding value; -inf before max-pooling.

    Example:
        >>> pad_same(torch.ones(1, 4), (1, 3), (1, 2)).tolist()
        [[1.0, 1.0, 1.0, 1.0, 0.0]]
    """
    padding: list[int] = []
    for size, kernel, step in zip(x.shape[:-3:-1], kernel_size[::-1], stride[::-1], strict=True):
        missing = max((-(-size // step) - 1) * step + kernel - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return F.pad(x, padding, value=value)


# Recorded as one call, because the padding depends on the size, which a tracer does not know.
torch.fx.wrap("pad_same")


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: output size ceil(size / stride); an odd row is added at the end.

    Example:
        >>> SameConv2d(3, 4, 5, stride=2)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 4, 16, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', ceil(H / s), ceil(W / s)]."""
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class ConvFunction(nn.Module):
    """A small network of SAME convolutions, whose features are flattened with channels last.

    Images with a size other than ``image_size`` are resized to it, bilinearly and with antialiasing.

    Args:
        num_outputs: C.
        channels: Channels of the convolutions, each followed by a ReLU.
        kernel_sizes: Kernel size of each convolution.
        strides: Stride of each convolution.
        image_size: Height and width of the resized images.
        in_channels: Channels of the images [B, in_channels, H, W].

    Example:
        >>> ConvFunction(10)(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_outputs: int,
        channels: Sequence[int] = (4, 8, 4),
        kernel_sizes: Sequence[int] = (5, 5, 5),
        strides: Sequence[int] = (2, 2, 2),
        image_size: int = 32,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        sizes = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            SameConv2d(a, b, k, stride=s)
            for a, b, k, s in zip(sizes[:-1], channels, kernel_sizes, strides, strict=True)
        )
        for stride in strides:
            image_size = -(-image_size // stride)
        self.linear = nn.Linear(image_size**2 * sizes[-1], num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, C] of images [B, in_channels, H, W]."""
        if x.ndim != 4:
            raise InputError(
                f"The input of a convolutional prior must be [B, C, H, W], but its shape is {list(x.shape)}."
            )
        size = (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        for convolution in self.convolutions:
            x = convolution(x).relu()
        output: Tensor = self.linear(x.permute(0, 2, 3, 1).flatten(1))
        return output


class ChannelsLast(nn.Module):
    """[B, C, H, W] to [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """The input with its axes permuted."""
        return x.permute(0, 2, 3, 1)

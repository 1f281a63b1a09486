"""Residual networks for small images: a 3x3 first convolution of stride 1 and no pooling before the blocks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError


class AvgPoolShortcut(nn.Module):
    """A shortcut without weights: average pooling, followed by channels of zeros after those of the input.

    The average over s x s pixels preserves distances better than a strided 1x1 convolution. At an odd height, every s-th
    pixel is used without averaging.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least ``in_channels``.
        stride: Size s of the pooling window and its stride.

    Source: Mukhoti et al. (arXiv 2102.11582), appendix, and its code.

    Example:
        >>> import torch
        >>> AvgPoolShortcut(1, 2, stride=2)(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten().tolist()
        [1.5, 0.0]
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, out_channels, ceil(H / s), ceil(W / s)] of an input [B, in_channels, H, W]."""
        window = 1 if x.shape[2] % 2 else self.stride
        return F.pad(F.avg_pool2d(x, window, self.stride), (0, 0, 0, 0, 0, self.added_channels))


def make_activation(modified: bool) -> nn.Module:
    """Leaky ReLU (slope 0.01) if the network is modified, else ReLU."""
    return nn.LeakyReLU() if modified else nn.ReLU()


class _Block(nn.Module, ABC):
    """The sum of a residual branch and a shortcut, before the last activation. Subclasses define the branch."""

    expansion: ClassVar[int]

    def __init__(self, in_channels: int, channels: int, stride: int, modified: bool) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self._make_branch(in_channels, channels, stride)
        self.activation = make_activation(modified)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            if modified:
                self.shortcut.append(AvgPoolShortcut(in_channels, out_channels, stride))
            else:
                self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
                self.shortcut.append(nn.BatchNorm2d(out_channels))

    @abstractmethod
    def _make_branch(self, in_channels: int, channels: int, stride: int) -> None:
        """Create the layers of the residual branch."""


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def _make_branch(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H / stride, W / stride]."""
        branch = self.activation(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        out: Tensor = self.activation(branch + self.shortcut(x))
        return out


class Bottleneck(_Block):
    """A 1x1 convolution, a 3x3 convolution with the stride, and a 1x1 convolution to four times the channels."""

    expansion = 4

    def _make_branch(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4 channels, H / stride, W / stride]."""
        branch = self.activation(self.bn1(self.conv1(x)))
        branch = self.activation(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        out: Tensor = self.activation(branch + self.shortcut(x))
        return out


_BLOCKS: dict[str, type[_Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Four stages of residual blocks with 64, 128, 256 and 512 channels, average pooling, and a linear layer ``fc``.

    Args:
        block: ``"basic"`` (features of 512 dimensions) or ``"bottleneck"`` (2048).
        num_blocks: Blocks in each of the four stages.
        num_classes: Classes C.
        in_channels: Channels of the input.
        modified: Use leaky ReLU, and :class:`AvgPoolShortcut` instead of a 1x1 convolution in the shortcut.

    Raises:
        InputError: ``block`` is unknown, or ``num_blocks`` is not four positive numbers.

    Source: He et al., CVPR 2016 (arXiv 1512.03385); the changes are those of Mukhoti et al. (arXiv 2102.11582),
    whose checkpoints load.

    Example:
        >>> import torch
        >>> ResNet("basic", num_blocks=[1, 1, 1, 1], modified=True)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        *,
        num_blocks: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        modified: bool = False,
    ) -> None:
        super().__init__()
        if block not in _BLOCKS:
            raise InputError(f"`block` must be one of {list(_BLOCKS)}, but it is {block!r}.")
        if len(num_blocks) != 4 or min(num_blocks) < 1:
            raise InputError(f"`num_blocks` must be four numbers of at least 1, but it is {list(num_blocks)}.")
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.activation = make_activation(modified)
        width = 64
        for stage, number in enumerate(num_blocks):
            channels = 64 * 2**stage
            blocks = []
            for i in range(number):
                stride = 2 if stage and not i else 1
                blocks.append(_BLOCKS[block](width, channels, stride, modified))
                width = channels * _BLOCKS[block].expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, H, W]."""
        x = self.activation(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet18(num_classes: int = 10, *, in_channels: int = 3, modified: bool = False) -> ResNet:
    """ResNet-18: 11.17 M parameters, 11.00 M modified. See :class:`ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet18().parameters())
        11173962
    """
    blocks = (2, 2, 2, 2)
    return ResNet("basic", num_blocks=blocks, num_classes=num_classes, in_channels=in_channels, modified=modified)


def resnet50(num_classes: int = 10, *, in_channels: int = 3, modified: bool = False) -> ResNet:
    """ResNet-50: 23.52 M parameters, 20.74 M modified. See :class:`ResNet`.

    Example:
        >>> resnet50().fc.in_features
        2048
    """
    blocks = (3, 4, 6, 3)
    return ResNet("bottleneck", num_blocks=blocks, num_classes=num_classes, in_channels=in_channels, modified=modified)


def resnet110(num_classes: int = 10, *, in_channels: int = 3, modified: bool = False) -> ResNet:
    """The ResNet-110 of the DDU code: bottlenecks (3, 4, 26, 3), 43.09 M parameters if modified. See :class:`ResNet`.

    The thin ResNet-110 for CIFAR of He et al. is another network, with 1.7 M parameters.

    Example:
        >>> sum(isinstance(layer, Bottleneck) for layer in resnet110().modules())
        36
    """
    blocks = (3, 4, 26, 3)
    return ResNet("bottleneck", num_blocks=blocks, num_classes=num_classes, in_channels=in_channels, modified=modified)

"""Wide residual networks, with BatchNorm and activation before each convolution."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.backbones.resnet import AvgPoolShortcut, make_activation


class WideBlock(nn.Module):
    """Two 3x3 convolutions with dropout between them, and a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dropout: float,
        modified: bool,
        batchnorm_momentum: float,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, momentum=batchnorm_momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, momentum=batchnorm_momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.activation = make_activation(modified)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if modified:
                self.shortcut = AvgPoolShortcut(in_channels, out_channels, stride)
            else:
                self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, out_channels, H / stride, W / stride]."""
        branch = self.conv1(self.activation(self.bn1(x)))
        branch = self.conv2(self.dropout(self.activation(self.bn2(branch))))
        out: Tensor = branch + self.shortcut(x)
        return out


class WideResNet(nn.Module):
    """Wide ResNet, by default WRN-28-10: 36.48 M parameters, 36.22 M modified, features of 640 dimensions.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        depth: Number of convolutions, 6 n + 4.
        widen_factor: Channels are 16, 32 and 64 times this.
        dropout: Probability of dropout between the convolutions of a block.
        batchnorm_momentum: Momentum of every BatchNorm.
        modified: Use leaky ReLU, and :class:`~lightning_uq.networks.backbones.resnet.AvgPoolShortcut` instead of a 1x1
            convolution in the shortcut.

    Raises:
        InputError: ``depth`` is not 6 n + 4 for any n of at least 1.

    Source: Zagoruyko & Komodakis, BMVC 2016 (arXiv 1605.07146); the changes, dropout, momentum and initialization are
    those of Mukhoti et al. (arXiv 2102.11582), whose checkpoints load.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, widen_factor=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        depth: int = 28,
        widen_factor: int = 10,
        dropout: float = 0.3,
        batchnorm_momentum: float = 0.01,
        modified: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise InputError(f"`depth` must be 6 n + 4 with n of at least 1, but it is {depth}.")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        for stage in (1, 2, 3):
            blocks = []
            for i in range((depth - 4) // 6):
                width = widths[stage] if i else widths[stage - 1]
                stride = 1 if i or stage == 1 else 2
                blocks.append(WideBlock(width, widths[stage], stride, dropout, modified, batchnorm_momentum))
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=batchnorm_momentum)
        self.activation = make_activation(modified)
        self.linear = nn.Linear(widths[3], num_classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.activation(self.bn1(x))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits

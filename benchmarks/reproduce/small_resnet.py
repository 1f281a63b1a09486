"""Networks that a CPU can train: ResNets and VGG-16 with fewer channels."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_uq.networks.backbones.resnet import BasicBlock


class SmallResNet(nn.Module):
    """A convolution, residual blocks, average pooling and a linear layer.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        widths: Channels of the first convolution, then of each block; a block whose channels differ from those before it halves the image.
    """

    def __init__(
        self, num_classes: int = 10, *, in_channels: int = 3, widths: Sequence[int] = (16, 16, 32, 64, 128)
    ) -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(*[BasicBlock(a, b, 1 + (a != b), False) for a, b in pairwise(widths)])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def narrow_resnet18() -> SmallResNet:
    """ResNet-18 for grey images with an eighth of its channels."""
    return SmallResNet(in_channels=1, widths=(8, 8, 8, 16, 16, 32, 32, 64, 64))


def narrow_vgg16() -> nn.Sequential:
    """VGG-16 for grey images of 28 x 28 pixels with an eighth of its channels."""
    layers: list[nn.Module] = []
    width = 1
    for stage, (channels, convolutions) in enumerate(zip((8, 16, 32, 64, 64), (2, 2, 3, 3, 3), strict=True)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        if stage:  # as in the package's VGG16: images of 28 x 28 pixels skip the first pooling
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10))

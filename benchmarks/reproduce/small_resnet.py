"""A residual network that a CPU can train."""

from itertools import pairwise

from torch import Tensor, nn

from lightning_uq.networks.backbones.resnet import BasicBlock


class SmallResNet(nn.Module):
    """Four residual blocks of 16, 32, 64 and 128 channels, average pooling and a linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, 16, 32, 64, 128]
        self.blocks = nn.Sequential(*[BasicBlock(a, b, 1 + (a != b), False) for a, b in pairwise(widths)])
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

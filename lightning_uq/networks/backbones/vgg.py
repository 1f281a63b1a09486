"""VGG-16 with BatchNorm, for small images."""

from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.backbones.resnet import make_activation

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions with BatchNorm in five stages, and one linear layer: 14.72 M parameters.

    Max-pooling follows each stage, and after the last one, one pixel with 512 features is left. 28x28 inputs skip the first pooling.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        input_size: Height and width of the input, 28 or 32.
        modified: Use leaky ReLU.

    Raises:
        InputError: ``input_size`` is neither 28 nor 32.

    Source: Simonyan & Zisserman, ICLR 2015 (arXiv 1409.1556); as in Mukhoti et al. (arXiv 2102.11582), whose
    checkpoints load.

    Example:
        >>> import torch
        >>> VGG16(in_channels=1, input_size=28)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        input_size: int = 32,
        modified: bool = False,
    ) -> None:
        super().__init__()
        if input_size not in (28, 32):
            raise InputError(f"`input_size` must be 28 or 32, but it is {input_size}.")
        layers: list[nn.Module] = []
        width = in_channels
        for stage, widths in enumerate(_STAGES):
            for channels in widths:
                # The convolutions of the original code have no bias.
                layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
                layers.append(make_activation(modified))
                width = channels
            if stage or input_size == 32:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, input_size, input_size]."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits

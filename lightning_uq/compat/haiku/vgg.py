"""VGG of DeepMind's ENN: strides instead of max-pooling, and the mean over pixels before one linear layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.compat.haiku.batch_norm import DebiasedBatchNorm2d
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.priors.convolutions import SameConv2d

_CHANNELS = (64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)
_STRIDES = (1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1)


class ENNVGG(nn.Module):
    """VGG of ENN: eleven 3x3 convolutions of 64 to 512 channels, three of them strided, and the mean over pixels.

    It differs from :class:`~lightning_uq.networks.backbones.VGG16`. Each SAME convolution has a bias and is followed by batch
    normalization with only an offset, and a ReLU. Images may have any size.
    :func:`~lightning_uq.compat.haiku.load_haiku` loads ENN's parameters and state, 7,790,794 parameters with the default arguments.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.

    Source: ``enn.networks.vgg`` (google-deepmind/enn at da8ec76); decay 0.999 of the averages.

    Example:
        >>> import torch
        >>> ENNVGG()(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        widths = (in_channels, *_CHANNELS)
        self.convolutions = nn.ModuleList(
            SameConv2d(a, b, 3, stride=s) for a, b, s in zip(widths[:-1], _CHANNELS, _STRIDES, strict=True)
        )
        self.norms = nn.ModuleList(DebiasedBatchNorm2d(width, decay=0.999, scale=False) for width in _CHANNELS)
        self.logits = nn.Linear(widths[-1], num_classes)
        truncated_normal_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, H, W]."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        logits: Tensor = self.logits(x.mean((2, 3)))
        return logits

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their Haiku names below the network's own name."""
        layers: dict[tuple[str, ...], nn.Module] = {}
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            layers |= {(f"conv_2d_{i}",): convolution, (f"batchnorm_{i}",): norm}
        return {**layers, ("logits",): self.logits}

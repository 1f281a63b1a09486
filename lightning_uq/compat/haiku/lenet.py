"""LeNet-5 of DeepMind's ENN: three SAME convolutions with max-pooling, and two linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.priors.convolutions import SameConv2d

_CHANNELS = (6, 16, 120)


class ENNLeNet(nn.Module):
    """LeNet-5 of ENN: 6, 16 and 120 channels of 5x5, each followed by ReLU and 2x2 max-pooling, then 84 features.

    It differs from :class:`~lightning_uq.networks.backbones.LeNet`, which has two unpadded convolutions. The convolutions and
    poolings are TensorFlow's SAME, and pixels are flattened with channels last. :func:`~lightning_uq.compat.haiku.load_haiku`
    loads ENN's parameters, 212,906 for images 1 x 28 x 28.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        input_size: Height and width of the input; they set the width of the first linear layer.

    Raises:
        InputError: ``input_size`` is below 1.

    Source: ``enn.networks.lenet`` (google-deepmind/enn at da8ec76).

    Example:
        >>> import torch
        >>> ENNLeNet()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, input_size: int = 28) -> None:
        super().__init__()
        check_integer("input_size", input_size, 1)
        widths = (in_channels, *_CHANNELS)
        self.convolutions = nn.ModuleList(SameConv2d(a, b, 5) for a, b in zip(widths[:-1], _CHANNELS, strict=True))
        side = -(-input_size // 2 ** len(_CHANNELS))
        self.linear = nn.Linear(side**2 * widths[-1], 84)
        self.logits = nn.Linear(84, num_classes)
        truncated_normal_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, input_size, input_size]."""
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2, ceil_mode=True)
        logits: Tensor = self.logits(F.relu(self.linear(x.permute(0, 2, 3, 1).flatten(1))))
        return logits

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their Haiku names below the network's own name."""
        layers: dict[tuple[str, ...], nn.Module] = {
            (f"conv_2d_{i}",): convolution for i, convolution in enumerate(self.convolutions)
        }
        return {**layers, ("linear",): self.linear, ("logits",): self.logits}

"""LeNet-5 with ReLU and max-pooling, for 28x28 inputs."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.functional.validation import check_integer


class LeNet(nn.Module):
    """LeNet-5: two convolutions and three linear layers, 44,426 parameters; the features are 84-dimensional.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        input_size: Height and width of the input, at least 16; the first linear layer depends on it.

    Raises:
        InputError: ``input_size`` is below 16.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86 (1998);
    widths and activations of Mukhoti et al. (arXiv 2102.11582).

    Example:
        >>> import torch
        >>> LeNet()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 1,
        input_size: int = 28,
    ) -> None:
        super().__init__()
        check_integer("input_size", input_size, 16)
        side = ((input_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, input_size, input_size]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits

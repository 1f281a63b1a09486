"""The Neural Testbed's reference: equal probabilities for all classes and inputs."""

import torch
from torch import Tensor

from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.indexers import EnsembleIndexer


class UniformNetwork(EpistemicNetwork):
    """Logits of zero, and no parameters.

    Args:
        num_classes: C.

    Example:
        >>> UniformNetwork(3)(torch.ones(1, 4), torch.arange(1))
        tensor([[[0., 0., 0.]]])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(EnsembleIndexer(1))
        self.num_outputs = num_classes

    def sample_index(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Zeros [Z]. No random number is drawn, so a bandit's actions do not depend on it."""
        return torch.zeros(num_samples, dtype=torch.long)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Zeros [Z, B, C]."""
        return x.new_zeros(len(index), len(x), self.num_outputs)


class UniformModule(UncertaintyModule):
    """Always predicts 1 / C, without training.

    Args:
        num_classes: C.

    Example:
        >>> UniformModule(num_classes=4).predict(torch.zeros(1, 2)).probs
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(UniformNetwork(num_classes))

"""The MLP of the Neural Testbed's agents."""

from collections.abc import Sequence

from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP


def haiku_mlp(in_features: int, out_features: int, hidden_sizes: Sequence[int] = (50, 50)) -> MLP:
    """A ReLU MLP with Haiku's initial weights: the network of the testbed's agents.

    Args:
        in_features: Input dimension d.
        out_features: C.
        hidden_sizes: Widths of the hidden layers.

    Example:
        >>> haiku_mlp(10, 2)[0].bias.any()
        tensor(False)
    """
    network = MLP(in_features, out_features, hidden_sizes=hidden_sizes)
    truncated_normal_init_(network)
    return network

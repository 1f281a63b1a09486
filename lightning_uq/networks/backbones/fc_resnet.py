"""A residual network of linear layers, for points in the plane and other feature vectors."""

from typing import Literal

from torch import Tensor, nn

from lightning_uq.errors import InputError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}


class FCResNet(nn.Module):
    """``depth`` residual blocks x <- x + dropout(activation(W x + b)) between two linear layers.

    With a bound below 1, every residual block is invertible, and the features preserve distances between inputs. The
    two-moons experiment of DDU uses ``spectral_normalize(network, coefficient=0.65, n_power_iterations=5,
    exclude=["last"])``.

    Args:
        in_features: Features of the input [B, in_features].
        num_classes: Classes C.
        hidden_features: Width of the blocks and of the features.
        depth: Number of blocks.
        dropout: Probability that dropout zeroes an activation.
        activation: ``"relu"`` or ``"elu"``.

    Raises:
        InputError: ``activation`` is unknown.

    Source: Liu et al., "Simple and principled uncertainty estimation", NeurIPS 2020 (arXiv 2006.10108); sizes of the
    two-moons notebook of Mukhoti et al. (arXiv 2102.11582).

    Example:
        >>> import torch
        >>> from lightning_uq.networks import spectral_normalize
        >>> network = spectral_normalize(FCResNet(2), coefficient=0.65, exclude=["last"])
        >>> network(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int = 2,
        *,
        num_classes: int = 2,
        hidden_features: int = 128,
        depth: int = 4,
        dropout: float = 0.0,
        activation: Literal["relu", "elu"] = "relu",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise InputError(f"`activation` must be one of {list(_ACTIVATIONS)}, but it is {activation!r}.")
        self.first = nn.Linear(in_features, hidden_features)
        self.residuals = nn.ModuleList(nn.Linear(hidden_features, hidden_features) for _ in range(depth))
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of inputs [B, in_features]."""
        x = self.first(x)
        for residual in self.residuals:
            x = x + self.dropout(self.activation(residual(x)))
        logits: Tensor = self.last(x)
        return logits

"""A random prior of one member: a frozen network beside the trained one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.priors.frozen import freeze_as_buffers


class NetworkWithPrior(nn.Module):
    """A trained network plus a frozen random one: network(x) + scale * prior(x).

    Training cannot undo the prior away from the data, so members with independent priors disagree there. The prior's weights
    are buffers, and it is always in eval mode. The gradient with respect to ``x`` flows through both networks.

    Args:
        network: The trained part.
        prior: The random part, with outputs of the same shape. For an output [B, 2 D] of means and raw variances, it shifts both.
            Its parameters become buffers, in place.
        scale: Factor of the prior.

    Raises:
        InputError: The two outputs differ in shape.

    Source: Osband et al., "Randomized Prior Functions for Deep Reinforcement Learning", NeurIPS 2018 (arXiv 1806.03335).

    Example:
        >>> network = NetworkWithPrior(nn.Linear(2, 1), nn.Linear(2, 1), scale=3.0)
        >>> [name for name, _ in network.named_parameters()]
        ['network.weight', 'network.bias']
    """

    def __init__(self, network: nn.Module, prior: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        self.prior = freeze_as_buffers(prior)
        self.scale = scale

    def train(self, mode: bool = True) -> "NetworkWithPrior":
        """Set the mode of the trained part; the prior stays in eval mode."""
        super().train(mode)
        self.prior.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, ...] of the network with its prior."""
        return add_prior(self.network(x), self.prior(x), self.scale)


def priors_of_members(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The prior of each :class:`NetworkWithPrior` among ``modules``."""
    return [module.prior for module in modules if isinstance(module, NetworkWithPrior)]


def trained_part(network: nn.Module) -> nn.Module:
    """The trained part of a :class:`NetworkWithPrior`, or any other network itself."""
    return network.network if isinstance(network, NetworkWithPrior) else network


def add_prior(output: Tensor, prior: Tensor, scale: float) -> Tensor:
    """output + scale * prior, which have the same shape."""
    if output.shape != prior.shape:
        raise InputError(
            f"The prior's output must have the network's shape {list(output.shape)}, but its shape is {list(prior.shape)}."
        )
    return output + scale * prior


# A tracer of the networks records it as one call, including its check of shapes.
torch.fx.wrap("add_prior")

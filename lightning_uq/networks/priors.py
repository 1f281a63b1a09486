"""Additive random priors: a frozen random function that training cannot move."""

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError


def freeze_as_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter of ``module`` into a buffer of the same name, in place, and set it to eval mode.

    The state dict keeps its names, and the weights move with the module; no optimizer, weight decay, gradient clipping
    or DDP ever sees them.

    Args:
        module: The module tree; a parameter that two names share stays shared.

    Returns:
        ``module`` itself.

    Raises:
        InputError: A lazy module has not seen its first batch.

    Example:
        >>> frozen = freeze_as_buffers(nn.Linear(2, 1))
        >>> list(frozen.parameters()), sorted(frozen.state_dict())
        ([], ['bias', 'weight'])
    """
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError(f"Expected argument `module` to be initialised, but {type(module).__name__} is lazy.")
    buffers: dict[int, Tensor] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None:
                del submodule._parameters[name]
                buffer = buffers.setdefault(id(parameter), parameter.detach())
                submodule.register_buffer(name, buffer)
        if isinstance(submodule, nn.RNNBase):
            submodule._apply(lambda t: t, recurse=False)  # type: ignore[no-untyped-call]  # renews its list of weights
    return module.eval()


class NetworkWithPrior(nn.Module):
    """A trained network plus a frozen random one: network(x) + scale * prior(x).

    What the prior gives away from the data the trained part does not unlearn there, so members with independent priors
    disagree where no data spoke. Its weights are buffers and it is always in eval mode; the gradient to ``x`` runs
    through both.

    Args:
        network: The part that is trained.
        prior: The random part, with outputs of the same shape (an output [B, 2 D] of means and raw variances has both
            moved); its parameters are turned into buffers, in place.
        scale: Standard deviation of the prior's part relative to its own initialisation.

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


def add_prior(output: Tensor, prior: Tensor, scale: float) -> Tensor:
    """output + scale * prior, of one shape."""
    if output.shape != prior.shape:
        raise InputError(
            f"Expected the prior's output to have the network's shape {list(output.shape)}, but got {list(prior.shape)}."
        )
    return output + scale * prior


# A tracer of the networks records the call whole, with its check of shapes.
torch.fx.wrap("add_prior")

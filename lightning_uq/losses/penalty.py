"""Penalties on a network, added to its training loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast

Predicate = Callable[[str, Tensor], bool]


class Penalty(ABC):
    """A module's ``regularizer``: a function of the network and the inputs, added to the training loss.

    Attributes:
        sums_members: Whether the penalty of an ensemble is the sum of its members' penalties. :class:`MemberParallelStrategy` needs this,
            and reads the attribute of any regularizer.
    """

    sums_members: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, network: nn.Module, x: Any) -> Tensor:
        """A scalar from an epistemic network and the batch's inputs."""


def not_a_prior(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is trained, and its name does not contain "prior"."""
    return parameter.requires_grad and "prior" not in name


def l2_weight_decay(
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    scale: float | Callable[[Tensor], Tensor] = 1.0,
    predicate: Predicate = not_a_prior,
) -> Tensor:
    """scale * sum p^2 over the parameters, biases included; there is no factor 1/2.

    Its gradient equals that of the ``weight_decay`` of ``torch.optim.SGD`` or ``Adam`` with twice the scale, but not that of AdamW,
    which decays weights outside the gradient.

    Args:
        parameters: A module, or names and tensors.
        scale: A factor, or a function applied to each parameter before it is squared.
        predicate: Called with name and parameter; parameters for which it is False are left out. By default these are
            frozen ones and those with "prior" in their names.

    Returns:
        A scalar; zero if no parameter counts.

    Raises:
        InputError: ``scale`` is negative.

    Example:
        >>> l2_weight_decay({"weight": torch.tensor([1.0, 2.0], requires_grad=True)}, 0.1).item()
        0.5
    """
    if not callable(scale) and not scale >= 0:
        raise InputError(f"`scale` must be a number of at least 0, or a function, but it is {scale!r}.")
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    elif isinstance(parameters, Mapping):
        parameters = parameters.items()
    named = [(name, p) for name, p in parameters]
    counted = [upcast(p) for name, p in named if predicate(name, p)]
    if not counted:
        return named[0][1].new_zeros((), dtype=upcast(named[0][1]).dtype) if named else torch.zeros(())
    if callable(scale):
        return torch.stack([scale(p).square().sum() for p in counted]).sum()
    return scale * torch.stack([p.square().sum() for p in counted]).sum()


@dataclass(frozen=True)
class L2WeightDecay(Penalty):
    """:func:`l2_weight_decay` as a module's ``regularizer``. It leaves out priors, which are buffers in this package.

    Args:
        scale: Factor of the sum of squares.

    Example:
        >>> network = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(network.weight)
        >>> L2WeightDecay(0.5)(network, None).item()
        1.0
    """

    sums_members: ClassVar[bool] = True
    scale: float = 1.0

    def __call__(self, network: nn.Module, x: Any) -> Tensor:
        """The penalty of the network; ``x`` is not used."""
        return l2_weight_decay(network, self.scale)

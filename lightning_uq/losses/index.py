"""Losses over indices: one value per index z, from outputs [Z, B, ...] and the targets of a batch.

A mean over the batch always divides by the number of samples B, even if samples have weights: a sample of weight two counts
like two equal samples, and the other samples keep their weight.

Source: ``enn.losses`` of google-deepmind/enn (Osband et al., arXiv 2107.08924).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_floating, check_integer, check_shape, check_target


class IndexLoss(ABC):
    """A loss over all indices: a module passes it the outputs [Z, B, ...] at once. Other losses get one index's outputs [B, ...].

    A module checks only the attribute, so a loss need not inherit from this class: see :func:`takes_indices`.

    Attributes:
        over_indices: True.
    """

    over_indices: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar from outputs [Z, B, ...] and targets [B, ...]."""


def takes_indices(loss: object) -> bool:
    """Whether ``loss(output, target)`` takes the outputs [Z, B, ...] of all indices at once and returns one scalar.

    Such a loss has an attribute ``over_indices = True``. All others take one index's outputs [B, ...].

    Example:
        >>> takes_indices(nn.CrossEntropyLoss())
        False
    """
    return bool(getattr(loss, "over_indices", False))


def l2_loss(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean_b w_b (f_z(x_b) - y_b)^2 for each index [Z]; there is no factor 1/2.

    Args:
        output: Outputs [Z, B, ...].
        target: Targets [B, ...], or [Z, B, ...] if every index has its own.
        weights: Weights of the samples, [B] or [Z, B].

    Raises:
        InputError: The shapes do not match. Nothing is broadcast, because [B] against [B, 1] would pair every sample with
            every other.

    Example:
        >>> l2_loss(torch.zeros(2, 3, 1), torch.ones(3, 1), torch.tensor([0.0, 1.0, 5.0]))
        tensor([2., 2.])
    """
    check_floating("output", output, 2, "[Z, B, ...]")
    check_shape("target", target, output.shape[1:], output.shape)
    return weighted_mean((upcast(output) - upcast(target)).square(), weights)


def cross_entropy_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean_b w_b (-log softmax(f_z(x_b))_{y_b}) for each index [Z], in nats.

    Args:
        logits: Logits [Z, B, C, ...].
        target: Class indices [B, ...].
        weights: Weights of the samples, [B] or [Z, B].

    Raises:
        InputError: The shapes do not match, or the targets are not integers.

    Example:
        >>> cross_entropy_loss(torch.zeros(2, 3, 2), torch.tensor([0, 1, 1]))
        tensor([0.6931, 0.6931])
    """
    check_floating("logits", logits, 3, "[Z, B, C, ...]")
    check_target(target, logits.shape[1:2] + logits.shape[3:])
    return weighted_mean(each_cross_entropy(logits, target), weights)


def each_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of each sample under each index, [Z, B, ...], from logits [Z, B, C, ...] and class indices [B, ...]."""
    together = upcast(logits).flatten(0, 1)
    each = F.cross_entropy(together, target.long().expand(len(logits), *target.shape).flatten(0, 1), reduction="none")
    return each.reshape(*logits.shape[:2], *each.shape[1:])


def accuracy_error(logits: Tensor, target: Tensor) -> Tensor:
    """1 - accuracy of each index [Z], unweighted and without a gradient.

    Args:
        logits: Logits [Z, B, C, ...].
        target: Class indices [B, ...].

    Raises:
        InputError: The shapes do not match, or the targets are not integers.

    Example:
        >>> accuracy_error(torch.eye(2).expand(3, 2, 2), torch.tensor([0, 0]))
        tensor([0.5000, 0.5000, 0.5000])
    """
    check_floating("logits", logits, 3, "[Z, B, C, ...]")
    check_target(target, logits.shape[1:2] + logits.shape[3:])
    return weighted_mean((logits.argmax(2) != target).to(upcast(logits).dtype))


def weighted_mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the batch [Z] of losses [Z, B, ...], each times its sample's weight; NaN for an empty batch.

    Args:
        losses: Losses [Z, B, ...]; further axes (pixels, target dimensions) are averaged.
        weights: [B] or [Z, B], or None for 1.

    Raises:
        InputError: The weights have another shape.

    Example:
        >>> weighted_mean(torch.ones(2, 4), torch.tensor([2.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    if weights is None:
        return losses.flatten(1).mean(1)
    each = losses.flatten(2).mean(2) if losses.ndim > 2 else losses
    check_shape("weights", weights, each.shape[1:], each.shape)
    return (each * weights.to(each)).mean(1)


def average_over_indices(
    loss: Callable[[Tensor, Tensor], Tensor],
    network: nn.Module,
    x: Any,
    target: Tensor,
    num_samples: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean of a loss over newly drawn indices.

    A module's training step uses all indices of a finite set instead.

    Args:
        loss: ``loss(output [Z, B, ...], target)``, which returns [Z] or a scalar.
        network: An :class:`~lightning_uq.networks.base.EpistemicNetwork`.
        x: Inputs [B, ...].
        target: Targets of the inputs.
        num_samples: Number of draws Z; for an ensemble too, indices are drawn with replacement.
        generator: Source of the random numbers.

    Returns:
        A scalar. The network runs once for all Z, so buffers that it updates (BatchNorm's) are updated once.

    Example:
        >>> from lightning_uq.networks import DeterministicNetwork
        >>> network = DeterministicNetwork(nn.Linear(2, 3))
        >>> average_over_indices(cross_entropy_loss, network, torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]), 5).shape
        torch.Size([])
    """
    check_integer("num_samples", num_samples, 1)
    index = network.sample_index(num_samples, generator)  # type: ignore[operator]  # any module with this method works
    return loss(network(x, place_index(index, x)), target).mean()


def place_index(index: Tensor, x: Any) -> Tensor:
    """Place an index where a network reads it: vectors on the inputs' device; member numbers stay, because Python reads them."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    return index.to(leaves[0].device) if leaves and index.is_floating_point() else index

"""Regression as classification over atoms: 2-hot targets, the cross-entropy, and the layout of the outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.atoms import check_atoms, two_hot
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.reduction import Reduction, reduce


def categorical_regression_loss(
    logits: Tensor,
    target: Tensor,
    atoms: Tensor,
    prior: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of a distribution over atoms against the 2-hot encoding of ``target - prior``.

    The prediction is the mean over the atoms plus the prior, so the atoms learn the difference between target and prior.

    Args:
        logits: Logits [B, D, A], or [Z, B, D, A] over an index.
        target: Targets [B, D], or [Z, B, D] if every index has its own. The target minus the prior is clipped to the atoms' range.
        atoms: Ascending atoms [A].
        prior: Additive prior of the logits' shape without A; it gets no gradient.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"`` for the logits' shape without A.

    Raises:
        InputError: The shapes do not match, or ``reduction`` is unknown.

    Source: ``Cat2HotRegression`` of google-deepmind/enn, which has D = 1.

    Example:
        >>> atoms = torch.tensor([-1.0, 0.0, 1.0])
        >>> categorical_regression_loss(torch.zeros(5, 1, 3), torch.zeros(5, 1), atoms)
        tensor(1.0986)
    """
    if logits.ndim not in (3, 4) or logits.shape[-1] != len(atoms):
        raise InputError(
            f"`logits` must be [B, D, {len(atoms)}] or [Z, B, D, {len(atoms)}], but its shape is {list(logits.shape)}."
        )
    check_shape("target", target, logits.shape[-3:-1], logits.shape[:-1])
    if prior is not None:
        check_shape("prior", prior, logits.shape[:-1])
    log_probs = torch.log_softmax(upcast(logits), -1)
    target = upcast(target)
    left = target if prior is None else target - prior.detach()
    loss = -(two_hot(left, atoms) * log_probs).sum(-1)
    return reduce(loss, reduction)


def join_atoms(logits: Tensor, prior: Tensor) -> Tensor:
    """Join logits [..., D, A] and the prior [..., D] to one output [..., D A + D], in that order.

    Example:
        >>> join_atoms(torch.zeros(5, 2, 9), torch.zeros(5, 2)).shape
        torch.Size([5, 20])
    """
    return torch.cat([logits.flatten(-2), prior], -1)


def split_atoms(output: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Split an output [..., D A + D] into logits [..., D, A] and prior [..., D]: the inverse of :func:`join_atoms`.

    Raises:
        InputError: The last axis is not a multiple of A + 1.

    Example:
        >>> logits, prior = split_atoms(torch.zeros(5, 20), 9)
        >>> logits.shape, prior.shape
        (torch.Size([5, 2, 9]), torch.Size([5, 2]))
    """
    size = output.shape[-1] if output.ndim else 0
    if not size or size % (num_atoms + 1):
        raise InputError(
            f"`output` must have shape [..., D x {num_atoms} + D], logits over {num_atoms} atoms and then the "
            f"prior, but its shape is {list(output.shape)}."
        )
    dims = size // (num_atoms + 1)
    logits, prior = torch.split(output, [dims * num_atoms, dims], -1)
    return logits.reshape(*output.shape[:-1], dims, num_atoms), prior


class Cat2HotRegression(nn.Module):
    """:func:`categorical_regression_loss` with its atoms.

    Args:
        atoms: Ascending atoms [A], at least two.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        InputError: The atoms do not ascend.

    Example:
        >>> loss = Cat2HotRegression([-1.0, 0.0, 1.0])
        >>> loss(torch.zeros(5, 1, 3), torch.zeros(5, 1), prior=torch.ones(5, 1))
        tensor(1.0986)
    """

    atoms: Tensor

    def __init__(self, atoms: Tensor | Sequence[float], reduction: Reduction = "mean") -> None:
        super().__init__()
        self.register_buffer("atoms", check_atoms(atoms))
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor, prior: Tensor | None = None) -> Tensor:
        """The loss of logits [B, D, A] or [Z, B, D, A] and targets [B, D]."""
        return categorical_regression_loss(logits, target, self.atoms, prior, self.reduction)

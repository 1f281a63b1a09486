"""Distributions over atoms: their moments, and the 2-hot encoding of a number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast, upcast_together


def check_atoms(atoms: Tensor | Sequence[float]) -> Tensor:
    """The atoms as a float tensor [A]; raises an :class:`InputError` if they are invalid.

    Example:
        >>> check_atoms([0.0, 1.0])
        tensor([0., 1.])
    """
    values = upcast(torch.as_tensor(atoms))
    if values.ndim != 1 or len(values) < 2 or not bool(values.isfinite().all() and (values.diff() > 0).all()):
        raise InputError(
            f"`atoms` must be at least two finite numbers [A], each above the one before, but it is {values.tolist()}."
        )
    return values


def two_hot(target: Tensor, atoms: Tensor) -> Tensor:
    """The distribution [..., A] on the two atoms next to ``target`` [...] that has it as its mean.

    A target outside the atoms' range is clipped to it. NaN stays NaN.

    Args:
        target: Targets of any shape.
        atoms: Ascending atoms [A], at least two.

    Source: Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model", Nature 2020, appendix
    F; ``transform_to_2hot`` of google-deepmind/enn.

    Example:
        >>> two_hot(torch.tensor([0.25, 5.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    target, atoms = upcast_together(target, atoms.to(target.device))
    target = target.clamp(atoms[0], atoms[-1]).contiguous()
    upper = torch.searchsorted(atoms, target).clamp(1, len(atoms) - 1)
    low, high = atoms[upper - 1], atoms[upper]
    share = ((high - target) / (high - low)).unsqueeze(-1)  # probability of the lower atom
    hot = target.new_zeros(*target.shape, len(atoms))
    hot.scatter_(-1, (upper - 1).unsqueeze(-1), share)
    return hot.scatter_(-1, upper.unsqueeze(-1), 1 - share)


def atom_moments(logits: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, each [...], of the distribution softmax(``logits`` [..., A]) over ``atoms`` [A].

    The variance is computed about the mean, so it is never negative. Half precision is upcast to float32 first.

    Example:
        >>> atom_moments(torch.zeros(2), torch.tensor([-1.0, 1.0]))
        (tensor(0.), tensor(1.))
    """
    probs = torch.softmax(upcast(logits), -1)
    atoms = atoms.to(probs)
    mean = (probs * atoms).sum(-1)
    return mean, (probs * (atoms - mean.unsqueeze(-1)).square()).sum(-1)

"""Acquisition by what a label tells about the predictions that are wanted."""

from typing import Any

import torch
from torch import Tensor

from lightning_uq.active_learning.selection import select
from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer


def epig(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Expected predictive information gain, E_{x*} I(y; y* | x, x*) in nats: what the label of an input tells about those of target inputs.

    With the joint prediction p(y, y*) = mean_z p_z(y) p_z(y*), it is the mean over targets of sum p(y, y*) log p(y, y*) / (p(y) p(y*)).
    The mutual information with the index, BALD, also counts what changes no prediction that is wanted.

    Args:
        log_probs: Log-probabilities of the members [P, Z, C].
        targets: Those of the target inputs [T, Z, C].

    Returns:
        [P], in float64.

    Raises:
        InputError: The shapes do not fit together, or there is no target.

    Source: Bickford Smith et al., "Prediction-Oriented Bayesian Active Learning", AISTATS 2023.

    Example:
        >>> doubtful, sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> epig(torch.stack([doubtful, sure]).log(), doubtful[None].log()).round(decimals=4)
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    if log_probs.ndim != 3 or targets.shape[1:] != log_probs.shape[1:] or not len(targets):
        raise InputError(
            f"`log_probs` must be [P, Z, C] and `targets` [T, Z, C], but they are {list(log_probs.shape)} and {list(targets.shape)}."
        )
    probs, wanted = log_probs.double().exp(), targets.double().exp()
    size = max(1, 2**21 // (wanted.shape[0] * wanted.shape[2] ** 2))
    # I = H[y] + H[y*] - H[y, y*]
    of_target = _entropy(wanted.mean(1)).mean()
    parts = []
    for part in torch.split(probs, size):
        joint = torch.einsum("bzc,tzd->btcd", part, wanted) / wanted.shape[1]
        parts.append(_entropy(part.mean(1)) + of_target - _entropy(joint.flatten(2)).mean(1))
    return torch.cat(parts).clamp_min(0.0)


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(probs, probs).sum(-1)
    return entropy


class EPIG(Strategy):
    """The inputs whose labels tell most about the labels of target inputs: :func:`epig`.

    Cost: predictions of the pool and of the targets, and Z T C^2 products per input of the pool.

    Args:
        targets: A map-style data set of inputs like those that will be predicted, labels not needed. None: the pool itself.
        num_targets: Number of targets drawn in each round, T.

    Raises:
        InputError: ``num_targets`` is below 1.
    """

    def __init__(self, targets: Any = None, num_targets: int = 100) -> None:
        check_integer("num_targets", num_targets, 1)
        self.reference, self.num_targets = targets, num_targets

    def rows(self, batch: PoolBatch) -> Rows:
        """Log-probabilities of the members [B, Z, C]."""
        return (batch.log_probs,)

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """The highest gains."""
        wanted = (pool if reference is None else reference)[0]
        drawn = torch.randperm(len(wanted), generator=generator)[: self.num_targets]
        return select(epig(pool[0], wanted[drawn]), num)

"""Acquisition by the mutual information of a whole batch of labels with the hypothesis."""

import torch
from torch import Tensor

from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer


def batch_bald(
    log_probs: Tensor, num: int, num_samples: int = 10_000, generator: torch.Generator | None = None
) -> Tensor:
    """Positions [num], each the input that adds most to I(y_1, ..., y_num; z), the mutual information of their labels with the index.

    I = H[mean_z prod_i p_z(y_i)] - sum_i mean_z H[p_z(y_i)] in nats. Unlike the sum of single mutual informations, it counts what
    several inputs tell in common only once. The sum over all C^k combinations of k labels is exact up to ``num_samples`` of them; beyond,
    it is estimated from so many that are drawn from the predictive distribution, by importance sampling.

    Args:
        log_probs: Log-probabilities of the members [P, Z, C].
        num: Number of positions.
        num_samples: Largest number of combinations of labels of the inputs chosen so far.
        generator: Source of the draws; None: torch's global generator.

    Raises:
        InputError: There are fewer inputs, or an argument is out of range.

    Source: Kirsch et al., "BatchBALD", NeurIPS 2019.

    Example:
        >>> sure, doubtful = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> other = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
        >>> batch_bald(torch.stack([sure, doubtful, other]).log(), 2)
        tensor([1, 2])
    """
    check_integer("num", num, 1)
    check_integer("num_samples", num_samples, 1)
    if log_probs.ndim != 3 or len(log_probs) < num:
        raise InputError(
            f"`log_probs` must be [P, Z, C] with P of at least {num}, but its shape is {list(log_probs.shape)}."
        )
    probs = log_probs.double().exp()
    num_members = probs.shape[1]
    conditional = -torch.special.xlogy(probs, probs).sum(2).mean(1)  # mean_z H[p_z], [P]
    joint = torch.ones(1, num_members, dtype=torch.float64)  # p_z of each combination of labels of the chosen, [K, Z]
    proposal = torch.ones(
        1, dtype=torch.float64
    )  # K q, where q is the probability with which a combination is drawn; exact: 1
    chosen: list[int] = []
    while True:
        gain = _joint_entropy(joint, proposal, probs) - conditional
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        if len(chosen) == num:
            return torch.tensor(chosen)
        joint, proposal = _extended(joint, proposal, probs[chosen[-1]], num_samples, generator)


def _joint_entropy(joint: Tensor, proposal: Tensor, probs: Tensor) -> Tensor:
    """H of the chosen labels and one more, of each input [P].

    A sum over combinations; of a sample, each is divided by the K q with which it was drawn.
    """
    parts = []
    size = max(1, 2**22 // (len(joint) * probs.shape[2]))
    for part in torch.split(probs, size):
        # [B, K, C]: mean over z of the chosen labels' probability times that of one more.
        mixed = torch.einsum("kz,bzc->bkc", joint, part) / joint.shape[1]
        parts.append(-(torch.special.xlogy(mixed, mixed).sum(2) / proposal).sum(1))
    return torch.cat(parts)


def _extended(
    joint: Tensor, proposal: Tensor, probs: Tensor, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The combinations with the labels of one more input, whose probabilities are [Z, C]."""
    extended = (joint[:, None] * probs.T).flatten(0, 1)  # [K C, Z]
    weight = proposal.repeat_interleave(probs.shape[1])
    if len(extended) <= num_samples:
        return extended, weight
    likely = extended.mean(1) / weight
    drawn = torch.multinomial(likely, num_samples, replacement=True, generator=generator)
    return extended[drawn], weight[drawn] * num_samples * likely[drawn] / likely.sum()


class BatchBALD(Strategy):
    """The batch whose labels together tell most about the hypothesis: :func:`batch_bald`.

    Cost: Z K C products for each input of the pool and each that is acquired, where K is the number of combinations of labels of those
    acquired before, C^k up to ``num_samples``. It is meant for small batches.

    Args:
        num_samples: Largest number of combinations; beyond, they are a sample.
    """

    def __init__(self, num_samples: int = 10_000) -> None:
        check_integer("num_samples", num_samples, 1)
        self.num_samples = num_samples

    def rows(self, batch: PoolBatch) -> Rows:
        """Log-probabilities of the members [B, Z, C]."""
        return (batch.log_probs,)

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """A greedy search."""
        return batch_bald(pool[0], num, self.num_samples, generator)

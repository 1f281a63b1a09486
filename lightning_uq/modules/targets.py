"""The training targets of a batch, and the loss of each index against them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.losses.index import IndexLoss, takes_indices
from lightning_uq.tasks import Progress, Task, sums_and_counts

# LightningCLI builds `nn.Module` and `IndexLoss` from a class path. It would read a bare callable as a factory of its result.
Loss = Callable[[Tensor, Tensor], Tensor] | IndexLoss | nn.Module


class Targets(NamedTuple):
    """Targets and weights for the training loss of outputs [Z, B, ...].

    Attributes:
        values: Targets [B, ...], or [Z, B, ...] if every index has its own.
        of_each_index: Whether every index has its own targets.
        weights: The samples' own weights [B]. They also normalise the loss: sum w l / sum w.
        noise_weights: Weights [Z, B] or [B] of ``data_noise``. They have expectation 1 and do not normalise the loss: mean w l.
    """

    values: Tensor
    of_each_index: bool = False
    weights: Tensor | None = None
    noise_weights: Tensor | None = None

    def times(self, noise_weights: Tensor) -> "Targets":
        """The same targets, with their noise weights multiplied by these."""
        mine = self.noise_weights
        return self._replace(noise_weights=noise_weights if mine is None else noise_weights * mine)


def losses_and_count(
    output: Tensor, targets: Targets, task: Task, loss: Loss | None, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each index [Z] and the count that one index's loss was divided by.

    The loss of an index is the batch's total loss divided by its total count, and 0 if nothing counts. A loss over all
    indices has no separate value per index, so its value is repeated Z times.

    Args:
        output: Outputs [Z, B, ...].
        targets: Their targets and weights.
        task: Supplies the samples' losses unless ``loss`` is given.
        loss: The user's own loss: ``loss(output[B, ...], target)``, or one over all indices.
        progress: The progress of the training; None outside a training.

    Raises:
        InputError: The samples have weights, but ``loss`` does not return one value per sample.
    """
    y, of_each, weights, noise_weights = targets
    weighted = weights is not None or noise_weights is not None
    num, rows = output.shape[:2]
    if loss is not None and takes_indices(loss):
        if weighted:
            raise InputError(
                f"`loss` is computed over all indices together ({loss!r}), so the samples' weights cannot be applied. Remove the "
                "weights, or pass a loss of a single index."
            )
        joint: Tensor = loss(output, y if of_each else task.aligned(y, output[0]))
        return joint.expand(num), _number(rows, output)
    each = y if of_each else y.expand(num, *y.shape)
    if loss is None:
        sums, counts = task.sample_losses(output.flatten(0, 1), each.flatten(0, 1), progress)
    else:
        losses = torch.stack([loss(one, task.aligned(target, one)) for one, target in zip(output, each, strict=True)])
        per_sample = losses.shape[:2] == output.shape[:2]
        if not weighted and not per_sample:
            return losses.flatten(1).mean(1) if losses.ndim > 1 else losses, _number(rows, output)
        if not per_sample:
            raise InputError(
                f"`loss` returned shape {list(losses.shape[1:])}, but samples with weights need one loss each: [{rows}]. For "
                "a torch loss, pass reduction='none'."
            )
        sums, counts = sums_and_counts(losses.flatten(0, 1))
    sums, counts = sums.reshape(num, rows), counts.reshape(num, rows)
    if noise_weights is not None:
        sums = sums * noise_weights.to(sums)
    if weights is not None:
        sums, counts = sums * weights.to(sums), counts * weights.to(counts)
    total, count = sums.sum(1), counts.sum(1)
    # Samples that do not count add nothing, even if their sum is not 0 (label smoothing gives one where all weights are 0).
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0 * total), count[0]


def _number(value: int, like: Tensor) -> Tensor:
    return torch.tensor(float(value), device=like.device)  # float32: half precision cannot count beyond 2,048

"""The acquisition loop: train on the labelled data, score the unlabelled data, label the highest scores, repeat."""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_uq.active_learning import scores
from lightning_uq.batches import unpack_batch
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer
from lightning_uq.lightning_trees import is_instance


@dataclass(frozen=True)
class Round:
    """One round of an acquisition.

    Attributes:
        labelled: Positions in the data set of the training samples, in the order in which they were labelled.
        module: The trained module.
        pool: The other positions [P], ascending.
        scores: Scores [P] of the pool.
        acquired: Positions that are labelled next, the highest score first; they follow ``labelled`` in the next round.
    """

    labelled: Tensor
    module: LightningModule
    pool: Tensor
    scores: Tensor
    acquired: Tensor


def acquisition_rounds(
    train: Callable[[Subset[Any]], LightningModule],
    dataset: Dataset[Any],
    labelled: Sequence[int] | Tensor,
    num: int,
    score: str = "mutual_information",
    *,
    batch_size: int = 256,
    **options: Any,
) -> Iterator[Round]:
    """Rounds of training and acquisition, until nothing is left to label.

    Each round trains a new module from its initial weights, so it does not depend on earlier trainings. To limit the number of
    rounds, use ``itertools.islice(acquisition_rounds(...), 5)``.

    Args:
        train: Builds a module and trains it on the given part of the data, with a Trainer of your own.
        dataset: Map-style data of ``(x, y)`` or of mappings. Only ``"nll"`` and ``"joint_nll"`` read labels that are not acquired
            yet.
        labelled: Positions that are labelled at the start.
        num: Number of samples labelled after each round; the last round takes the rest.
        score: A key of :data:`~lightning_uq.active_learning.ACQUISITION_SCORES`.
        batch_size: Number of inputs scored at a time, by the module's ``predict_step``.
        options: Options of the score; see :func:`~lightning_uq.active_learning.score`.

    Yields:
        One :class:`Round` after another; the pool of the last is empty.

    Raises:
        InputError: A position is unknown or repeated, there is none, or the score or its arguments are invalid.

    Example:
        >>> from lightning_uq import EnsembleModule
        >>> data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 20).unsqueeze(1), torch.arange(20) // 10)
        >>> def train(part):
        ...     return EnsembleModule(lambda: torch.nn.Linear(1, 2), num_members=3, seed=0)  # and trainer.fit(...)
        >>> [len(done.labelled) for done in acquisition_rounds(train, data, labelled=[0, 19], num=8)]
        [2, 10, 18, 20]
    """
    check_integer("num", num, 1)
    check_integer("batch_size", batch_size, 1)
    if not hasattr(dataset, "__len__"):
        raise InputError(f"`dataset` must have a length, but it is a {type(dataset).__name__}.")
    size = len(cast(Sized, dataset))
    start = torch.as_tensor(labelled)
    if start.ndim != 1 or not len(start) or start.is_floating_point() or start.dtype == torch.bool:
        raise InputError(f"`labelled` must hold integer positions, at least one, but it is {labelled!r}.")
    if not 0 <= int(start.min()) <= int(start.max()) < size or len(set(start.tolist())) < len(start):
        raise InputError(f"`labelled` must hold distinct positions in [0, {size}), but it holds other values.")
    scores.check_score(score, options)
    return _rounds(train, dataset, start.long().cpu(), num, size, score, batch_size, options)


def _rounds(
    train: Callable[[Subset[Any]], LightningModule],
    dataset: Dataset[Any],
    labelled: Tensor,
    num: int,
    size: int,
    score: str,
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[Round]:
    while True:
        module = train(Subset(dataset, labelled.tolist()))
        if not is_instance(module, LightningModule):
            raise InputError(f"`train` must return a LightningModule, but it returned a {type(module).__name__}.")
        unlabelled = torch.ones(size, dtype=torch.bool)
        unlabelled[labelled] = False
        pool = unlabelled.nonzero().flatten()
        if not len(pool):
            yield Round(labelled, module, pool, torch.empty(0), pool)
            return
        found = _scores(module, DataLoader(Subset(dataset, pool.tolist()), batch_size), score, options)
        acquired = pool[scores.select(found, min(num, len(pool)))]
        yield Round(labelled, module, pool, found, acquired)
        labelled = torch.cat([labelled, acquired])


@torch.no_grad()
def _scores(module: LightningModule, loader: DataLoader[Any], score: str, options: dict[str, Any]) -> Tensor:
    """The score of every input, on the CPU."""
    module.eval()
    unpack = getattr(module, "unpack_batch", unpack_batch)
    parts = []
    for i, batch in enumerate(loader):
        batch = move_data_to_device(batch, module.device)
        labels = unpack(batch)[1] if score in scores.LABELLED else None
        parts.append(scores.score(score, module.predict_step(batch, i), labels, **options).cpu())
    return torch.cat(parts)

"""What a batch holds, and which of its rows count."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_uq.data.indexed import IndexedSample
from lightning_uq.errors import InputError


def unpack_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Input and target of a batch: ``(x, y)`` or longer, a bare ``x``, or a mapping with ``input`` (and ``target``).

    Raises:
        InputError: A mapping without ``input``, or an empty sequence.

    Example:
        >>> unpack_batch({"input": torch.zeros(2, 3)})[1] is None
        True
    """
    if isinstance(batch, Mapping):
        if "input" not in batch:
            raise InputError(
                f"A mapping batch must hold `input` (and `target`), but its keys are {sorted(map(str, batch))}. Override "
                "`unpack_batch`, or pass `unpack_batch=` to a callback."
            )
        return batch["input"], batch.get("target")
    if isinstance(batch, list | tuple):
        if not batch:
            raise InputError("A batch must hold an input, but it is an empty sequence.")
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def sample_index(batch: Any) -> Tensor | None:
    """The rows' positions in the data set, where the batch carries them: a key ``index``, or from ``data.Indexed``."""
    index = batch.get("index") if isinstance(batch, Mapping) else getattr(batch, "index", None)
    known = isinstance(batch, Mapping | IndexedSample)
    return index if known and isinstance(index, Tensor) and not index.is_floating_point() else None


def sample_weights(batch: Any) -> Tensor | None:
    """The samples' weights in the training loss [B], where a mapping carries them under ``weight``.

    Raises:
        InputError: A weight is negative, not finite, or there is not one per sample.

    Example:
        >>> sample_weights({"input": torch.zeros(2, 3), "weight": torch.tensor([1.0, 0.5])})
        tensor([1.0000, 0.5000])
    """
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.dtype == torch.bool:
        got = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"`weight` of a batch must be numbers [B], one per sample, but it is {got}.")
    usable = weight.isfinite() & (weight >= 0)
    if not bool(usable.all()):
        raise InputError(
            f"`weight` of a batch must be finite and at least 0, but it holds {weight[~usable][0].item():g}."
        )
    return weight


def known_sample_index(batch: Any, argument: str) -> Tensor:
    """The samples' positions; raises an error that names ``argument`` if the batch has none.

    Raises:
        InputError: The batch has no positions.
    """
    index = sample_index(batch)
    if index is None:
        raise InputError(
            f"{argument} needs the samples' positions, but the training batches have none. Wrap the training set as "
            "`lightning_uq.data.Indexed(dataset)`, or give the batch a key `index`."
        )
    return index


def batch_size(x: Any) -> int:
    """Number of rows of an input: of a tensor, or of the first tensor in a nest of them."""
    leaves = torch.utils._pytree.tree_leaves(dict(x) if isinstance(x, Mapping) else x)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError(f"The input must hold a tensor with a batch axis, but it is a {type(x).__name__}.")


def check_not_empty(trainer: Trainer, stage: str) -> None:
    """Raise an error for an empty loader at the end of a stage (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``).

    Lightning itself ends such a stage without a message. On several ranks, iterable data sets are not checked, because a rank
    may have no rows.

    Raises:
        InputError: No loader of the stage gave a batch.
    """
    loop: Any
    argument, limit, numbers, loop = {
        "fit": ("train_dataloaders", trainer.limit_train_batches, [trainer.num_training_batches], trainer.fit_loop),
        "validate": ("dataloaders", trainer.limit_val_batches, trainer.num_val_batches, trainer.validate_loop),
        "test": ("dataloaders", trainer.limit_test_batches, trainer.num_test_batches, trainer.test_loop),
        "predict": ("dataloaders", trainer.limit_predict_batches, trainer.num_predict_batches, trainer.predict_loop),
    }[stage]
    if stage == "fit":  # an epoch may never have begun, where none was asked for
        read = loop.epoch_loop.batch_progress.total.ready or not loop.epoch_progress.total.ready
    else:
        read = loop.batch_progress.current.ready
    if limit != 0 and (not any(numbers) or (trainer.world_size == 1 and not read)):
        raise InputError(f"`{argument}` must hold samples, but it is empty.")


def distributed_rows(loader: Any, batch_idx: int, size: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Positions [size] of a batch's rows in the data set, and the mask of those that are not padding.

    Lightning's evaluation sampler repeats rows until every rank has as many: 5 samples on 2 ranks are counted as 6. Row j
    of rank r stands at r + j R in the data set, so it is a repeat where that reaches the set's length. The sampler itself
    is left alone, so that ranks keep equal numbers of batches and a user's own collectives still match.

    Returns:
        ``(position, keep)``, or ``(None, None)`` for a loader without a distributed sampler.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None, None
    per_batch = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if per_batch is None:
        raise InputError(
            "The loader has no batch size, so padded rows cannot be recognised. Use a DataLoader with `batch_size`."
        )
    position = sampler.rank + (batch_idx * per_batch + torch.arange(size)) * sampler.num_replicas
    return position, position < len(sampler.dataset)  # type: ignore[arg-type]


def unpadded_rows(loader: Any, batch_idx: int, size: int) -> Tensor | None:
    """Mask [size] of the rows that are not a distributed sampler's padding; None where all of them count."""
    _, keep = distributed_rows(loader, batch_idx, size)
    return None if keep is None or bool(keep.all()) else keep

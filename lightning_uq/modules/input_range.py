"""The range of the training inputs, the unit of adversarial steps."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.running.evaluation import to_device
from lightning_uq.running.loaders import training_loader
from lightning_uq.running.streams import RandomStream


def training_range(module: LightningModule, unpack_batch: Any) -> Tensor:
    """Largest minus smallest value of every input dimension over the training data, [D], or [C, 1, 1] for images [C, H, W].

    Each rank reads its share of the data set once, in order, and all ranks get the same result. The batch hooks run in the
    validating stage, so they do not augment. Augmentation inside a data set cannot be switched off from outside.

    Args:
        module: A module whose Trainer has set up its training loader.
        unpack_batch: Returns (input, target) of a batch.

    Raises:
        InputError: There are several training loaders, or the inputs are not finite floating-point tensors.
    """
    trainer = module.trainer
    stage = trainer.state.stage
    bounds = None
    with RandomStream(0).active(module.device), torch.no_grad():
        try:
            trainer.state.stage = RunningStage.VALIDATING
            for batch in _every_row(training_loader(trainer), trainer.global_rank, trainer.world_size):
                low, high = _extremes(unpack_batch(to_device(batch, module, trainer))[0])
                stacked = torch.stack([-low, high])
                bounds = stacked if bounds is None else torch.maximum(bounds, stacked)
        finally:
            trainer.state.stage = stage
    if bounds is None:
        raise InputError("The range of the inputs cannot be measured: the training loader is empty.")
    bounds = torch.as_tensor(trainer.strategy.reduce(bounds, reduce_op="max"))
    return bounds.sum(0)


def _every_row(loader: Any, rank: int, world: int) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"The range of the inputs must be measured over one training DataLoader, but it is a {type(loader).__name__}. Pass "
            '`adversarial_scale="absolute"`, with `adversarial_epsilon` in units of the input.'
        )
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    dataset: Any = loader.dataset
    whole = (SequentialSampler, RandomSampler, DistributedSampler)
    rows = list(range(len(dataset))) if isinstance(loader.sampler, whole) else sorted(set(loader.sampler))
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=rows[rank::world] or rows[:1],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


def _extremes(x: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"The input of adversarial training must be a floating-point tensor, but it is {found}.")
    x = upcast(x)
    # Pixels of a channel share one range; entries of a vector or a sequence do not.
    dims = (0, *range(2, x.ndim)) if x.ndim >= 4 else (0,)
    low, high = x.amin(dims, keepdim=True)[0], x.amax(dims, keepdim=True)[0]
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise InputError("The training inputs must be finite, but they hold NaN or infinity.")
    return low, high

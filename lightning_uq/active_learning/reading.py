"""Reading what a strategy needs of every input, on all processes."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uq.active_learning.strategies.base import PoolBatch, Strategy
from lightning_uq.errors import InputError
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.ranks import gather_objects, gather_rows, raising_on_all_ranks


def pool_rows(module: LightningModule, loader: Any, strategy: Strategy, trainer: Trainer | None) -> tuple[Tensor, ...]:
    """A strategy's rows of all inputs of a loader, in their order, on the CPU. On several processes, a collective.

    Each process reads its share of the inputs.
    """
    features = strategy.make_feature_reader()
    parts: list[tuple[Tensor, ...]] = []
    with raising_on_all_ranks(trainer), evaluating(module, trainer):
        for batch in exact_loader(loader, trainer, name="the pool"):
            read = PoolBatch(module, to_device(batch, module, trainer), features, trainer)
            parts.append(tuple(part.detach().cpu() for part in _rows(strategy, read)))
    own = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    of_ranks = gather_objects([part[:0] for part in own], trainer)
    shared = own or tuple(next(filter(None, of_ranks), ()))  # a process without inputs
    if not shared:
        raise InputError(f"{type(strategy).__name__} has no inputs to read: its `reference` is empty.")
    if trainer is None or trainer.world_size == 1:
        return shared
    device = trainer.strategy.root_device
    return tuple(gather_rows(part.to(device), trainer).cpu() for part in shared)


def _rows(strategy: Strategy, read: PoolBatch) -> tuple[Tensor, ...]:
    found = strategy.rows(read)
    for one in found:
        if bool(one.isnan().any()):
            raise InputError(
                f"{type(strategy).__name__} read NaN from the predictions or features of the pool. Look for NaN in its inputs."
            )
    return found

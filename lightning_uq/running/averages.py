"""The copies of a module in which averaging callbacks store their averages."""

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer

from lightning_uq._lightning import average_model
from lightning_uq.lightning_trees import is_instance


def averaged_copies(trainer: Trainer) -> Iterator[LightningModule]:
    """Each averaging callback's copy of the module.

    The copies are made in the callback's ``setup``, before the module's own. Tensors that the module adds there or later must
    be added to the copies too, since Lightning averages the tensors of both in their order.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
        copy = average_model(callback)
        if is_instance(copy, LightningModule):
            yield copy

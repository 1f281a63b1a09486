"""Strategies that are refused because this package was not tested with them."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_uq.errors import UnsupportedError
from lightning_uq.lightning_trees import is_instance


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse strategies that shard the model, so that no rank holds all of it.

    Args:
        trainer: The Trainer that is about to run.
        name: Name of the caller, for the error.

    Raises:
        UnsupportedError: The strategy is FSDP, DeepSpeed or model parallelism.

    Example:
        >>> check_strategy(Trainer(accelerator="cpu", logger=False), "FitGMM")
    """
    if is_instance(trainer.strategy, FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy):
        raise UnsupportedError(
            f"{name} does not support {type(trainer.strategy).__name__} yet, since it shards the model. Use one device or "
            "`strategy='ddp'` for this stage."
        )

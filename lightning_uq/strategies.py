"""The ways of running that are refused, since nothing here was tested under them."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_uq.errors import UnsupportedError
from lightning_uq.lightning_trees import is_instance


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse strategies under which no rank holds the whole model.

    Args:
        trainer: The Trainer that is about to run.
        name: What asks, for the error.

    Raises:
        UnsupportedError: Under FSDP, DeepSpeed or model parallelism.

    Example:
        >>> check_strategy(Trainer(accelerator="cpu", logger=False), "FitGMM")
    """
    if is_instance(trainer.strategy, FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy):
        raise UnsupportedError(
            f"{name} does not support {type(trainer.strategy).__name__} yet, since it shards the model. Use one device or "
            "`strategy='ddp'` for this stage."
        )

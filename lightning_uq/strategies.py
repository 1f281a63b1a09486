"""Strategies that are refused because this package was not tested with them, or only some of its callbacks were."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_uq.errors import UnsupportedError
from lightning_uq.lightning_trees import is_instance


def check_strategy(trainer: Trainer, name: str, *, runs_sharded: bool = False) -> None:
    """Refuse strategies that shard the model, so that no rank holds all of it.

    Args:
        trainer: The Trainer that is about to run.
        name: Name of the caller, for the error.
        runs_sharded: Whether the caller supports a model sharded by FSDP2, under ``ModelParallelStrategy``.

    Raises:
        UnsupportedError: The strategy is FSDP or DeepSpeed, or model parallelism that the caller does not support. Tensor parallelism is
            never supported.

    Example:
        >>> check_strategy(Trainer(accelerator="cpu", logger=False), "FitGMM")
    """
    if runs_sharded and is_instance(trainer.strategy, ModelParallelStrategy):
        if (size := trainer.strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise UnsupportedError(
                f"{name} does not support tensor parallelism, but this ModelParallelStrategy has `tensor_parallel_size={size}`. To shard "
                "the model over the data-parallel ranks instead, pass `data_parallel_size` and `tensor_parallel_size=1`."
            )
        return
    if is_instance(trainer.strategy, FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy):
        raise UnsupportedError(
            f"{name} does not support {type(trainer.strategy).__name__} yet, since it shards the model. Use one device or "
            "`strategy='ddp'` for this stage. ModelParallelStrategy runs some callbacks on a LightningModule of your own, and "
            "EpinetModule with `freeze_base=True`."
        )

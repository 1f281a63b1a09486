"""A module with a frozen base that FSDP2 shards, while every rank holds the rest."""

from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.sharding import GatheredStage, average_gradients, copy_from_first_rank, shard


class ShardedBase(Callback):
    """Shards the base, averages the gradients of all other parameters, and gathers the base for evaluations.

    In an evaluation, a rank may have one batch less than another, and a forward pass on shards needs all ranks.

    Args:
        module: The module. Its ``configure_model`` shards the base, unless its class overrides that.
        base: Its frozen base.
    """

    def __init__(self, module: LightningModule, base: nn.Module) -> None:
        self.gathered = GatheredStage()
        # Only here, because Lightning warns of weight averaging with every class that overrides `configure_model`.
        if not is_overridden("configure_model", module):
            module.configure_model = partial(_shard, module, base)  # type: ignore[method-assign]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse averages of weights, whose copies would not be sharded."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_instance(callback, WeightAveraging, StochasticWeightAveraging):
                raise UnsupportedError(
                    f"{type(pl_module).__name__} does not support {type(callback).__name__} together with "
                    "ModelParallelStrategy. Leave the callback out, or use `strategy='ddp'`."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the first rank's values of what is not sharded."""
        assert pl_module.device_mesh is not None
        copy_from_first_rank(pl_module, pl_module.device_mesh["data_parallel"])

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients."""
        assert pl_module.device_mesh is not None
        average_gradients(pl_module, pl_module.device_mesh["data_parallel"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the base."""
        self.gathered.start(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the shards."""
        self.gathered.end()

    on_test_end = on_predict_end = on_validation_end


def _shard(module: LightningModule, base: nn.Module) -> None:
    if module.device_mesh is not None:  # an earlier Trainer had a strategy that shards
        module.to(module.trainer.strategy.root_device)
        copy_from_first_rank(module, module.device_mesh["data_parallel"])
        shard(base, module.device_mesh["data_parallel"])

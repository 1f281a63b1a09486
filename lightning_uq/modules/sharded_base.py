"""A module with a frozen base that FSDP2 shards, while every rank holds the rest."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_uq.networks.sharding import GatheredStage, average_gradients


class ShardedBase(Callback):
    """Averages the gradients of the parameters that are not sharded, and gathers the base for evaluations.

    In an evaluation, a rank may have one batch less than another, and a forward pass on shards needs all ranks.
    """

    def __init__(self) -> None:
        self.gathered = GatheredStage()

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

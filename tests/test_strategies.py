"""Strategies that shard the model are refused by name; the others are not."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_uq.errors import UnsupportedError
from lightning_uq.strategies import check_strategy


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(UnsupportedError, match=f"Some does not support {strategy.__name__} yet"):
        check_strategy(trainer, "Some")


class RayDDPStrategy(DDPStrategy):
    """Ray Train's strategy is such a subclass, which takes the device and the ranks from Ray."""

    @property
    def root_device(self):
        return torch.device("cpu")

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.world_size, "rank": self.global_rank}


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, RayDDPStrategy])
def test_others_are_not(strategy):
    check_strategy(SimpleNamespace(strategy=strategy.__new__(strategy)), "Some")


@pytest.mark.parametrize(
    ("size", "refusal"), [(1, None), (2, "Some does not support tensor parallelism, .*`tensor_parallel_size=2`")]
)
def test_a_caller_that_runs_sharded_needs_data_parallel_ranks(size, refusal):
    strategy = ModelParallelStrategy.__new__(ModelParallelStrategy)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: size)}
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(UnsupportedError, match=refusal) if refusal else nullcontext():
        check_strategy(trainer, "Some", runs_sharded=True)
    with pytest.raises(UnsupportedError, match="Some does not support ModelParallelStrategy yet"):
        check_strategy(trainer, "Some")
    trainer.strategy = FSDPStrategy.__new__(FSDPStrategy)
    with pytest.raises(UnsupportedError, match="Some does not support FSDPStrategy yet"):
        check_strategy(trainer, "Some", runs_sharded=True)

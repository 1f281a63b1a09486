"""Strategies that shard the model are refused by name; the others are not."""

from types import SimpleNamespace

import pytest
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


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy])
def test_others_are_not(strategy):
    check_strategy(SimpleNamespace(strategy=strategy.__new__(strategy)), "Some")

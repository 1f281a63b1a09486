"""What is not supported says so, by name, before anything is trained."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_uq.errors import UnsupportedError
from tests.contract.cases import UsersModule


# A strategy that shards wants several accelerators, and DeepSpeed its package: the class alone is looked at.
@pytest.fixture(params=[FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy], ids=lambda strategy: strategy.__name__)
def trainer(request):
    return SimpleNamespace(strategy=request.param.__new__(request.param), callbacks=[])


@pytest.mark.axis("unsupported")
def test_modules(module_case, trainer):
    module = module_case.build()
    module._trainer = trainer
    # What runs with a sharded base refuses tensor parallelism alone: see tests/modules/test_sharded_epinet.py.
    trainer.strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    refusal = "(tensor parallelism|.*Strategy yet, since it shards)"
    with pytest.raises(UnsupportedError, match=f"{type(module).__name__} does not support {refusal}"):
        module.setup("fit")
    assert issubclass(UnsupportedError, NotImplementedError)


@pytest.mark.axis("unsupported")
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_callbacks(callback_case, trainer, stage):
    callback = callback_case.build()
    # Callbacks that run with a sharded model refuse tensor parallelism alone: see tests/callbacks/test_sharded.py.
    trainer.strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    refusal = f"{type(callback).__name__} does not support (tensor parallelism|.*Strategy yet)"
    with pytest.raises(UnsupportedError, match=refusal):
        callback.setup(trainer, UsersModule(), stage)

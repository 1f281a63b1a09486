"""The precisions that only a GPU has, where there is one: `pytest -m gpu`."""

import pytest
import torch

from tests.contract.cases import UsersModule, loader
from tests.contract.running import TEST, TRAIN, VAL, run_all, score_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.axis("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there was no CUDA device"),
    pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"]),
]


def test_modules(make_trainer, module_case, precision):
    # The loss scaler begins at 65,536 and halves until no gradient is infinite in half precision. The epinet's regression loses 6 to 9 of its
    # first 15 steps to it, which are 3 epochs, and at most one of the next 35.
    epochs = 10 if precision == "16-mixed" else 3
    trainer = make_trainer(accelerator="gpu", devices=1, precision=precision, max_epochs=epochs)
    module = module_case.build()
    (untrained,) = trainer.test(module, loader(module_case.task, TEST, 2), verbose=False)
    found = run_all(trainer, module_case, module)
    assert score_of(found["tested"]) < score_of(untrained)
    # Tested on the CPU, the trained weights give these numbers, but for the rounding of a half.
    (on_cpu,) = make_trainer().test(module.cpu(), loader(module_case.task, TEST, 2), verbose=False)
    assert score_of(found["tested"]) == pytest.approx(score_of(on_cpu), rel=1e-4 if precision == "32-true" else 5e-2)


def test_callbacks(make_trainer, callback_case, precision):
    callback, module = callback_case.build(), UsersModule()
    trainer = make_trainer(accelerator="gpu", devices=1, precision=precision, max_epochs=3, callbacks=[callback])
    kind = "classification"
    trainer.fit(module, loader(kind, TRAIN, shuffle=True), loader(kind, VAL, 1))
    (tested,) = trainer.test(module, loader(kind, TEST, 2), verbose=False)
    assert all(torch.isfinite(torch.tensor(value)) for value in tested.values())
    if callback_case.fits:
        tensors = callback.state_dict()["tensors"].values()
        assert all(value.device.type == "cpu" for value in tensors if isinstance(value, torch.Tensor))

"""Every module and callback in every precision of the Trainer."""

import pytest
import torch

from tests.contract.cases import UsersModule, loader
from tests.contract.running import TEST, TRAIN, VAL, assert_finite, assert_sound, run_all, score_of

WEIGHTS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
PRECISIONS = [pytest.param(name, marks=pytest.mark.axis(name)) for name in WEIGHTS]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_modules(make_trainer, module_case, precision):
    trainer = make_trainer(precision=precision, max_epochs=2)
    module = module_case.build()
    (untrained,) = trainer.test(module, loader(module_case.task, TEST, 2), verbose=False)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    found = run_all(trainer, module_case, module)
    # A few parameters are kept in float32 by design: steps of a standard deviation are lost in a bfloat16.
    dtypes = {p.dtype for p in module.parameters()}
    assert WEIGHTS[precision] in dtypes
    assert dtypes <= {WEIGHTS[precision], torch.float32}
    # Every parameter that the optimizer has was moved by it, and to the better, in every precision.
    assert before
    assert not {
        n for n, p in module.named_parameters() if n in before and torch.equal(p.detach(), before[n].to(p.dtype))
    }
    assert score_of(found["tested"]) < score_of(untrained)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_callbacks(make_trainer, callback_case, precision):
    callback = callback_case.build()
    trainer = make_trainer(precision=precision, max_epochs=2, callbacks=[callback])
    module = UsersModule()
    kind = "classification"
    trainer.fit(module, loader(kind, TRAIN, shuffle=True), loader(kind, VAL, 1))
    (validated,) = trainer.validate(module, loader(kind, VAL, 1), verbose=False)
    (tested,) = trainer.test(module, loader(kind, TEST, 2), verbose=False)
    assert_finite(validated)
    assert_finite(tested)
    assert tested["test_loss"] < 1.2
    if callback_case.fits:
        state = callback.state_dict()["tensors"]
        floats = [v for v in state.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        assert floats
        assert all(callback_case.is_sound(v) for v in floats)
        assert all(v.dtype in (torch.float32, torch.float64) for v in floats)  # a half would round what was summed
        callback.attach = True
        predictions = trainer.predict(module, loader(kind, TEST, 2))
        assert_sound(type(predictions[0]).cat(predictions), TEST)

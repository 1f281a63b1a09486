"""What the contract's tests do again and again: run everything, and compare."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uq.callbacks import FitGMM
from lightning_uq.errors import UnsupportedError
from lightning_uq.predictions import LabelProbabilities, Prediction
from lightning_uq.running.features import inner_networks
from tests.contract.cases import CLASSES, ModuleCase, loader

TRAIN, VAL, TEST = 40, 61, 27  # rows


def run_all(trainer: Trainer, case: ModuleCase, module: LightningModule | None = None) -> dict[str, Any]:
    """Fit, validate, test and predict; the metrics of the last two, and the prediction of the test rows."""
    module = case.build() if module is None else module
    trainer.fit(module, loader(case.task, TRAIN, shuffle=True), loader(case.task, VAL, 1))
    (validated,) = trainer.validate(module, loader(case.task, VAL, 1), verbose=False)
    (tested,) = trainer.test(module, loader(case.task, TEST, 2), verbose=False)
    predictions = trainer.predict(module, loader(case.task, TEST, 2))
    assert_finite({**validated, **tested})
    prediction = type(predictions[0]).cat(predictions)
    assert_sound(prediction, TEST)
    return {"validated": validated, "tested": tested, "prediction": prediction, "module": module}


def assert_finite(metrics: dict[str, float]) -> None:
    """There are metrics, and all are finite."""
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values()), metrics


def assert_sound(prediction: Prediction, num: int) -> None:
    """One of ours, with so many rows, finite, its probabilities summing to one."""
    assert isinstance(prediction, Prediction)
    assert len(prediction) == num
    if isinstance(prediction, LabelProbabilities):
        assert prediction.probs.shape == (num, CLASSES)
    elif hasattr(prediction, "probs"):
        assert prediction.probs.shape[0] == num
        assert prediction.probs.shape[1] in (2, CLASSES)
        tolerance = 2e-2 if prediction.probs.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            prediction.probs.sum(1), torch.ones_like(prediction.probs[:, 0]), atol=tolerance, rtol=0
        )
    else:
        assert bool((prediction.variance > 0).all())
    for value in prediction.to_dict().values():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert bool(torch.isfinite(value).all())


def density(module: LightningModule, **kwargs: Any) -> list[FitGMM]:
    """A density, where the network has features: one whose weights are made has none that belong to it."""
    try:
        inner_networks(module)
    except UnsupportedError:
        return []
    return [FitGMM(**kwargs)]


def nll_of(metrics: dict[str, float]) -> float:
    """The negative log-likelihood of our own metrics; an ensemble of Lightning modules logs it below its name."""
    return metrics.get("test_nll", metrics.get("ensemble/test_nll", math.nan))


def assert_equal_states(found: Any, expected: Any) -> None:
    """Two nested states of plain data hold the same, tensors bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal_states(found[name], expected[name])
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected

"""One logit per input: every shape and dtype of outputs and targets, in every module."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    FitGMM,
    HypermodelModule,
    OODDetection,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.errors import InputError
from lightning_uq.tasks import Binary, OutputShapeError

FAST = partial(torch.optim.Adam, lr=0.05)
X = torch.randn(90, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, 0] + 0.5 * X[:, 1] > 0.3


def loader(y, **kwargs):
    return DataLoader(TensorDataset(X, y), batch_size=16, **kwargs)


def column():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def flat():
    return nn.Sequential(*column(), nn.Flatten(0))


TARGETS = [
    Y,
    Y.long(),
    Y.double(),
    Y.to(torch.uint8),
    Y.unsqueeze(1),
    Y.double().unsqueeze(1),
]


@pytest.mark.parametrize("outputs", [torch.randn(3, 5), torch.randn(3, 5, 1)])
def test_probabilities_are_sigmoids(outputs):
    prediction = Binary().predict(outputs)
    torch.testing.assert_close(prediction.probs[:, 1], torch.sigmoid(outputs.reshape(3, 5)).mean(0))
    torch.testing.assert_close(prediction.confidence, prediction.probs.amax(1))


@pytest.mark.parametrize("target", TARGETS, ids=lambda y: f"{y.dtype}{list(y.shape)}")
@pytest.mark.parametrize("output", [torch.randn(90), torch.randn(90, 1)], ids=lambda output: str(list(output.shape)))
def test_the_loss_is_torch_s_in_any_shape_and_dtype(output, target):
    sums, counts = Binary(pos_weight=2.0).sample_losses(output, target)
    expected = F.binary_cross_entropy_with_logits(output.reshape(90), Y.float(), pos_weight=torch.tensor(2.0))
    torch.testing.assert_close(sums.sum() / counts.sum(), expected)


@pytest.mark.parametrize("network", [column, flat])
@pytest.mark.parametrize("target", TARGETS, ids=lambda y: f"{y.dtype}{list(y.shape)}")
def test_every_shape_trains_and_tests_to_the_same_numbers(make_trainer, network, target):
    torch.manual_seed(0)
    module = DeterministicModule(network(), task="binary", optimizer=FAST).double()
    data = loader(target)
    trainer = make_trainer(max_epochs=2, precision="64-true")
    trainer.fit(module, data, data)
    (found,) = trainer.test(module, data, verbose=False)
    torch.manual_seed(0)
    reference = DeterministicModule(column(), task="binary", optimizer=FAST).double()
    other = make_trainer(max_epochs=2, precision="64-true")
    other.fit(reference, loader(Y.long()), loader(Y.long()))
    (expected,) = other.test(reference, loader(Y.long()), verbose=False)
    assert found == pytest.approx(expected, abs=1e-9)
    p = reference.predict(X).probs[:, 1]
    assert expected["test_nll"] == pytest.approx(F.binary_cross_entropy(p, Y.double()).item())
    assert expected["test_accuracy"] == pytest.approx(((p > 0.5) == Y).double().mean().item())


@pytest.mark.parametrize(
    "build",
    [
        lambda: EnsembleModule(column, num_members=3, execution="loop", task="binary", optimizer=FAST),
        lambda: EnsembleModule(column, num_members=3, execution="stacked", task="binary", optimizer=FAST),
        lambda: EnsembleModule(flat, num_members=3, execution="vmap", task="binary", optimizer=FAST),
        lambda: EnsembleModule(flat, num_members=3, execution="loop", task="binary", optimizer=FAST),
        lambda: DropoutModule(column, task="binary", optimizer=FAST, num_eval_samples=4),
        lambda: EpinetModule(column, task="binary", optimizer=FAST, num_eval_samples=4),
        lambda: HypermodelModule(column, task="binary", optimizer=FAST, index_dim=3, num_eval_samples=4),
        lambda: BayesByBackpropModule(column, task="binary", optimizer=FAST, num_train=90, num_eval_samples=4),
    ],
)
def test_every_module_takes_it_with_every_tool(make_trainer, build):
    module, data = build(), loader(Y)
    scaling, far = TemperatureScaling(), {"far": loader(Y)}
    trainer = make_trainer(max_epochs=2, callbacks=[scaling, OODDetection(far)], precision="64-true")
    trainer.fit(module, data, data)
    (logged,) = trainer.test(module, data, verbose=False)
    assert all(math.isfinite(value) for value in logged.values())
    (first, *_) = trainer.predict(module, data)
    raw = module.eval()(X[:16]).reshape(-1, 16)
    pooled = torch.logit(torch.sigmoid(raw).mean(0))
    torch.testing.assert_close(first.probs[:, 1], torch.sigmoid(pooled / scaling.temperature), rtol=1e-6, atol=1e-6)


def test_densities_and_class_scalings_see_two_classes(make_trainer):
    module, gmm, scaling = DeterministicModule(column(), task="binary", optimizer=FAST), FitGMM(), VectorScaling()
    trainer = make_trainer(callbacks=[gmm, scaling], precision="64-true")
    trainer.fit(module, loader(Y.double()), loader(Y.double()))
    prediction = module.predict(X)
    assert prediction.log_density.shape == (90,)
    assert prediction.class_scaling.shape == (2, 2)
    assert len(gmm.densities[0].mean) == 2


@pytest.mark.parametrize(
    ("outputs", "target", "error", "message"),
    [
        (
            torch.zeros(1, 4, 2),
            Y[:4],
            OutputShapeError,
            r"one logit per input, \[B\] or \[B, 1\].*shape \[4, 2\].*Classification",
        ),
        (torch.zeros(1, 4), Y[:3], InputError, r"must have shape \[4\] or \[4, 1\]"),
        (torch.zeros(1, 4), torch.tensor([0, 1, 2, 0]), InputError, r"go from 0 to 2. For more than two classes pass"),
        (torch.zeros(1, 4), torch.tensor([0, 1, -1.0, 0]), InputError, r"go from -1 to 1"),
        (torch.zeros(1, 4), torch.tensor([0, 1, math.nan, 0]), InputError, "they hold NaN"),
    ],
)
def test_what_does_not_fit_is_named(outputs, target, error, message):
    def check():
        Binary().check_output(outputs)
        Binary().check_target(target, outputs)

    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "hinge"}, "`loss` must be one of"),
        ({"pos_weight": -1}, "`pos_weight` must be positive"),
        ({"pos_weight": [1.0, 2.0]}, "`pos_weight` must be one number"),
        ({"label_smoothing": 2}, "`label_smoothing` must lie in"),
        ({"focal_gamma": -1}, "`focal_gamma` must be at least 0"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        Binary(**fields)

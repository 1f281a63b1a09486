"""Methods that share a training do not see each other's callbacks, and each is charged with its own time."""

import functools
import time

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import ConformalIntervals, DeterministicModule, FitGMM, FitLaplace, TemperatureScaling
from lightning_uq.compare.training.isolation import IsolatedCallbacks
from lightning_uq.errors import InputError
from lightning_uq.tasks import Regression


@pytest.fixture
def numbers():
    x = torch.linspace(-2, 2, 60).unsqueeze(1)
    return DataLoader(TensorDataset(x, x.sin()), batch_size=20)


@pytest.fixture
def classes():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=20)


def regressor():
    torch.manual_seed(0)
    return DeterministicModule(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)), task=Regression())


def test_a_conformal_row_is_not_fitted_to_the_predictions_of_a_laplace_row(make_trainer, numbers):
    alone, together = ConformalIntervals(alpha=0.2), ConformalIntervals(alpha=0.2)
    make_trainer(max_epochs=2, callbacks=[alone]).fit(regressor(), numbers, numbers)
    others = [
        IsolatedCallbacks([FitLaplace()]),
        IsolatedCallbacks([together]),
        IsolatedCallbacks([FitLaplace(name="two")]),
    ]
    module = regressor()
    make_trainer(max_epochs=2, callbacks=others).fit(module, numbers, numbers)
    x = torch.tensor([[0.5], [9.0]])
    expected, found = (one.predict(module, x).conformal_upper for one in (alone, together))
    torch.testing.assert_close(found, expected)


def test_without_isolation_their_order_is_an_error(make_trainer, numbers):
    with pytest.raises(InputError, match="Swap them"):
        make_trainer(max_epochs=1, callbacks=[ConformalIntervals(), FitLaplace()]).fit(regressor(), numbers, numbers)


def test_two_densities_need_no_names(make_trainer, classes):
    callbacks = [IsolatedCallbacks([FitGMM()]), IsolatedCallbacks([FitGMM(covariance="tied")])]
    module = DeterministicModule(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, classes, classes)
    first, second = (one.callbacks[0].log_density(torch.ones(1, 8)) for one in callbacks)
    assert not torch.equal(first, second)


def test_predictions_are_plain_again_afterwards(make_trainer, classes):
    module = DeterministicModule(nn.Linear(4, 2), optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    make_trainer(max_epochs=5, callbacks=[IsolatedCallbacks([TemperatureScaling()])]).fit(module, classes, classes)
    assert len(module.prediction_transforms) == 0


def test_time_is_that_of_the_methods_own_callbacks(make_trainer, classes):
    class Slow(Callback):
        def on_train_end(self, trainer, pl_module):
            time.sleep(0.2)

    slow, quick = IsolatedCallbacks([Slow()]), IsolatedCallbacks([])
    make_trainer(max_epochs=1, callbacks=[slow, quick]).fit(DeterministicModule(nn.Linear(4, 2)), classes, classes)
    assert slow.seconds >= 0.2
    assert quick.seconds < 0.1


def test_an_error_in_a_callback_leaves_the_trainers_list(make_trainer, classes):
    class Broken(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("broken")

    callbacks = [IsolatedCallbacks([Broken()]), IsolatedCallbacks([])]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(DeterministicModule(nn.Linear(4, 2)), classes, classes)
    assert [one for one in trainer.callbacks if isinstance(one, IsolatedCallbacks)] == callbacks

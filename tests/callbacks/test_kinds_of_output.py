"""Probabilities as the outputs of tasks that need raw outputs."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    ConformalIntervals,
    EnsembleModule,
    FitGMM,
    FitKNN,
    OODAlarm,
    OODDetection,
    Regression,
    TemperatureScaling,
)
from lightning_uq.errors import InputError

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + torch.randn(200, generator=torch.Generator().manual_seed(1)) > 0).float()


class Sigmoid(LightningModule):
    """A user's classifier that returns P(y = 1) [B]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def rows(start, stop):
    return DataLoader(TensorDataset(X[start:stop], Y[start:stop]), batch_size=50)


CALLBACKS = {
    "TemperatureScaling": TemperatureScaling,
    "OODAlarm": OODAlarm,
    "FitGMM": lambda **kwargs: FitGMM(feature_layer="net.1", **kwargs),
    "OODDetection": lambda **kwargs: OODDetection({"far": rows(0, 50)}, **kwargs),
}


@pytest.mark.parametrize("output", ["probs", "log_probs"])
@pytest.mark.parametrize("task", ["binary", "multilabel", "regression"])
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_an_argument_that_takes_logarithms_is_refused(make, task, output):
    """Their logarithms would be read as logits, or as means."""
    with pytest.raises(InputError, match=f"needs the network's raw outputs, but argument `output` is '{output}'"):
        make(task=task, output=output)


def test_intervals_too():
    with pytest.raises(InputError, match="Regression.*needs the network's raw outputs.*a function that picks them"):
        ConformalIntervals(alpha=0.1, task="regression", output="probs")


def test_the_remedy_is_right(make_trainer):
    with pytest.raises(InputError, match=r"Pass 'logits', or `torch.logit`, which undoes a sigmoid"):
        TemperatureScaling(task="binary", output="probs")
    torch.manual_seed(0)
    temperature = TemperatureScaling(task="binary", output=torch.logit)
    module, trainer = Sigmoid(), make_trainer(max_epochs=3, callbacks=[temperature])
    trainer.fit(module, rows(0, 100), rows(100, 200))
    logit = torch.logit(module(X[100:]).detach().double())
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64).exp()
    losses = [float(nn.functional.binary_cross_entropy_with_logits(logit / t, Y[100:].double())) for t in grid[::50]]
    best = grid[::50][torch.tensor(losses).argmin()]
    assert float(temperature.temperature) == pytest.approx(float(best), rel=0.01)


def test_an_inferred_task_too(make_trainer):
    """Their logarithms are not within [0, 1], so the task would be inferred."""
    callback = TemperatureScaling(output="log_probs")
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    with pytest.raises(InputError, match="needs the network's raw outputs"):
        trainer.fit(LogSigmoid(), rows(0, 100), rows(100, 200))
    assert trainer.global_step == 0


class LogSigmoid(Sigmoid):
    def forward(self, x):
        return super().forward(x).log()

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy(self(batch[0]).exp(), batch[1])


class Squeezed(Sigmoid):
    """One logit per input, [B]."""

    def __init__(self):
        super().__init__()
        self.net = self.net[:-1]

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())


@pytest.mark.parametrize("make", [lambda: FitKNN(k=3, attach=True), lambda: FitGMM(attach=True)], ids=["knn", "gmm"])
def test_attached_densities_read_the_outputs_before_the_training(make_trainer, make):
    """With integer labels they found nothing wrong, and `trainer.predict` failed."""
    loader = DataLoader(TensorDataset(X, Y.long()), batch_size=50)
    trainer = make_trainer(max_epochs=1, callbacks=[make()])
    with pytest.raises(InputError, match=r"Pass `task=Binary\(\)` for one logit per input"):
        trainer.fit(Squeezed(), loader, loader)
    assert trainer.global_step == 0


class MeanAndVariance(Sigmoid):
    """A mean and a variance [B, 1] of a number."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        mean, log_variance = self.net(x).chunk(2, 1)
        return mean, log_variance.exp()

    def training_step(self, batch, batch_idx):
        mean, variance = self(batch[0])
        return nn.functional.gaussian_nll_loss(mean, batch[1][:, None], variance)


def test_ensembles_of_sigmoids_and_variances_predict_what_their_members_say(make_trainer):
    ensemble = EnsembleModule(Sigmoid, num_members=2, output=torch.logit, task="binary")
    make_trainer(max_epochs=1).fit(ensemble, rows(0, 100))
    probs = ensemble.eval()(X[:9]).reshape(2, 9).sigmoid()
    torch.testing.assert_close(ensemble.predict(X[:9]).probs[:, 1], probs.mean(0))

    ensemble = EnsembleModule(
        MeanAndVariance,
        num_members=2,
        output=lambda out: torch.cat([out[0], out[1].log()], 1),
        task=Regression(head="mean_log_variance"),
    )
    make_trainer(max_epochs=1).fit(ensemble, rows(0, 100))
    mean, log_variance = ensemble.eval()(X[:9]).chunk(2, 2)
    prediction = ensemble.predict(X[:9])
    torch.testing.assert_close(prediction.mean, mean.mean(0))
    torch.testing.assert_close(prediction.variance, log_variance.exp().mean(0) + mean.var(0, correction=0))

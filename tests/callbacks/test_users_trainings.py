"""Streams, accumulated gradients, manual optimization and compiled forwards: the training is the user's own, and the fits are those of the definition."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_uq import CategoricalPrediction, FitGMM, TemperatureScaling

X = torch.randn(240, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3] + torch.randn(240, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
RIDGE = 0.1


class Users(LightningModule):
    """With dropout and noise, so that a random number drawn elsewhere would change the weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x + 0.01 * torch.randn_like(x)) if self.training else self(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Manual(Users):
    """Two optimizers, stepped by hand, with accumulated gradients."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            for optimizer in (body, head):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.Adam(self.body.parameters(), lr=0.05), torch.optim.SGD(self.head.parameters(), lr=0.3)


class CompiledForward(Users):
    def __init__(self):
        super().__init__()
        self.forward = torch.compile(self.forward, backend="aot_eager")


class CompiledParts(Users):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body, backend="aot_eager")


def compiled_in_place():
    module = Users()
    module.compile(backend="aot_eager")
    return module


class Stream(IterableDataset):
    """Rows without a length, in a random order if they are for a training."""

    def __init__(self, rows, is_shuffled=False):
        self.rows, self.is_shuffled = rows, is_shuffled

    def __iter__(self):
        x, y = X[self.rows], Y[self.rows]
        order = torch.randperm(len(x)) if self.is_shuffled else torch.arange(len(x))
        return iter(zip(x[order], y[order], strict=True))


TRAIN, VAL = slice(0, 120), slice(120, 240)


def kept():
    train = DataLoader(TensorDataset(X[TRAIN], Y[TRAIN]), batch_size=16, shuffle=True)
    return train, DataLoader(TensorDataset(X[VAL], Y[VAL]), batch_size=50)


def streamed():
    train = DataLoader(Stream(TRAIN, is_shuffled=True), batch_size=16)
    return train, DataLoader(Stream(VAL), batch_size=50)


CASES = {
    "a stream": (Users, streamed, {}),
    "a stream up to a limit of steps": (Users, streamed, {"max_epochs": -1, "max_steps": 20, "val_check_interval": 4}),
    "accumulation": (Users, kept, {"accumulate_grad_batches": 3}),
    "accumulation of a stream": (Users, streamed, {"accumulate_grad_batches": 3}),
    "manual optimization": (Manual, kept, {}),
    "manual optimization of a stream": (Manual, streamed, {}),
    "a compiled forward": (CompiledForward, kept, {}),
    "a module compiled in place": (compiled_in_place, kept, {}),
    "a compiled part": (CompiledParts, kept, {}),
    "a compiled forward, accumulation of a stream": (CompiledForward, streamed, {"accumulate_grad_batches": 2}),
}


def trained(make_trainer, case, callbacks):
    build, loaders, options = CASES[case]
    seed_everything(3, verbose=False)
    module, trainer = build(), make_trainer(**{"max_epochs": 4, "callbacks": callbacks, **options})
    trainer.fit(module, *loaders())
    return module, trainer


def best_temperature(logits, labels):
    """The minimum of the negative log-likelihood of logits / T, by golden-section search over log T in float64."""
    low, high = torch.tensor(-4.0).double(), torch.tensor(4.0).double()

    def nll(log_temperature):
        return F.cross_entropy(logits.double() / log_temperature.exp(), labels)

    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-8:
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if nll(first) < nll(second) else (first, high)
    return float(low.exp())


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_users_own_and_the_fits_are_those_of_the_definition(make_trainer, case):
    plain, _ = trained(make_trainer, case, [])
    gmm = FitGMM(feature_transform="raw", regularization=RIDGE, attach=True)
    scaling = TemperatureScaling(attach=True)
    module, trainer = trained(make_trainer, case, [gmm, scaling])
    weights, own = module.state_dict(), plain.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)

    network = getattr(module.body, "_orig_mod", module.body).eval()
    with torch.no_grad():
        features = network(X)
        logits = module.head(features)
    assert float(scaling.temperature) == pytest.approx(best_temperature(logits[VAL], Y[VAL]), rel=1e-4)

    rows, labels = features[TRAIN].double(), Y[TRAIN]
    expected = []
    for c in range(3):
        part = rows[labels == c]
        covariance = torch.cov(part.T) + RIDGE * torch.eye(6)
        gaussian = torch.distributions.MultivariateNormal(part.mean(0), covariance)
        expected.append(gaussian.log_prob(features[VAL].double()))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(gmm.log_prob(features[VAL]), expected, rtol=1e-4, atol=1e-4)

    prediction = CategoricalPrediction.cat(trainer.predict(module, DataLoader(X[VAL], batch_size=50)))
    probs = (logits[VAL] / float(scaling.temperature)).softmax(1)
    torch.testing.assert_close(prediction.probs, probs, rtol=1e-4, atol=1e-5)
    density = expected.logsumexp(1) - torch.tensor(3.0).log()
    torch.testing.assert_close(prediction.log_density, density, rtol=1e-4, atol=1e-4)

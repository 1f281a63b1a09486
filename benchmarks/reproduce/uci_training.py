"""The networks of the UCI reproduction: how a method trains those of all splits at once, predicts and is scored."""

import math
from collections.abc import Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch
from recipe import quiet_trainer
from side_by_side import Rows, SideBySide
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_uq import (
    ConformalIntervals,
    DropoutModule,
    EnsembleModule,
    EpinetHead,
    EpinetModule,
    EvidentialRegression,
    EvidentialRegressionModule,
    FitLaplace,
    Prediction,
    Regression,
    StudentTPrediction,
    UncertaintyModule,
)

ALPHA = 0.1
INTERVALS = ("absolute", "normalized", "cqr")
Scale = tuple[list[float], list[float]]


def make_network(inputs: int, hidden: int, outputs: int = 2, dropout: float = 0.0) -> nn.Sequential:
    """One hidden layer; the outputs are a mean and a raw variance by default."""
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)]
    return nn.Sequential(*[layer for layer in layers if dropout or not isinstance(layer, nn.Dropout)])


def network_for(method: str, inputs: int, hidden: int) -> nn.Sequential:
    """A network as the method needs it."""
    return make_network(inputs, hidden, 4 if method == "evidential" else 2, 0.05 if method == "dropout" else 0.0)


def task_for(method: str, scale: Scale) -> Regression | EvidentialRegression:
    """The task of a method. ``scale`` holds means and standard deviations of the training targets."""
    return EvidentialRegression(target_scale=scale) if method == "evidential" else Regression(target_scale=scale)


def train(
    method: str, rows: Rows, rates: Sequence[float], *, hidden: int, epochs: int, num_members: int = 1
) -> list[list[Any]]:
    """Train the networks of all splits at once; epinets one after the other, since the head's products are as large as a stack's.

    Args:
        method: "ensemble+AT", "ensemble", "dropout", "evidential" or "epinet".
        rows: Training rows of P splits.
        rates: The learning rate of each.
        hidden: Hidden units.
        epochs: Epochs.
        num_members: Members of each ensemble.

    Returns:
        The members of each split, in eval mode, for inputs that are standardised by its training rows.
    """
    rows = rows.standardized(rows)
    new = partial(network_for, method, rows.x.shape[2], hidden)
    if method == "epinet":
        return [[train_epinet(new(), rows.take([i]), rate, epochs)] for i, rate in enumerate(rates)]
    order = sorted(range(len(rates)), key=rates.__getitem__)
    rows, rates = rows.take(order), [rates[i] for i in order]

    def factory() -> SideBySide:
        return SideBySide([new() for _ in rates], rates)

    training: dict[str, Any] = {"task": task_for(method, rows.scales()), "optimizer": factory().optimizer}
    module: UncertaintyModule
    if method == "dropout":
        module = DropoutModule(factory(), mask="per_example", **training)
    elif method == "evidential":
        module = EvidentialRegressionModule(factory(), **training)
    else:
        module = EnsembleModule(
            factory,
            num_members=num_members,
            adversarial_epsilon=0.01 if method == "ensemble+AT" else None,  # in units of each input's range
            execution="vmap" if num_members > 1 else "loop",
            **training,
        )
    fit(module, *rows, epochs)
    ensemble = isinstance(module, EnsembleModule)
    trained = [module.network.member(i) for i in range(num_members)] if ensemble else module.modules()
    members = [part.unstacked(new) for part in trained if isinstance(part, SideBySide)]
    by_split = dict(zip(order, map(list, zip(*members, strict=True)), strict=True))
    return [by_split[i] for i in range(len(rates))]


def train_epinet(network: nn.Sequential, rows: Rows, rate: float, epochs: int) -> EpinetModule:
    """One epinet on the standardised rows of one split, with the scale that `compare` has for numbers.

    The gradient's norm is cut at 1: without it, a rate of 0.03 left one of boston's trainings with an RMSE of 12.7 on its own training rows.
    """
    module = EpinetModule(
        network,
        feature_layers="2",
        head=EpinetHead(prior_scale=0.1),
        task=task_for("epinet", rows.scales()),
        optimizer=partial(torch.optim.Adam, lr=rate),
    )
    fit(module, rows.x[:, 0], rows.y, epochs, gradient_clip_val=1.0)
    return module.eval()


def fit(module: UncertaintyModule, x: Tensor, y: Tensor, epochs: int, **options: Any) -> None:
    """Train on batches of 100 rows in random order, with options of the Trainer."""
    data = TensorDataset(x.float(), y.float())
    batches = BatchSampler(RandomSampler(data), batch_size=100, drop_last=False)
    trainer = quiet_trainer(accelerator="cpu", max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(data, batch_size=None, sampler=batches))


@torch.no_grad()
def predict(method: str, members: Sequence[Any], scale: Scale, x: Tensor) -> Prediction:
    """The prediction of a split's members, in the target's units."""
    task = task_for(method, scale)
    if method == "epinet":
        return members[0].predict(x)
    if method == "dropout":
        return DropoutModule(members[0], mask="per_example", task=task).predict(x)
    return task.predict(torch.stack([member(x) for member in members]))


def score(prediction: Prediction, y: Tensor) -> dict[str, float]:
    """RMSE and NLL in the target's units.

    The paper's NLL is that of one Gaussian with the mixture's mean and variance; that of an evidential network is its Student-t's.
    """
    error = (y.double() - prediction.mean.double()).square()
    variance = prediction.variance.double()
    nll = 0.5 * (math.log(2 * math.pi) + variance.log() + error / variance)
    if isinstance(prediction, StudentTPrediction):
        nll = -prediction.log_prob(y).double()
    return {"rmse": float(error.mean().sqrt()), "nll": float(nll.mean())}


def averaged(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each value."""
    return {key: mean(one[key] for one in found) for key in found[0]}


def score_members(
    members: Sequence[nn.Sequential], scale: Scale, rows: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, dict[str, float]]:
    """Means over the members of an ensemble: of each alone, and of each with a FitLaplace on the training rows."""
    x, y = test
    task = task_for("ensemble", scale)
    laplace = [FitLaplace(feature_layer="2", task=task).fit(member, [rows]).predict(member, x) for member in members]
    return {
        "single": averaged([score(predict("ensemble", [member], scale, x), y) for member in members]),
        "laplace": averaged([score(prediction, y) for prediction in laplace]),
    }


def score_intervals(
    network: nn.Sequential, scale: Scale, rows: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, dict[str, float]]:
    """Coverage and mean width of a network's 90 % interval and of conformal ones, which are fitted to ``rows``.

    Widths are in standard deviations of the training targets.
    """
    calibration, tested = (predict("ensemble", [network], scale, x) for x, _ in (rows, test))
    found = {"before": tested.interval(1 - ALPHA)}
    for method in INTERVALS:
        conformal = ConformalIntervals(alpha=ALPHA, method=method).fit_predictions(calibration, rows[1])
        found[method] = conformal.intervals(tested)
    y, (spread,) = test[1], scale[1]
    return {
        kind: {
            "coverage": float(((lower <= y) & (y <= upper)).double().mean()),
            "width": float((upper - lower).double().mean()) / spread,
        }
        for kind, (lower, upper) in found.items()
    }

"""One small regression that the pictures of methods share: noise that grows to the right, and a gap without data."""

import logging
import warnings
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from docs.figures import style
from lightning_uq import Prediction
from lightning_uq.networks import MLP

INPUTS = torch.linspace(-5, 5, 201).unsqueeze(1)
OPTIMIZER = partial(torch.optim.Adam, lr=0.01)


def data(num_rows: int = 80) -> tuple[Tensor, Tensor]:
    """Inputs and targets [N, 1]: a sine on [-3.5, -1.5] and [0.5, 2.5], with noise of standard deviation 0.05 to 0.3."""
    generator = torch.Generator().manual_seed(0)
    x = (
        2 * torch.rand(num_rows, 1, generator=generator)
        + torch.where(torch.arange(num_rows) % 2 == 0, -3.5, 0.5)[:, None]
    )
    noise = 0.05 + 0.25 * (x + 3.5) / 6
    return x, (1.5 * x).sin() + noise * torch.randn(num_rows, 1, generator=generator)


def network(num_outputs: int = 2, width: int = 32, **options) -> nn.Module:
    """A perceptron with two hidden layers."""
    return MLP(1, num_outputs, hidden_sizes=(width, width), **options)


def train(module: LightningModule, rows, held_out, *, epochs: int, callbacks=()) -> None:
    """Train a module on two tensors, quietly, with two others for validation."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
    }  # fmt: skip
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers
        trainer.fit(
            module,
            DataLoader(TensorDataset(*rows), batch_size=32),
            DataLoader(TensorDataset(*held_out), batch_size=1024),
        )


def fit(module: LightningModule, *, epochs: int = 200, callbacks=()) -> Prediction:
    """Train a module on the data, and predict on [-5, 5]."""
    x, y = data()
    train(module, (x[:64], y[:64]), (x[64:], y[64:]), epochs=epochs, callbacks=callbacks)
    return module.predict(INPUTS)


def points(axes) -> None:
    """Draw the data."""
    x, y = data()
    axes.scatter(x, y, s=9, color=style.GREY, linewidths=0, zorder=1)
    axes.set(xlim=(-5, 5), ylim=(-3, 3.5), xlabel="x")


def bands(axes, prediction: Prediction, *, label: str = "of the mean alone") -> None:
    """Draw a prediction's mean, its total standard deviation, and the part that is not noise, which ``label`` names."""
    x, mean = INPUTS[:, 0], prediction.mean[:, 0]
    for variance, color, name in (
        (prediction.variance, style.SKY, "± 2 standard deviations"),
        (prediction.epistemic_variance, style.ORANGE, label),
    ):
        std = variance[:, 0].sqrt()
        axes.fill_between(x, mean - 2 * std, mean + 2 * std, color=color, alpha=0.35, linewidth=0, label=name)
    axes.plot(x, mean, color=style.TEXT, label="mean")


def hypotheses(module: LightningModule, *, titles: tuple[str, str], epochs: int = 200):
    """Two panels: eight hypotheses (or all, if fewer) of a module that is trained on the data, and the prediction that all make together."""
    prediction = fit(module, epochs=epochs)
    figure, (left, right) = style.panels(2, sharey=True)
    points(left)
    for member in prediction.member_mean[:8]:
        left.plot(INPUTS[:, 0], member[:, 0], linewidth=1.2)
    left.set_title(titles[0])
    points(right)
    bands(right, prediction)
    right.set_title(titles[1])
    right.legend(loc="upper right", fontsize=8)
    return figure

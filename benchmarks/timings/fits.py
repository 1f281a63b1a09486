"""Fits after the training, as multiples of one pass of the network over the same rows."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Call, Contender, Work
from lightning_uq import ConformalSets, DeterministicModule, FitGMM, TemperatureScaling
from lightning_uq.networks.backbones import LeNet

TITLE = "Fits after the training"
ABOUT = """Whole fits from a loader of 50,000 images of 28x28 pixels in batches of 500, their pass of a LeNet included; `one pass` calls the network on each batch.
Its ratio is below 1: the inverse is the number of passes that a fit costs; the aim is at most 1.1. FitGMM misses it: it sums outer products of the features in float64."""

N, BATCH, ALPHA = 50_000, 500, 0.1


def works(device: str) -> Iterator[Work]:
    """Each fit beside one pass."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = LeNet().to(device).eval()
    x, y = torch.randn(N, 1, 28, 28, generator=generator), torch.randint(10, (N,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    one_pass = Contender("one pass", partial(pass_over, network, loader, device), agrees=False)
    fits: dict[str, Callable[[], Any]] = {
        "TemperatureScaling": TemperatureScaling,
        "ConformalSets": partial(ConformalSets, alpha=ALPHA),
        "FitGMM": partial(FitGMM, feature_layer="fc3", feature_transform="raw"),
    }
    for name, new in fits.items():
        yield Work(
            f"{name}, N = {N:,}", [Contender("lightning-uq", partial(fit, new, network, loader)), one_pass], calls=1
        )


def pass_over(network: nn.Module, loader: DataLoader, device: str) -> Call:
    return torch.no_grad()(lambda: torch.cat([network(x.to(device)) for x, _ in loader]))


def fit(new: Callable[[], Any], network: nn.Module, loader: DataLoader) -> Call:
    module = DeterministicModule(network)

    def call() -> Tensor:
        new().fit(module, loader)
        return torch.zeros(())

    return call

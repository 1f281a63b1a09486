"""Calibrations of logits in memory, beside torch-uncertainty's."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Call, Contender, Work
from lightning_uq import CategoricalPrediction, TemperatureScaling, VectorScaling

TITLE = "Calibration"
ABOUT = """10,000 rows of logits that are too sharp by a factor of 2.5, fitted in memory. Compared are the NLLs on the fitted rows, within 1 % of one another; ours ends at
the optimum, or for the vector, which is chosen by held-out folds, near it."""

N = 10_000


def works(device: str) -> Iterator[Work]:
    """Two numbers of classes."""
    for classes in (10, 100):
        logits, target = rows(classes, device)
        pairs = [
            ("temperature", TemperatureScaling, "TemperatureScaler"),
            ("vector", VectorScaling, "VectorScaler"),
        ]
        for name, mine, theirs in pairs:
            contenders = [
                Contender("lightning-uq", partial(ours, mine, logits, target)),
                Contender(theirs, partial(peer, theirs, classes, logits, target), "torch-uncertainty"),
            ]
            yield Work(f"{name}, C = {classes}", contenders, rtol=1e-2)


def rows(classes: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, classes, generator=generator)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (2.5 * logits).to(device), target.to(device)


def ours(callback: Callable[[], TemperatureScaling | VectorScaling], logits: Tensor, target: Tensor) -> Call:
    def call() -> Tensor:
        fitted = callback().fit_logits(logits, target)
        return (
            fitted.calibrate(CategoricalPrediction(logits.unsqueeze(0)))
            .probs.log()
            .gather(1, target.unsqueeze(1))
            .mean()
            .neg()
        )

    return call


def peer(name: str, classes: int, logits: Tensor, target: Tensor) -> Call:
    from torch_uncertainty import post_processing

    loader = DataLoader(TensorDataset(logits, target), batch_size=N)
    scaler_class = getattr(post_processing, name)

    def call() -> Tensor:
        own = {} if name == "TemperatureScaler" else {"num_classes": classes}
        scaler = scaler_class(model=nn.Identity(), device=logits.device, **own)
        scaler.fit(loader, progress=False)
        return cross_entropy(scaler(logits), target)

    return call

"""Out-of-distribution scores of features and logits beside pytorch-ood."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Call, Contender, Work
from lightning_uq import FitGMM, FitKNN, FitViM
from lightning_uq.functional.scores import energy

TITLE = "Out-of-distribution scores"
ABOUT = """Fits to 10,000 rows of 128 features, around ten class means, in batches of 500, and scores of 1,000 others; the network is the last linear layer alone. Ours
fits and scores in float64, except the energy; pytorch-ood in float32. Its Mahalanobis distances are half the squared ones, of a covariance that is not divided by the number of
rows, and are scaled to ours before the comparison of the scores. Its search of neighbours is scikit-learn's, on one thread here. ViM's score is two products, in float64 with the
double of the time; the rest of ours is the pass that records the features, and the fingerprint of the weights."""

ROWS, TEST, D, CLASSES, K, DIM = 10_000, 1000, 128, 10, 50, 64


def works(device: str) -> Iterator[Work]:
    """The fit and the scores of each detector, and the energy, which needs no fit."""
    torch.manual_seed(0)
    centers = torch.randn(CLASSES, D)
    labels = torch.arange(ROWS) % CLASSES
    scale = torch.where(
        torch.arange(D) < DIM, 1.0, 0.5
    )  # a gap in the spectrum, so that rounding does not choose ViM's subspace
    x = centers[labels] + scale * torch.randn(ROWS, D)
    test = (centers[labels[:TEST]] + 1.5 * torch.randn(TEST, D)).to(device)
    network = nn.Sequential(nn.Identity(), nn.Linear(D, CLASSES)).to(device).eval()
    with torch.no_grad():  # the discriminant of these classes
        network[1].weight.copy_(centers)
        network[1].bias.copy_(-centers.square().sum(1) / 2)
    loader = DataLoader(TensorDataset(x, labels), batch_size=500)
    detectors: dict[str, tuple[Callable[[], Any], Callable[[], Any], float]] = {
        "KNN": (partial(FitKNN, k=K, feature_layer="1"), neighbors, 1.0),
        "ViM": (partial(FitViM, dim=DIM, feature_layer="1"), partial(virtual_logits, network[1]), 1.0),
        "Mahalanobis": (tied, mahalanobis, 2.0 * (ROWS - CLASSES)),
    }
    for name, (new, theirs, scale) in detectors.items():
        fits = [
            Contender("lightning-uq", partial(ours_fit, new, network, loader, test)),
            Contender(name, partial(peer_fit, theirs, loader, test, scale), "pytorch-ood"),
        ]
        yield Work(f"{name}, fit and 10 scores", fits, rtol=1e-4, atol=1e-3, calls=1)
        scores = [
            Contender("lightning-uq", partial(ours_scores, new, network, loader, test)),
            Contender(name, partial(peer_scores, theirs, loader, test, scale), "pytorch-ood"),
        ]
        yield Work(f"{name}, {TEST:,} scores", scores, rtol=1e-4, atol=1e-3)
    logits = network(test).detach()
    energies = [
        Contender("lightning-uq", lambda: lambda: energy(logits.unsqueeze(0))),
        Contender("EnergyBased", partial(peer_energy, logits), "pytorch-ood"),
    ]
    yield Work(f"energy, {TEST:,} scores", energies)


def tied() -> FitGMM:
    """Their covariance, 1e-6 over the number of rows being next to nothing."""
    return FitGMM(
        covariance="tied", score="mahalanobis", feature_transform="raw", regularization=0.0, feature_layer="1"
    )


def ours_fit(new: Callable[[], Any], network: nn.Module, loader: DataLoader, test: Tensor) -> Call:
    return lambda: new().fit(network, loader).score(network, [test[:10]])


def ours_scores(new: Callable[[], Any], network: nn.Module, loader: DataLoader, test: Tensor) -> Call:
    fitted = new().fit(network, loader)
    return lambda: fitted.score(network, [test])


def peer_fit(new: Callable[[], Any], loader: DataLoader, test: Tensor, scale: float) -> Call:
    detector = new().to(test.device)
    return lambda: detector.fit(loader).predict(test[:10]) * scale


def peer_scores(new: Callable[[], Any], loader: DataLoader, test: Tensor, scale: float) -> Call:
    detector = new().to(test.device).fit(loader)
    return lambda: detector.predict(test) * scale


def neighbors() -> Any:
    from pytorch_ood.detector import KNN

    detector = KNN(nn.Identity(), k=K)
    detector.knn.set_params(n_jobs=1)
    return detector


def virtual_logits(layer: nn.Linear) -> Any:
    from pytorch_ood.detector import ViM

    return ViM(nn.Identity(), d=DIM, w=layer.weight, b=layer.bias)


def mahalanobis() -> Any:
    from pytorch_ood.detector import Mahalanobis

    return Mahalanobis(nn.Identity())


def peer_energy(logits: Tensor) -> Call:
    from pytorch_ood.detector import EnergyBased

    detector = EnergyBased(None)
    return lambda: detector.predict_logits(logits)

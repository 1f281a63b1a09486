"""Prediction sets of classes beside TorchCP."""

import sys
from collections.abc import Iterator
from functools import partial
from unittest.mock import Mock

import torch
from torch import Tensor

from benchmarks.harness import Call, Contender, Work
from lightning_uq import CategoricalPrediction, ConformalSets

TITLE = "Conformal prediction sets"
ABOUT = """Split conformal prediction with alpha = 0.1 from logits in memory: the fit takes the threshold from 10,000 rows, the prediction makes the sets of 10,000 others.
Compared are the thresholds, and the sets, one by one. TorchCP imports torchsort for a loss that is not used here; it has to be compiled, so a mock takes its place.
TorchCP scores in float32. Ours scores in float64, as log-odds for LAC, which stay apart where probabilities round to 1: a threshold of tied scores would cover too much."""

ROWS, ALPHA, PENALTY, FREE = 10_000, 0.1, 0.01, 5


def works(device: str) -> Iterator[Work]:
    """The fit and the sets of each method, for two numbers of classes."""
    for classes in (10, 100):
        (logits, target), (others, _) = rows(classes, 0, device), rows(classes, 1, device)
        for method in ("lac", "aps", "raps"):
            fits = [
                Contender("lightning-uq", partial(ours_fit, method, logits, target)),
                Contender("SplitPredictor", partial(peer_fit, method, logits, target), "torchcp"),
            ]
            yield Work(f"{method.upper()}, C = {classes}, fit", fits)
            sets = [
                Contender("lightning-uq", partial(ours_sets, method, logits, target, others)),
                Contender("SplitPredictor", partial(peer_sets, method, logits, target, others), "torchcp"),
            ]
            yield Work(f"{method.upper()}, C = {classes}, sets", sets, rtol=0, atol=0)


def rows(classes: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROWS, classes, generator=generator)
    return logits.to(device), torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1).to(device)


def ours(method: str, logits: Tensor, target: Tensor) -> ConformalSets:
    sets = ConformalSets(alpha=ALPHA, method=method, penalty=PENALTY, k_reg=FREE)
    return sets.fit_predictions(CategoricalPrediction(logits.unsqueeze(0)), target)


def ours_fit(method: str, logits: Tensor, target: Tensor) -> Call:
    def call() -> Tensor:
        threshold = ours(method, logits, target).threshold
        return (
            torch.sigmoid(threshold) if method == "lac" else 1 + threshold
        )  # ours: log((1 - p) / p), and sums of p less 1

    return call


def ours_sets(method: str, logits: Tensor, target: Tensor, others: Tensor) -> Call:
    fitted = ours(method, logits, target)
    return lambda: fitted.sets(CategoricalPrediction(others.unsqueeze(0)))


def peer(method: str, device: torch.device) -> object:
    """TorchCP's predictor with the same scores."""
    sys.modules.setdefault("torchsort", Mock())  # see ABOUT
    from torchcp.classification.predictor import SplitPredictor
    from torchcp.classification.score import APS, LAC, RAPS

    scores = {
        "lac": LAC,
        "aps": partial(APS, randomized=False),
        "raps": partial(RAPS, randomized=False, penalty=PENALTY, kreg=FREE),
    }
    return SplitPredictor(scores[method](), alpha=ALPHA, device=device)


def peer_fit(method: str, logits: Tensor, target: Tensor) -> Call:
    predictor = peer(method, logits.device)

    def call() -> Tensor:
        predictor.calculate_threshold(logits, target)
        return predictor.q_hat

    return call


def peer_sets(method: str, logits: Tensor, target: Tensor, others: Tensor) -> Call:
    predictor = peer(method, logits.device)
    predictor.calculate_threshold(logits, target)
    return lambda: predictor.predict_with_logits(others)

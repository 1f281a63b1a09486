"""How cost and memory grow with members M, indices Z, classes C, features D and rows N: the tables of docs/scaling.md."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Call, Contender, Work, clock_for, measure, quartiles
from lightning_uq import (
    BayesByBackpropModule,
    CategoricalPrediction,
    ConformalIntervals,
    ConformalSets,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    FitGMM,
    FitKNN,
    FitLaplace,
    FitViM,
    HypermodelModule,
    IsotonicScaling,
    MatrixScaling,
    PointPrediction,
    TemperatureScaling,
    UncertaintyModule,
    VectorScaling,
)
from lightning_uq.metrics import OODAUROC, ExpectedCalibrationError, JointLogLoss
from lightning_uq.networks import MLP

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RECORD = Path(__file__).parent / "scaling.json"
B, C, D, N = 1000, 10, 64, 10_000


@dataclass(frozen=True)
class Growth:
    """What is measured at three sizes of one quantity, with all others as on the page."""

    name: str
    axis: str
    sizes: tuple[int, int, int]
    prepare: Callable[[int], Call]


# ------------------------------------------------------------------------------------------------ predictions


def rows(number: int, features: int = D) -> Tensor:
    return torch.randn(number, features, generator=torch.Generator().manual_seed(0))


def labels(number: int, classes: int = C) -> Tensor:
    return torch.randint(classes, (number,), generator=torch.Generator().manual_seed(1))


def predict(build: Callable[[int], UncertaintyModule], size: int) -> Call:
    module, x = build(size), rows(B)
    return lambda: module.predict(x).probs


def ensemble(members: int, classes: int = C, **kwargs: Any) -> EnsembleModule:
    return EnsembleModule(partial(MLP, D, classes), num_members=members, seed=0, **kwargs)


def predictions() -> Iterator[Growth]:
    of_indices: dict[str, Callable[[int], UncertaintyModule]] = {
        "EpinetModule": lambda z: EpinetModule(MLP(D, C), num_eval_samples=z),
        "HypermodelModule": lambda z: HypermodelModule(MLP(D, C), num_eval_samples=z),
        "DropoutModule": lambda z: DropoutModule(MLP(D, C, dropout=0.1), num_eval_samples=z),
        "BayesByBackpropModule": lambda z: BayesByBackpropModule(MLP(D, C), num_eval_samples=z),
    }
    yield Growth("EnsembleModule", "M", (2, 8, 32), partial(predict, ensemble))
    for name, build in of_indices.items():
        yield Growth(name, "Z", (16, 64, 256), partial(predict, build))
    yield Growth("EnsembleModule, M = 8", "C", (10, 100, 1000), partial(predict, partial(ensemble, 8)))
    yield Growth(
        "EpinetModule, Z = 100",
        "C",
        (10, 40, 160),
        partial(predict, lambda c: EpinetModule(MLP(D, c), num_eval_samples=100)),
    )


# ------------------------------------------------------------------------------------------------ training steps


def step(build: Callable[[int], UncertaintyModule], size: int) -> Call:
    """Forward and backward of one batch of 128 rows, without the optimizer."""
    module = build(size).train()
    batch = rows(128), labels(128)

    def call() -> None:
        module.zero_grad()
        module.training_loss(*batch, batch).backward()

    return call


def training() -> Iterator[Growth]:
    of_indices: dict[str, Callable[[int], UncertaintyModule]] = {
        "EpinetModule": lambda z: EpinetModule(MLP(D, C), num_train_samples=z),
        "HypermodelModule": lambda z: HypermodelModule(MLP(D, C), num_train_samples=z),
        "DropoutModule": lambda z: DropoutModule(MLP(D, C, dropout=0.1), num_train_samples=z),
        "BayesByBackpropModule": lambda z: BayesByBackpropModule(MLP(D, C), num_train=N, num_train_samples=z),
    }
    yield Growth("EnsembleModule", "M", (2, 8, 32), partial(step, ensemble))
    for name, build in of_indices.items():
        yield Growth(name, "Z", (2, 8, 32), partial(step, build))


# ------------------------------------------------------------------------------------------------ fits after the training


def calibrate(new: Callable[[], Any], number: int = N, classes: int = C, members: int = 1) -> Call:
    logits = 2 * rows(members * number, classes).view(members, number, classes)
    target = torch.multinomial(
        (logits.mean(0) / 1.5).softmax(-1), 1, generator=torch.Generator().manual_seed(1)
    ).squeeze(1)
    return lambda: new().fit_logits(logits, target)


def conform(number: int, classes: int = C) -> Call:
    prediction, target = CategoricalPrediction(rows(number, classes).unsqueeze(0)), labels(number, classes)
    return lambda: ConformalSets().fit_predictions(prediction, target)


def conform_numbers(number: int) -> Call:
    prediction, target = PointPrediction(rows(number, 1).unsqueeze(0)), rows(number, 1).flip(0)
    return lambda: ConformalIntervals().fit_predictions(prediction, target)


def fit_features(new: Callable[[], Any], number: int = N, features: int = D, classes: int = C) -> Call:
    """Over a network that is one linear layer, whose features are its inputs."""
    network = nn.Sequential(nn.Identity(), nn.Linear(features, classes))
    loader = list(zip(rows(number, features).split(B), (torch.arange(number) % classes).split(B), strict=True))
    return lambda: new(feature_layer="1").fit(network, loader)


def laplace(**kwargs: Any) -> FitLaplace:
    return FitLaplace(select="marginal_likelihood", task="classification", **kwargs)


def score_knn(number: int) -> Call:
    network = nn.Sequential(nn.Identity(), nn.Linear(D, C))
    knn = FitKNN(feature_layer="1").fit(network, [rows(number)])
    x = [rows(B).flip(0)]
    return lambda: knn.score(network, x)


def fits() -> Iterator[Growth]:
    many, fewer = (10_000, 40_000, 160_000), (2_500, 10_000, 40_000)
    yield Growth("TemperatureScaling", "N", many, partial(calibrate, TemperatureScaling))
    yield Growth(
        "TemperatureScaling, `scope='shared'`",
        "M",
        (2, 8, 32),
        lambda m: calibrate(partial(TemperatureScaling, scope="shared"), 2_500, members=m),
    )
    yield Growth("VectorScaling", "N", fewer, partial(calibrate, VectorScaling))
    yield Growth("VectorScaling", "C", (5, 20, 80), lambda c: calibrate(VectorScaling, 2_500, classes=c))
    yield Growth("MatrixScaling", "C", (5, 10, 20), lambda c: calibrate(MatrixScaling, 2_500, classes=c))
    yield Growth("IsotonicScaling", "N", fewer, partial(calibrate, IsotonicScaling))
    yield Growth("ConformalSets", "N", many, conform)
    yield Growth("ConformalSets", "C", (10, 100, 1000), partial(conform, N))
    yield Growth("ConformalIntervals", "N", many, conform_numbers)
    yield Growth("FitGMM", "N", fewer, partial(fit_features, FitGMM))
    yield Growth("FitGMM", "D", (64, 128, 256), lambda d: fit_features(FitGMM, 2_500, features=d))
    yield Growth("FitGMM", "C", (5, 20, 80), lambda c: fit_features(FitGMM, 2_500, classes=c))
    yield Growth("FitViM", "N", fewer, partial(fit_features, FitViM))
    yield Growth("FitViM", "D", (64, 256, 1024), lambda d: fit_features(FitViM, 2_500, features=d))
    yield Growth("FitKNN, its score of 1,000 rows", "N", fewer, score_knn)
    yield Growth("FitLaplace, logits", "N", fewer, partial(fit_features, laplace))
    yield Growth("FitLaplace, logits", "D", (64, 256, 1024), lambda d: fit_features(laplace, 2_500, features=d))
    yield Growth("FitLaplace, logits", "C", (10, 40, 160), lambda c: fit_features(laplace, 2_500, classes=c))


# ------------------------------------------------------------------------------------------------ metrics


def metric(new: Callable[[], Any], batch: Callable[[], tuple[Tensor, ...]], batches: int) -> Call:
    given = batch()

    def call() -> Tensor:
        found = new()
        for _ in range(batches):
            found.update(*given)
        return found.compute()

    return call


def metrics() -> Iterator[Growth]:
    def of_rows(new: Callable[[], Any], batch: Callable[[], tuple[Tensor, ...]], size: int) -> Call:
        return metric(new, batch, size // B)

    many = (10_000, 40_000, 160_000)
    yield Growth(
        "ExpectedCalibrationError",
        "N",
        many,
        partial(of_rows, ExpectedCalibrationError, lambda: (rows(B, C).softmax(-1), labels(B))),
    )
    yield Growth("OODAUROC", "N", many, partial(of_rows, OODAUROC, lambda: (rows(B, 1)[:, 0], labels(B, 2).bool())))
    yield Growth(
        "JointLogLoss, N = 1,000",
        "Z",
        (32, 128, 512),
        lambda z: metric(JointLogLoss, lambda: (CategoricalPrediction(rows(z * B, C).view(z, B, C)), labels(B)), 1),
    )


PARTS: dict[str, Callable[[], Iterator[Growth]]] = {
    "predictions": predictions,
    "training": training,
    "fits": fits,
    "metrics": metrics,
}


# ------------------------------------------------------------------------------------------------ the page


def write_page(repeats: int, where: dict[str, Any]) -> None:
    """Measure all parts, record them, and put their tables between the page's marks."""
    record: dict[str, Any] = {"where": where, "parts": {}}
    for part, growths in PARTS.items():
        record["parts"][part] = []
        for growth in growths():
            record["parts"][part].append(measured(growth, repeats, where["threads"]))
            print(line_of(record["parts"][part][-1]), flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), record))


def measured(growth: Growth, repeats: int, threads: int) -> dict[str, Any]:
    """Median times and peaks at the three sizes, which take turns."""
    sizes = [
        Contender(str(size), partial(growth.prepare, size), agrees=size == growth.sizes[0]) for size in growth.sizes
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small samples and of networks that were not trained
        found = measure(Work(growth.name, sizes), repeats=repeats, clock=clock_for("cpu", threads))
    return {
        "name": growth.name,
        "axis": growth.axis,
        "sizes": growth.sizes,
        "ms": [quartiles(times)[1] for times in found["ms"].values()],
        "mb": list(found["peak_mb"].values()),
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """k of the power law size^k through the last two sizes, where fixed costs count least."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def line_of(found: dict[str, Any]) -> str:
    """A row of a table."""
    sizes = found["sizes"]
    cells = [
        found["name"],
        f"{found['axis']} = {', '.join(f'{size:,}' for size in sizes)}",
        *("; ".join(f"{value:.3g}" for value in found[kind]) for kind in ("ms", "mb")),
        *(f"{found['axis']}^{exponent(sizes, found[kind]):.1f}" for kind in ("ms", "mb")),
    ]
    return f"| {' | '.join(cells)} |"


def table(found: list[dict[str, Any]]) -> str:
    head = ["| | at | time, ms | peak, MB | time grows as | peak grows as |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(line_of, found)])


def with_tables(text: str, record: dict[str, Any]) -> str:
    """The page with all that lies between marks replaced."""
    where = record["where"]
    about = (
        f"Measured on {where['date']} by `python -m benchmarks scaling`: {where['device']}, {where['threads']} thread(s), {where['clock']}, medians of "
        f"{where['repeats']}, load average {where['load']} at the start; torch {where['torch']}."
    )
    for name, content in {"where": about, **{part: table(found) for part, found in record["parts"].items()}}.items():
        begin, end = f"<!-- {name} of benchmarks/scaling.json -->\n", "\n<!-- end -->"
        before, rest = text.split(begin)
        text = before + begin + "\n" + content + "\n" + rest[rest.index(end) :]
    return text

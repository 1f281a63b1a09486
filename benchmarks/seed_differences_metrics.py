"""How often intervals for differences of metrics contain them, where the truth is known: linear regressions on Gaussian inputs.

The target is the sum of five inputs plus noise. Each metric of fitted weights on new rows has a closed form or a one-dimensional integral:

- mse, rmse: errors of the regression;
- ece: calibration of the label "target above 0", whose probability is Phi(scale * prediction). The estimate from N rows is biased upwards. "ece" is its
  expectation for N rows, drawn anew, and "ece, all rows" its limit for many rows;
- auroc: the prediction as a score for rows whose inputs are shifted. These rows are the same for all seeds.

With one test set, seeds differ by the half of the training rows that they are fitted to. Else each seed splits the data anew.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.functional.calibration import uniform_bins
from lightning_uq.functional.half_widths import MIN_SEEDS
from lightning_uq.functional.metric_difference import metric_difference, resample_metric
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.weighted_metrics import weighted_auroc, weighted_ece, weighted_mean, weighted_rmse

DIMS = 5
TRUE_WEIGHTS = torch.full((DIMS,), 0.5, dtype=torch.float64)
SHIFT = torch.full((DIMS,), 0.6, dtype=torch.float64)
METRICS = ("mse", "rmse", "ece", "ece, all rows", "auroc")


class Method(NamedTuple):
    """Least squares with a penalty on the first inputs, and how sharp its probabilities are."""

    ridge: float
    num_inputs: int
    scale: float


CALIBRATION_ALONE = "calibrated and not"
METHODS = {
    "few and all inputs": (Method(0, 3, 1.5), Method(0, DIMS, 1.5)),
    "ridge and least squares": (Method(30, DIMS, 1.5), Method(0, DIMS, 1.5)),
    CALIBRATION_ALONE: (Method(0, DIMS, 1.0), Method(0, DIMS, 1.5)),
}
"""Pairs of methods. The last differs in calibration alone."""


def fit(method: Method, x: Tensor, y: Tensor) -> Tensor:
    """Weights [..., DIMS] for inputs [..., N, DIMS] and targets [..., N]."""
    used = x[..., : method.num_inputs]
    gram = used.mT @ used + method.ridge * torch.eye(method.num_inputs, dtype=torch.float64)
    weights = torch.linalg.solve(gram, used.mT @ y[..., None])[..., 0]
    return torch.nn.functional.pad(weights, (0, DIMS - method.num_inputs))


def truth(metric: str, method: Method, weights: Tensor, num_test: int) -> Tensor:
    """The metric on new rows, [K], of fitted weights [K, DIMS]."""
    mse = (weights - TRUE_WEIGHTS).square().sum(-1) + 1
    if metric in ("mse", "rmse"):
        return mse if metric == "mse" else mse.sqrt()
    norm = weights.norm(dim=-1, keepdim=True)
    if metric == "auroc":
        return torch.special.ndtr(weights @ SHIFT / (math.sqrt(2) * norm[:, 0]))
    slope = weights @ TRUE_WEIGHTS[:, None] / norm  # of the target on the standardized prediction
    slope = slope / (1 + TRUE_WEIGHTS.square().sum() - slope.square()).sqrt()
    if metric == "ece":
        draw, repeats = torch.Generator().manual_seed(0), -(-200 // len(weights))  # the same rows for both methods
        z = torch.randn(repeats, len(weights), num_test, generator=draw, dtype=torch.float64).abs()
        is_right = torch.rand(z.shape, generator=draw) < torch.special.ndtr(slope * z)
        weight, gap = 1 / num_test, is_right.double()
    else:
        z = ((torch.arange(800, dtype=torch.float64) + 0.5) / 100).expand(1, len(weights), 800)
        weight, gap = 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) / 100, torch.special.ndtr(slope * z)
    confidence = torch.special.ndtr(method.scale * norm * z)
    bins = torch.zeros(*z.shape[:2], 15, dtype=torch.float64)
    return bins.scatter_add_(-1, uniform_bins(confidence, 15), weight * (gap - confidence)).abs().sum(-1).mean(0)


def measured(metric: str, method: Method, weights: Tensor, x: Tensor, y: Tensor, shifted: Tensor) -> dict[str, Tensor]:
    """The vectors of a seed's test rows, x [N, DIMS] and y [N], and for an AUROC of the shifted rows [M, DIMS]."""
    prediction = x @ weights
    if metric in ("mse", "rmse"):
        return {"value" if metric == "mse" else "squared_error": (prediction - y).square()}
    if metric.startswith("ece"):
        confidence = torch.special.ndtr(method.scale * prediction.abs())
        return {"confidence": confidence, "correct": (prediction > 0) == (y > 0)}
    is_ood = torch.arange(len(x) + len(shifted)) >= len(x)
    return {"score": torch.cat([prediction, shifted @ weights]), "is_ood": is_ood}


FUNCTIONS = dict(zip(METRICS, (weighted_mean, weighted_rmse, weighted_ece, weighted_ece, weighted_auroc), strict=True))


def metric_coverage(
    metric: str,
    pair: str,
    repetitions: int,
    num_seeds: int,
    num_test: int,
    *,
    resplit: bool,
    resamples: int = 500,
) -> tuple[Tensor, Tensor]:
    """Whether intervals contain the difference, and their half-widths, [T] each.

    Below 5 seeds, the difference is that of these networks on new rows. With one test set, it is the mean over seeds, and with splits, over data sets.
    There are 4 training rows per test row, and half as many shifted rows as test rows.
    """
    num_train, draw = 4 * num_test, torch.Generator().manual_seed(num_seeds)
    num, normal = num_train + num_test, partial(torch.randn, generator=draw, dtype=torch.float64)
    found, widths, own_truths, intervals = [], [], [], []
    for number in range(repetitions):
        x, noise, shifted = normal(num, DIMS), normal(num), SHIFT + normal(num_test // 2, DIMS)
        y = x @ TRUE_WEIGHTS + noise
        if resplit:
            orders = torch.rand(num_seeds, num, generator=draw).argsort(1)
            train, tests = orders[:, num_test:], orders[:, :num_test]
        else:
            train = torch.rand(max(200, num_seeds), num_train, generator=draw).argsort(1)[:, : num_train // 2]
            tests = torch.arange(num_train, num).expand(num_seeds, num_test)
        ids, strata = list(tests), None
        if metric == "auroc":
            ids = [torch.cat([one, torch.arange(len(shifted))]) for one in tests]
            strata = [torch.arange(len(one)) >= num_test for one in ids]
        rows = SeedRows(ids, strata, num_train)
        results, truths = [], []
        for method in METHODS[pair]:
            weights = fit(method, x[train], y[train])
            truths.append(truth(metric, method, weights, num_test))
            vectors = [
                measured(metric, method, w, x[at], y[at], shifted)
                for w, at in zip(weights[:num_seeds], tests, strict=True)
            ]
            results.append(resample_metric(FUNCTIONS[metric], vectors, rows, num_resamples=resamples, seed=number))
        intervals.append(metric_difference(*results))
        difference = truths[0] - truths[1]
        own_truths.append(difference[:num_seeds].mean() if num_seeds < MIN_SEEDS else difference.mean())
    overall = torch.stack(own_truths)
    if resplit and num_seeds >= MIN_SEEDS:
        overall = overall.mean().expand(repetitions)
    for interval, value in zip(intervals, overall.tolist(), strict=True):
        found.append(interval.lower <= value <= interval.upper)
        widths.append((interval.upper - interval.lower) / 2)
    return torch.tensor(found), torch.tensor(widths)

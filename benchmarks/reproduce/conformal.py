"""Coverage and size of conformal sets and intervals over many random halves of the same held-out rows:

    python benchmarks/reproduce/conformal.py --logits DATA/logits --uci DATA/uci --out FOLDER [--resplits 1000] [--budget MINUTES] [--publish]

Classes are those of real classifiers' saved predictions (`saved_predictions.py`). Numbers are predicted by one network per UCI set (a mean
and a variance, one hidden layer of 50 units, 40 epochs), which is trained on 60 % of the rows; the other 40 % are held out. Each resplit fits
to a half of the held-out rows and tests the other half, at alpha = 0.1.

With n fitted rows and continuous scores, the coverage of a resplit has the mean ceil((n + 1)(1 - alpha)) / (n + 1), which the tables give as `exact`,
and the standard deviation of a beta-binomial distribution (Angelopoulos & Bates, arXiv 2107.07511, section 3.2), given as `exact SD`.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import seed_everything
from recipe import quiet_trainer
from results import reproduce
from saved_predictions import Rows, classifiers
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from uci import FOLDERS, load
from uci_training import make_network

from lightning_uq import (
    CategoricalPrediction,
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    Prediction,
    Regression,
)

ALPHA = 0.1
SETS: dict[str, dict[str, Any]] = {
    "lac": {"method": "lac"},
    "aps": {"method": "aps", "randomized": True},
    "raps": {"method": "raps", "randomized": True},
    "by class": {"method": "lac", "by_class": True},
}
INTERVALS: dict[str, dict[str, Any]] = {
    "absolute": {"method": "absolute"},
    "normalized": {"method": "normalized"},
    "cqr": {"method": "cqr"},
}


def halves(num_rows: int, resplit: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to test."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(resplit))
    return order[: num_rows // 2], order[num_rows // 2 :]


def expected(fitted: int, tested: int) -> dict[str, float]:
    """Mean and standard deviation of the coverage of a resplit, for scores without ties.

    The number of covered rows is beta-binomial: beta(k, n + 1 - k) with k = ceil((n + 1)(1 - alpha)), and ``tested`` draws.
    """
    k = math.ceil((fitted + 1) * (1 - ALPHA))
    a, b = k, fitted + 1 - k
    variance = a * b * (a + b + tested) / ((a + b) ** 2 * (a + b + 1) * tested)
    return {"mean": a / (a + b), "sd": math.sqrt(variance)}


def run_classes(rows: Rows, resplits: int) -> dict[str, Any]:
    """Coverage and size of each kind of set."""
    logits, y = rows
    prediction = CategoricalPrediction(logits.double().unsqueeze(0))
    fit_rows, test_rows = halves(len(y), 0)
    found: dict[str, Any] = {"classes": logits.shape[1], "expected": expected(len(fit_rows), len(test_rows))}
    for name, options in SETS.items():
        coverages, sizes, worst = [], [], []
        for resplit in range(resplits):
            fit_rows, test_rows = halves(len(y), resplit)
            conformal = ConformalSets(alpha=ALPHA, **options).fit_predictions(prediction[fit_rows], y[fit_rows])
            sets, target = conformal.sets(prediction[test_rows]), y[test_rows]
            covered = sets[torch.arange(len(target)), target].double()
            counts = target.bincount(minlength=logits.shape[1])
            of_classes = torch.bincount(target, covered, minlength=logits.shape[1]) / counts
            coverages.append(float(covered.mean()))
            sizes.append(float(sets.double().sum(1).mean()))
            worst.append(of_classes)
        # Coverage of a class is a mean over the resplits; the worst of single resplits would be noise.
        classes = torch.stack(worst).nanmean(0)
        found[name] = {**moments(coverages), "size": mean(sizes), "worst_class": float(classes.min())}
    return found


def train(name: str, root: Path) -> tuple[Prediction, Tensor]:
    """Predictions of the held-out rows by one network, and their targets."""
    x, y = load(name, root)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fitted, held_out = order[: round(0.6 * len(x))], order[round(0.6 * len(x)) :]
    centre, spread = x[fitted].mean(0), x[fitted].std(0, correction=0)
    x = ((x - centre) / torch.where(spread > 0, spread, 1.0)).float()
    scale = (float(y[fitted].mean()), float(y[fitted].std(correction=0)))
    seed_everything(0, verbose=False)
    module = DeterministicModule(
        partial(make_network, x.shape[1], 50),
        task=Regression(target_scale=scale),
        optimizer=partial(torch.optim.Adam, lr=0.003),
    )
    trainer = quiet_trainer(accelerator="cpu", max_epochs=40)
    trainer.fit(module, DataLoader(TensorDataset(x[fitted], y[fitted].float()), 100, shuffle=True))
    return module.predict(x[held_out]), y[held_out].float()


def run_numbers(name: str, root: Path, resplits: int) -> dict[str, Any]:
    """Coverage and width of each kind of interval; widths are in standard deviations of the held-out targets."""
    prediction, y = train(name, root)
    fit_rows, test_rows = halves(len(y), 0)
    found: dict[str, Any] = {"expected": expected(len(fit_rows), len(test_rows))}
    lower, upper = prediction.interval(1 - ALPHA)
    unit = float(y.std())
    found["before"] = {
        "coverage": float(((lower <= y) & (y <= upper)).double().mean()),
        "width": float((upper - lower).mean()) / unit,
    }
    for kind, options in INTERVALS.items():
        coverages, widths = [], []
        for resplit in range(resplits):
            fit_rows, test_rows = halves(len(y), resplit)
            conformal = ConformalIntervals(alpha=ALPHA, **options).fit_predictions(prediction[fit_rows], y[fit_rows])
            lower, upper = conformal.intervals(prediction[test_rows])
            target = y[test_rows]
            coverages.append(float(((lower <= target) & (target <= upper)).double().mean()))
            widths.append(float((upper - lower).mean()) / unit)
        found[kind] = {**moments(coverages), "width": mean(widths)}
    return found


def moments(coverages: list[float]) -> dict[str, float]:
    """Mean and standard deviation over resplits."""
    return {"coverage": mean(coverages), "sd": stdev(coverages)}


def jobs(options: Namespace) -> dict[str, Any]:
    """One per classifier and per UCI set."""
    found: dict[str, Any] = {}
    for name, rows, tests in classifiers(options.logits):
        whole = rows if tests is None else tests
        found[f"classes-{name.replace('/', '.')}"] = partial(run_classes, whole, options.resplits)
    for name in FOLDERS:
        found[f"numbers-{name}"] = partial(run_numbers, name, options.uci, options.resplits)
    return found


def table(results: Mapping[str, Any]) -> str:
    """A table of sets and one of intervals."""
    kinds = {"classes": (SETS, "size"), "numbers": (INTERVALS, "width")}
    lines = []
    for kind, (methods, size) in kinds.items():
        before = kind == "numbers"
        head = [
            kind,
            "exact",
            *(["before"] if before else []),
            *methods,
            "exact SD",
            *(f"SD, {name}" for name in methods),
        ]
        head += [*([f"{size}, before"] if before else []), *(f"{size}, {name}" for name in methods)]
        head += [] if before else ["worst class, lac", "worst class, by class"]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for job, found in results.items():
            if not job.startswith(kind):
                continue
            own = [found[name] for name in methods]
            cells = [f"{found['expected']['mean']:.4f}"]
            cells += [f"{found['before']['coverage']:.3f}"] if before else []
            cells += [f"{one['coverage']:.4f}" for one in own]
            cells += [f"{found['expected']['sd']:.4f}", *(f"{one['sd']:.4f}" for one in own)]
            cells += [f"{found['before'][size]:.2f}"] if before else []
            cells += [f"{one[size]:.2f}" for one in own]
            cells += [] if before else [f"{found[name]['worst_class']:.3f}" for name in ("lac", "by class")]
            lines.append(f"| {job.removeprefix(kind + '-')} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--logits", type=Path, required=True, help="folder of the files of saved predictions")
    parser.add_argument("--uci", type=Path, required=True, help="folder of the UCI sets")
    parser.add_argument("--resplits", type=int, default=1000, help="random halves of the held-out rows")
    reproduce("conformal", parser, jobs, table, settings=("resplits",), about=__doc__)

"""Deep ensembles on UCI regression (Lakshminarayanan et al., NeurIPS 2017, Table 1), and other methods beside them:

    python benchmarks/reproduce/uci.py --root DATA/uci --out FOLDER [--sets yacht,boston] [--splits 20] [--budget MINUTES] [--publish]

Each set has the 20 splits of Hernandez-Lobato and Adams (protein: 5), 90 % of the rows for training. Protocol of the paper: one hidden layer
of 50 ReLU units (protein: 100), 40 epochs, batches of 100, Adam, mean and variance as outputs, inputs and targets standardised by the
training rows. The learning rate is chosen per method and split: each of RATES is trained on 80 % of the training rows, and the one with the
best NLL on the other 20 % is trained again on all of them. On the sets in LARGE this search trains one network instead of five members.
Test rows choose nothing. What differs from the paper: the members share their batches; the paper's learning rate is 0.1 "unless
otherwise specified"; its MC-dropout column is Gal and Ghahramani's, trained for longer. Epinets, of which it has none, cut the gradient's norm at 1.

All splits, rates and members of a method are trained at once (`side_by_side.py`). The job of the plain ensemble also gives its members
("single"), each with a FitLaplace ("laplace"), and conformal intervals around a network of the search, fitted to the rows that chose its rate.
One JSON file per set and method. Files that exist are not made again, so a stopped run continues when it is called again.
"""

import math
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from results import reproduce
from side_by_side import Rows
from torch import Tensor, nn
from uci_tables import table
from uci_training import Scale, predict, score, score_intervals, score_members, train

FOLDERS = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power": "power-plant",
    "protein": "protein-tertiary-structure",
    "wine": "wine-quality-red",
    "yacht": "yacht",
}
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
LARGE = ("kin8nm", "naval", "power", "protein")
METHODS = ("ensemble+AT", "ensemble", "dropout", "evidential", "epinet")


def num_splits(name: str, method: str) -> int:
    """The splits that the paper has; fewer for epinets, which train one after the other."""
    if method == "epinet":
        return 1 if name in LARGE else 5
    return 5 if name == "protein" else 20


def load(name: str, root: Path) -> tuple[Tensor, Tensor]:
    """Inputs [N, D] and targets [N, 1] in float64."""
    table = torch.as_tensor(np.loadtxt(root / FOLDERS[name] / "data.txt"))
    target = 16 if name == "naval" else table.shape[1] - 1  # naval's last column is a second target
    return table[:, :target], table[:, target : target + 1]


def split_rows(num_rows: int, split: int) -> tuple[Tensor, Tensor]:
    """The training and the test rows of a split: one random state draws all splits in order."""
    random = np.random.RandomState(1)
    for _ in range(split + 1):
        order = torch.as_tensor(random.choice(num_rows, num_rows, replace=False))
    number = round(0.9 * num_rows)
    return order[:number], order[number:]


def run(name: str, method: str, splits: int, root: Path, epochs: int) -> dict[str, Any]:
    """What a job gives: the time that it took, and one mapping {method: {rmse, nll, ...}} per split."""
    began = time.process_time()
    x, y = load(name, root)
    parts = zip(*(split_rows(len(x), split) for split in range(splits)), strict=True)
    rows, test = (Rows(x[part], y[part, 0]) for part in (torch.stack(part, 1) for part in parts))
    options = {"hidden": 100 if name == "protein" else 50, "epochs": epochs}
    inner = round(0.8 * len(rows.x))
    fitted, held_out = Rows(*(part[:inner] for part in rows)), Rows(*(part[inner:] for part in rows))
    seed_everything(0, verbose=False)
    chosen = search(method, fitted, held_out, num_members=1 if name in LARGE else 5, **options)
    seed_everything(0, verbose=False)
    trained = train(method, rows, [rate for rate, _ in chosen], num_members=5, **options)
    found = []
    for split, ((rate, searched), members) in enumerate(zip(chosen, trained, strict=True)):
        train_rows, test_rows = rows.standardized(rows).of(split), test.standardized(rows).of(split)
        scale = scale_of(rows, split)
        results = {method: {"rate": rate, **score(predict(method, members, scale, test_rows[0]), test_rows[1])}}
        if method == "ensemble":
            results |= score_members(members, scale, train_rows, test_rows)
            calibration, tested = (part.standardized(fitted).of(split) for part in (held_out, test))
            results["conformal"] = score_intervals(searched[0], scale_of(fitted, split), calibration, tested)
        found.append(results)
    return {"processor_seconds": round(time.process_time() - began, 1), "splits": found}


def search(method: str, rows: Rows, held_out: Rows, **options: Any) -> list[tuple[float, list[nn.Sequential]]]:
    """The rate of each split with the best NLL on its held-out rows, and the networks that were trained with it."""
    splits = range(rows.y.shape[1])
    pairs = [(rate, split) for rate in RATES for split in splits]
    trained = train(method, rows.take([split for _, split in pairs]), [rate for rate, _ in pairs], **options)
    networks = dict(zip(pairs, trained, strict=True))
    tested = held_out.standardized(rows)

    def nll(rate: float, split: int) -> float:
        x, y = tested.of(split)
        found = score(predict(method, networks[rate, split], scale_of(rows, split), x), y)["nll"]
        return found if math.isfinite(found) else math.inf

    best = [min(RATES, key=partial(nll, split=split)) for split in splits]
    return [(rate, networks[rate, split]) for split, rate in enumerate(best)]


def scale_of(rows: Rows, split: int) -> Scale:
    """Mean and standard deviation of a split's targets."""
    means, stds = rows.scales()
    return [means[split]], [stds[split]]


def jobs(options: Namespace) -> dict[str, Any]:
    """One per set and method, the sets of a method in turn."""
    names = options.sets.split(",")
    if unknown := set(names) - FOLDERS.keys():
        raise SystemExit(f"--sets: unknown {', '.join(sorted(unknown))}. The sets are {', '.join(FOLDERS)}.")
    return {
        f"{name}-{method}": partial(
            run, name, method, min(options.splits, num_splits(name, method)), options.root, options.epochs
        )
        for method in METHODS
        for name in names
    }


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", default=",".join(FOLDERS), help="names of sets, with commas between them")
    parser.add_argument("--splits", type=int, default=20, help="splits of each set; of protein at most 5")
    parser.add_argument("--epochs", type=int, default=40)
    reproduce("uci", parser, jobs, table, settings=("splits", "epochs"), about=__doc__)

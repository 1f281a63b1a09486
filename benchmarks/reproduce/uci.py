"""Deep ensembles on UCI regression (Lakshminarayanan et al., NeurIPS 2017, Table 1), through EnsembleModule under a Trainer:

    python benchmarks/reproduce/uci.py --root DATA/uci --out FOLDER [--sets yacht,boston] [--splits 20] [--budget MINUTES] [--publish]

Each set has the 20 splits of Hernandez-Lobato and Adams (protein: 5), 90 % of the rows for training. Protocol of the paper: one hidden layer
of 50 ReLU units (protein: 100), 40 epochs, batches of 100, Adam, mean and variance as outputs, inputs and targets standardised by the
training rows. The learning rate is chosen per method and split: each of RATES is trained on 80 % of the training rows, and the one with the
best NLL on the other 20 % is trained again on all of them. Test rows choose nothing. What differs from the paper: the members share their
batches; the paper's learning rate is 0.1 "unless otherwise specified"; its MC-dropout column is Gal and Ghahramani's, trained for longer.

One JSON file per set and split. Files that exist are not made again, so a stopped run continues when it is called again.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from results import mean_and_error, reproduce
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_uq import DropoutModule, EnsembleModule, Regression, UncertaintyModule

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
RATES = (0.1, 0.03, 0.01, 0.003)
METHODS = ("ensemble+AT", "ensemble", "single", "dropout")
PAPER = {  # RMSE and NLL: MC-dropout, then the ensemble with adversarial training; means and the paper's own error bars
    "boston": (("2.97±.85", "3.28±1.00"), ("2.46±.25", "2.41±.25")),
    "concrete": (("5.23±.53", "6.03±.58"), ("3.04±.09", "3.06±.18")),
    "energy": (("1.66±.19", "2.09±.29"), ("1.99±.09", "1.38±.22")),
    "kin8nm": ((".10±.00", ".09±.00"), ("-.95±.03", "-1.20±.02")),
    "naval": ((".01±.00", ".00±.00"), ("-3.80±.05", "-5.63±.05")),
    "power": (("4.02±.18", "4.11±.17"), ("2.80±.05", "2.79±.04")),
    "protein": (("4.36±.04", "4.71±.06"), ("2.89±.01", "2.83±.02")),
    "wine": ((".62±.04", ".64±.04"), (".93±.06", ".94±.12")),
    "yacht": (("1.11±.38", "1.58±.48"), ("1.55±.12", "1.18±.21")),
}
Rows = tuple[Tensor, Tensor]


def num_splits(name: str) -> int:
    """The splits that the paper has."""
    return 5 if name == "protein" else 20


def load(name: str, root: Path) -> Rows:
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


def make_network(inputs: int, hidden: int, dropout: float = 0.0) -> nn.Module:
    """One hidden layer, and a mean and a raw variance."""
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)]
    return nn.Sequential(*[layer for layer in layers if dropout or not isinstance(layer, nn.Dropout)])


def make_module(method: str, inputs: int, hidden: int, scale: tuple[float, float], rate: float) -> UncertaintyModule:
    """The module of a method. ``scale`` is the mean and the standard deviation of the training targets."""
    training: dict[str, Any] = {
        "task": Regression(target_scale=scale),
        "optimizer": partial(torch.optim.Adam, lr=rate),
        "return_members": True,
    }
    if method == "dropout":
        return DropoutModule(make_network(inputs, hidden, 0.05), mask="per_example", **training)
    epsilon = 0.01 if method == "ensemble+AT" else None  # in units of each input's range
    factory = partial(make_network, inputs, hidden)
    return EnsembleModule(factory, num_members=5, adversarial_epsilon=epsilon, execution="stacked", **training)


def train_and_score(method: str, train: Rows, test: Rows, hidden: int, rate: float, epochs: int) -> dict[str, Any]:
    """Train on some rows and score the others, in the target's units."""
    (x, y), (test_x, test_y) = train, test
    centre, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    data = TensorDataset(((x - centre) / spread).float(), y.float())
    batches = BatchSampler(RandomSampler(data), batch_size=100, drop_last=False)
    scale = (float(y.mean()), float(y.std(correction=0)))
    module = make_module(method, x.shape[1], hidden, scale, rate)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=None, sampler=batches))
    rows = ((test_x - centre) / spread).float()
    (prediction,) = trainer.predict(module, DataLoader(rows, batch_size=len(rows)))
    return score(prediction, test_y)


def score(prediction: Any, y: Tensor) -> dict[str, Any]:
    """RMSE and NLL; the paper's NLL is that of one Gaussian with the mixture's mean and variance.

    ``of_members`` holds what each member alone gives.
    """

    def rmse_and_nll(mean: Tensor, variance: Tensor) -> dict[str, float]:
        mean, variance = mean.double(), variance.double()
        error = (y - mean).square()
        nll = 0.5 * (math.log(2 * math.pi) + variance.log() + error / variance)
        return {"rmse": float(error.mean().sqrt()), "nll": float(nll.mean())}

    found: dict[str, Any] = rmse_and_nll(prediction.mean, prediction.variance)
    found["nll_mixture"] = -float(prediction.log_prob(y.float()).double().mean())
    members = list(zip(prediction.member_mean, prediction.member_variance, strict=True))
    found["of_members"] = [rmse_and_nll(*member) for member in members] if len(members) <= 5 else []
    return found


def run_split(name: str, split: int, root: Path, epochs: int) -> dict[str, Any]:
    """What every method gives on one split: {method: {rate, rmse, nll, ...}}."""
    x, y = load(name, root)
    train, test = split_rows(len(x), split)
    hidden = 100 if name == "protein" else 50
    inner = round(0.8 * len(train))
    result: dict[str, Any] = {}
    for method in (m for m in METHODS if m != "single"):
        held_out = {}
        for rate in RATES:
            seed_everything(split, verbose=False)
            rows, others = train[:inner], train[inner:]
            nll = train_and_score(method, (x[rows], y[rows]), (x[others], y[others]), hidden, rate, epochs)["nll"]
            held_out[rate] = nll if math.isfinite(nll) else math.inf
        best = min(RATES, key=held_out.__getitem__)
        seed_everything(split, verbose=False)
        found = train_and_score(method, (x[train], y[train]), (x[test], y[test]), hidden, best, epochs)
        members = found.pop("of_members")
        result[method] = {"rate": best, **found}
        if method == "ensemble":  # its members are five networks trained alone, since each gets its own gradient
            result["single"] = {"rate": best, **{key: mean(m[key] for m in members) for key in ("rmse", "nll")}}
    return result


def table(results: Mapping[str, Any]) -> str:
    """Means and standard deviations over the splits, beside the paper's."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job, result in results.items():
        found.setdefault(job.rpartition("-")[0], []).append(result)
    lines = []
    for i, key in enumerate(("rmse", "nll")):
        head = [key.upper(), "splits", *METHODS, "paper: ensemble+AT", "paper: MC-dropout"]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for name, splits in sorted(found.items()):
            digits = 3 if name in ("kin8nm", "naval") else 2
            ours = ["".join(mean_and_error([split[method][key] for split in splits], digits)) for method in METHODS]
            dropout, ensemble = PAPER[name][i]
            lines.append("| " + " | ".join([name, str(len(splits)), *ours, ensemble, dropout]) + " |")
        lines.append("")
    return "\n".join(lines).strip()


def jobs(options: Namespace) -> dict[str, Any]:
    """One per set and split, the splits of all sets in turn."""
    names = options.sets.split(",")
    if unknown := set(names) - FOLDERS.keys():
        raise SystemExit(f"--sets: unknown {', '.join(sorted(unknown))}. The sets are {', '.join(FOLDERS)}.")
    return {
        f"{name}-{split}": partial(run_split, name, split, options.root, options.epochs)
        for split in range(options.splits)
        for name in names
        if split < num_splits(name)
    }


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", default=",".join(FOLDERS), help="names of sets, with commas between them")
    parser.add_argument("--splits", type=int, default=20, help="splits of each set; of protein at most 5")
    parser.add_argument("--epochs", type=int, default=40)
    reproduce("uci", parser, jobs, table, settings=("epochs",), about=__doc__)

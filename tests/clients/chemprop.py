"""chemprop's MPNN: graphs of molecules, batches of seven fields."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from chemprop import data, models, nn

from tests.clients.client import Client

MOLECULES = ["C", "CC", "CCC", "CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "COC", "C=C", "C#N", "CCOC", "CC(C)C"]
FAR = ["O=S(=O)(O)O", "FC(F)(F)F", "[SiH4]", "BrBr", "ClCl", "II", "S"]


def loader(kind: str, split: str) -> Any:
    molecules = {"train": MOLECULES[:10], "val": MOLECULES[3:], "test": MOLECULES[1:], "far": FAR}[split]
    numbers = [[float(len(one))] if kind == "number" else [float(i % 3)] for i, one in enumerate(molecules)]
    points = [data.MoleculeDatapoint.from_smi(one, np.array(y)) for one, y in zip(molecules, numbers, strict=True)]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=5, shuffle=False, num_workers=0)


def mpnn(head: Any) -> Any:
    return models.MPNN(nn.BondMessagePassing(d_h=16), nn.MeanAggregation(), head(input_dim=16, hidden_dim=8))


def molecules_and_targets(batch: Any) -> Any:
    return batch.bmg, batch.Y


def classes(batch: Any) -> Any:
    return batch.bmg, batch.Y.squeeze(1).long()


def log_probs(output: torch.Tensor) -> torch.Tensor:
    return output.squeeze(1).log()


def raw_variance(output: torch.Tensor) -> torch.Tensor:
    """Mean and variance, as chemprop gives them, as mean and log-variance."""
    mean, variance = output.unbind(-1)
    return torch.cat([mean, variance.clamp_min(math.exp(-20)).log()], -1)


USES = ("EnsembleModule", "FitGMM", "FitKNN", "TemperatureScaling", "OODDetection", "EpinetModule")


def regressor(name: str, predicts: str, head: Any, line: str, **refused: str) -> Client:
    """A regressor, and how its output is read where that is no mean."""
    lines = dict.fromkeys(USES, ", ".join(filter(None, ["unpack_batch=molecules_and_targets", line])))
    epinet = {} if line else {"EpinetModule": 'unpack_batch=molecules_and_targets, task=Regression(head="mean")'}
    return Client(
        name,
        predicts,
        ["chemprop", "rdkit"],
        partial(mpnn, head),
        partial(loader, "number"),
        lines={**lines, **epinet, "load_fitted": ", ".join(filter(None, ["build()", line]))},
        names=[molecules_and_targets, *([raw_variance] if line else [])],
        refused={"TemperatureScaling": "calibrates probabilities", **refused},
        target_of=lambda batch: batch.Y,
        input_of=lambda batch: batch.bmg,
    )


CLIENTS = [
    regressor(
        "chemprop MPNN, RegressionFFN",
        "a number per molecule",
        nn.RegressionFFN,
        "",
        OODDetection="has no score for a single network",
    ),
    regressor(
        "chemprop MPNN, MveFFN",
        "a mean and a variance per molecule",
        nn.MveFFN,
        'output=raw_variance, task=Regression(head="mean_log_variance")',
    ),
    Client(
        "chemprop MPNN, MulticlassClassificationFFN",
        "one class per molecule",
        ["chemprop", "rdkit"],
        partial(mpnn, partial(nn.MulticlassClassificationFFN, n_classes=3)),
        partial(loader, "class"),
        lines={
            **dict.fromkeys(USES, "unpack_batch=classes, output=log_probs"),
            "load_fitted": "build(), output=log_probs",
        },
        names=[classes, log_probs],
        target_of=lambda batch: classes(batch)[1],
        input_of=lambda batch: batch.bmg,
    ),
]

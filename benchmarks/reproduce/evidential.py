"""Evidential deep learning against softmax and an ensemble: LeNet on MNIST, out-of-distribution detection of notMNIST and FashionMNIST.

    python benchmarks/reproduce/evidential.py --root DATA --out FOLDER [--seeds 3] [--epochs 6] [--budget MINUTES] [--publish]

EDL (Sensoy et al., NeurIPS 2018), I-EDL (Deng et al., ICML 2023), R-EDL (Chen et al., ICLR 2024) and Re-EDL (Chen et al., arXiv 2410.00393)
differ here in their loss alone: all read evidence by softplus, and where there is a KL term its factor rises over ten epochs. lambda of R-EDL
and Re-EDL is 0.1, the Fisher factor of I-EDL 0.05. All methods share the network, pixels in [0, 1], batches of 128, Adam, and a learning rate
that falls from 0.002 along a cosine, epoch by epoch. Nothing was tuned on the tests; no image of another set is seen in training.

DATA holds torchvision's files of MNIST and FashionMNIST, and notMNIST as `image_sets.py` names it.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from image_sets import images
from lightning.pytorch import seed_everything
from recipe import quiet_trainer
from results import markdown, mean_and_error, reproduce
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_uq import (
    DeterministicModule,
    EnsembleModule,
    EvidentialClassification,
    EvidentialModule,
    OODDetection,
    UncertaintyModule,
)
from lightning_uq.networks.backbones import LeNet

OOD_SETS = {"notmnist": "notMNIST", "fashion": "FashionMNIST"}
LOSSES = {"EDL": "evidential", "I-EDL": "i_edl", "R-EDL": "r_edl", "Re-EDL": "re_edl"}
SHARED = ("max_softmax", "predictive_entropy")
METHODS = ("softmax", "ensemble, 5", *LOSSES)
PUBLISHED = {
    # MNIST accuracy in per cent, read in the papers; average precision of the test set against FashionMNIST by the largest probability and
    # by the vacuity, quoted from memory of the tables of I-EDL and R-EDL and not checked against them.
    "softmax": ("99.4 (with L2)", "", ""),
    "ensemble, 5": ("99.3", "", ""),
    "EDL": ("99.3", "98.10", "98.08"),
    "I-EDL": ("", "98.86", "98.86"),
    "R-EDL": ("99.33", "99.29", "99.29"),
    "Re-EDL": ("", "", ""),
}


def own_score(method: str) -> str:
    """The score that a method is known for."""
    return {"softmax": "max_softmax", "ensemble, 5": "mutual_information"}.get(method, "vacuity")


def scores(method: str) -> tuple[str, ...]:
    """What is tested: the own score first."""
    return tuple(dict.fromkeys((own_score(method), *SHARED)))


def make_module(method: str, epochs: int) -> UncertaintyModule:
    """The module of a method."""
    training: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=2e-3),
        "lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    }
    if method == "softmax":
        return DeterministicModule(LeNet, **training)
    if method == "ensemble, 5":
        return EnsembleModule(LeNet, num_members=5, **training)
    task = EvidentialClassification(loss=LOSSES[method], evidence="softplus", annealing_epochs=10)
    return EvidentialModule(LeNet, task=task, **training)


def loader(x: Tensor, y: Tensor, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    """Batches of images in [0, 1], each cut out of the tensors at once."""
    data = TensorDataset(x, y)
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last=shuffle))


@cache
def load(name: str, root: Path, *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels."""
    x, y = images(name, root, train=train)
    return x.float() / 255, y


def run(method: str, seed: int, root: Path, epochs: int) -> dict[str, Any]:
    """Accuracy, NLL and ECE on MNIST's test images, and how well each score detects the other sets."""
    seed_everything(seed, verbose=False)
    train = loader(*load("mnist", root, train=True), batch_size=128, shuffle=True)
    module = make_module(method, epochs)
    others = {name: loader(*load(name, root), batch_size=1000) for name in OOD_SETS}
    trainer = quiet_trainer(
        [OODDetection(others, scores(method))], accelerator="cpu", limit_val_batches=0, max_epochs=epochs
    )
    trainer.fit(module, train)
    (tested,) = trainer.test(module, loader(*load("mnist", root), batch_size=1000), verbose=False)
    result: dict[str, Any] = {key: tested[f"test_{key}"] for key in ("accuracy", "nll", "ece")}
    for name in OOD_SETS:
        for score in scores(method):
            result[f"{name}/{score}"] = {
                key: tested[f"ood_{key}/{name}/{score}"] for key in ("auroc", "auprc_in", "auprc_out")
            }
    return result


def jobs(options: Namespace) -> dict[str, Any]:
    """One per method and seed, all methods of a seed before the next."""
    return {
        f"{method}-{seed}": partial(run, method, seed, options.root, options.epochs)
        for seed in range(options.seeds)
        for method in METHODS
    }


def table(results: Mapping[str, Any]) -> str:
    """Each method on MNIST, and by its own score on the other sets; then all scores; in per cent, means over the seeds."""
    found: dict[str, list[Any]] = {}
    for method in METHODS:  # in this order, whatever ran first
        if own := [result for job, result in results.items() if job.rpartition("-")[0] == method]:
            found[method] = own

    def cell(runs: Sequence[Any], key: str, metric: str | None = None, scale: float = 100, digits: int = 2) -> str:
        values = [scale * (run[key] if metric is None else run[key][metric]) for run in runs]
        return "".join(mean_and_error(values, digits))

    detected = [f"{name}: {metric}" for name in OOD_SETS.values() for metric in ("AUROC", "AUPR")]
    lines = markdown(
        ["MNIST", "seeds", "accuracy", "papers", "NLL", "ECE", "score", *detected],
        [
            [
                method,
                str(len(runs)),
                cell(runs, "accuracy"),
                PUBLISHED[method][0],
                cell(runs, "nll", scale=1, digits=4),
                cell(runs, "ece"),
                own_score(method),
                *(
                    cell(runs, f"{name}/{own_score(method)}", key)
                    for name in OOD_SETS
                    for key in ("auroc", "auprc_out")
                ),
            ]
            for method, runs in found.items()
        ],
    )
    lines += markdown(
        ["AUROC", *(f"{name}: {score}" for name in OOD_SETS.values() for score in ("own", *SHARED))],
        [
            [
                method,
                *(
                    cell(runs, f"{name}/{score}", "auroc")
                    for name in OOD_SETS
                    for score in (own_score(method), *SHARED)
                ),
            ]
            for method, runs in found.items()
        ],
    )
    lines += markdown(
        [
            "AUPR of the test set, FashionMNIST",
            "max_softmax",
            "papers (from memory)",
            "vacuity",
            "papers (from memory)",
        ],
        [
            [
                method,
                cell(runs, "fashion/max_softmax", "auprc_in"),
                PUBLISHED[method][1],
                cell(runs, "fashion/vacuity", "auprc_in") if method in LOSSES else "",
                PUBLISHED[method][2],
            ]
            for method, runs in found.items()
        ],
    )
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the images")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method")
    parser.add_argument("--epochs", type=int, default=6)
    reproduce("evidential", parser, jobs, table, settings=("epochs",), about=__doc__)

"""CIFAR-10 by OpenOOD v1.5's protocol, with the sets that are at hand: CIFAR-100 near, MNIST far, FashionMNIST and KMNIST beside.

    python benchmarks/reproduce/cifar.py --root DATA --out FOLDER [--networks plain,sn] [--seeds 3] [--members 5] [--budget MINUTES]

ResNet-18 by OpenOOD's recipe: 100 epochs of SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128, a learning rate that falls
from 0.1 along a cosine with each step; mirrored images, moved by up to 4 pixels; the epoch of the best validation accuracy. ``sn`` is the
network of DDU: spectral normalisation with coefficient 3, leaky ReLU, average pooling in the shortcuts. ``--members`` adds an EnsembleModule
of plain networks, whose members share their batches. Without a GPU, or with ``--small``, a residual network of 16 to 128 channels.

Each network has a folder with its best checkpoint and, with everything that was fitted to it, ``best-uq.ckpt``; its results are one JSON
file. What exists is not made again, so a stopped run continues when it is called again. FPR95 has out-of-distribution as the positive kind.
"""

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cifar_data import OOD_SETS, Images, augmented, load, normalized
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from results import run_jobs
from small_resnet import SmallResNet
from torch import Tensor, nn

from lightning_uq import (
    DeterministicModule,
    EnsembleModule,
    FitGMM,
    FitKNN,
    FitViM,
    OODDetection,
    TemperatureScaling,
    UncertaintyModule,
)
from lightning_uq.callbacks.ood_scores import OODScorer
from lightning_uq.functional.ood import fpr_at_tpr
from lightning_uq.networks.backbones import resnet18
from lightning_uq.networks.spectral_norm import spectral_normalize

LOGIT_SCORES = ("predictive_entropy", "max_softmax", "energy", "max_logit", "gen")
MEMBER_SCORES = ("mutual_information",)
PUBLISHED = {
    # AUROC in per cent of ResNet-18, three seeds. The second number is the mean of CIFAR-100 and TinyImageNet, from OpenOOD's repository
    # (results/cifar10.csv); the first, of CIFAR-100 alone, is quoted from memory of the paper's table and was not checked against it.
    "max_softmax": (87.19, "88.03 ± 0.25"),
    "energy": (86.36, "87.58 ± 0.46"),
    "max_logit": (86.31, "87.52 ± 0.47"),
    "gen": (87.21, "88.20 ± 0.30"),
    "knn": (89.73, "90.64 ± 0.20"),
    "relative_mahalanobis": (88.83, "89.80 ± 0.28"),
    "vim": (87.75, "88.68 ± 0.28"),
    "mahalanobis": (83.59, "84.20 ± 2.40"),
}


class Recipe(UncertaintyModule):
    """What the single network and the ensemble share: images by the batch on the device, OpenOOD's optimizer, and all scores of a batch."""

    scores: dict[str, str]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = super().on_after_batch_transfer(batch, dataloader_idx)
        return normalized(augmented(x) if self.trainer.training else x), y

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps, last = int(self.trainer.estimated_stepping_batches), 1e-5  # the last rate is 1e-6
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """All scores by name, [B] each, from one call of the network, as OODDetection computes them."""
        scorers = [one for one in self.trainer.callbacks if isinstance(one, OODScorer)]  # type: ignore[attr-defined]
        with ExitStack() as stack:
            provided = [stack.enter_context(one.ood_scores(self)) for one in scorers]
            outputs = self(batch[0])
        with torch.autocast(self.device.type, enabled=False):
            values = {name: value for function in provided for name, value in function(outputs).items()}
            prediction = self.task.predict(outputs)
        return {
            label: (values[name] if name in values else prediction.score(name)).double().cpu()
            for label, name in self.scores.items()
        }


class Single(Recipe, DeterministicModule):
    """One network."""


class Ensemble(Recipe, EnsembleModule):
    """Several."""


def make_network(kind: str, small: bool) -> nn.Module:
    """A network of ten classes."""
    network = SmallResNet() if small else resnet18(10, modified=kind == "sn")
    if kind == "sn":
        spectral_normalize(network, coefficient=3.0, exclude=["fc"])
    return network.to(memory_format=torch.channels_last)


def make_module(kind: str, members: int, small: bool) -> Recipe:
    """The module of a kind: ``plain``, ``sn`` or ``ensemble``."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    network = partial(make_network, kind, small)
    if kind == "ensemble":
        return Ensemble(network, num_members=members, optimizer=sgd)
    return Single(network, optimizer=sgd)


def make_fits() -> dict[str, Any]:
    """The callbacks that fit a score to the features of the training images, by the name of their score."""
    densities = {
        f"gmm_{transform}": FitGMM(feature_transform=transform, name=transform)
        for transform in ("raw", "polar", "direction", "combined")
    }
    distances = {
        name: FitGMM(covariance="tied", score=name, name=name) for name in ("mahalanobis", "relative_mahalanobis")
    }
    return {**densities, **distances, "knn": FitKNN(), "vim": FitViM()}


def run(
    kind: str, seed: int, load_data: Callable[[], dict[str, Images]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train a network, unless its folder has one, and test it."""
    data = load_data()
    seed_everything(seed, verbose=False)
    folder = arguments.out / f"{kind}-{seed}"
    module = make_module(kind, arguments.members, arguments.small)
    fits = make_fits()
    module.scores = {name: name for name in LOGIT_SCORES + MEMBER_SCORES * (kind == "ensemble")}
    module.scores |= {label: fit.ood_score_names[0] for label, fit in fits.items()}
    scaling = TemperatureScaling()
    detection = OODDetection({name: data[name].loader() for name in OOD_SETS}, module.scores)
    result: dict[str, Any] = {"kind": kind, "seed": seed, "epochs": arguments.epochs, "small": arguments.small}
    fitted = folder / "best-uq.ckpt"
    if not fitted.exists():
        start = time.monotonic()
        best = ModelCheckpoint(
            folder, "best", monitor="val_accuracy", mode="max", save_weights_only=True, enable_version_counter=False
        )
        trainer = make_trainer(arguments, [*fits.values(), scaling, best])
        trainer.fit(module, data["train"].loader(128, shuffle=True), data["val"].loader())
        result["seconds of training and fitting"] = time.monotonic() - start
    start = time.monotonic()
    trainer = make_trainer(arguments, [*fits.values(), scaling, detection])
    (tested,) = trainer.test(module, data["test"].loader(), ckpt_path=str(fitted), verbose=False)
    result["seconds of testing"] = time.monotonic() - start
    result |= {key: value for key, value in tested.items() if not key.startswith("ood_")}
    result["temperature"] = scaling.temperature.tolist()
    rows = {name: collect(trainer, module, data[name]) for name in ("test", *OOD_SETS)}
    result["ood"] = {
        name: {label: ood_metrics(tested, rows["test"], rows[name], name, label) for label in module.scores}
        for name in OOD_SETS
    }
    result["centre"] = distance_of_centre(fits["mahalanobis"]) / float(rows["test"]["mahalanobis"].median())
    (on_train,) = trainer.validate(module, data["train"].loader(), verbose=False)
    result["train_accuracy"] = on_train["val_accuracy"]
    return result


def make_trainer(arguments: argparse.Namespace, callbacks: list[Callback]) -> Trainer:
    """A Trainer on one device."""
    gpu = torch.cuda.is_available()
    return Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if gpu else "32-true",
        max_epochs=arguments.epochs,
        callbacks=[*callbacks, TQDMProgressBar(refresh_rate=20)],
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        benchmark=gpu,
        logger=False,
        enable_model_summary=False,
    )


def collect(trainer: Trainer, module: Recipe, images: Images) -> dict[str, Tensor]:
    """All scores of a set, [N] by name."""
    batches: Any = trainer.predict(module, images.loader())
    return {label: torch.cat([batch[label] for batch in batches]) for label in module.scores}


def ood_metrics(
    tested: Any, inside: dict[str, Tensor], outside: dict[str, Tensor], name: str, label: str
) -> dict[str, float]:
    """What OODDetection logged, and FPR95 with out-of-distribution as the positive kind."""
    score = torch.cat([inside[label], outside[label]])
    is_ood = torch.arange(len(score)) >= len(inside[label])
    return {
        "auroc": tested[f"ood_auroc/{name}/{label}"],
        "aupr_in": tested[f"ood_auprc_in/{name}/{label}"],
        "aupr_out": tested[f"ood_auprc_out/{name}/{label}"],
        "fpr95": float(fpr_at_tpr(score, is_ood, positive="out")),
    }


def distance_of_centre(fit: FitGMM) -> float:
    """The Mahalanobis distance of the mean of the class means.

    Inputs near the distribution have features between the classes. The distance tells them apart only where this one is not small
    beside a test row's own, which is about D: that depends on how far the training has drawn the classes together.
    """
    centres = torch.stack([density.mean.mean(0, keepdim=True) for density in fit.densities])
    return float(fit.feature_scores(centres))


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds of AUROC and FPR95 in per cent, and the published AUROC."""

    def percent(values: list[float]) -> str:
        error = f"±{100 * stdev(values):.2f}" if len(values) > 1 else ""
        return f"{100 * mean(values):.2f}{error}"

    lines = []
    for kind in dict.fromkeys(result["kind"] for result in results):
        own = [result for result in results if result["kind"] == kind]
        numbers = {
            key: percent([r[name] for r in own])
            for key, name in {
                "accuracy": "test_accuracy",
                "on training images": "train_accuracy",
                "ECE": "uq/test_ece",
                "after T": "uq/test_ece_calibrated",
            }.items()
        }
        temperature, centre = (mean(result[key] for result in own) for key in ("temperature", "centre"))
        lines.append(
            f"\n{kind}, {len(own)} seed(s){', SMALL network' if own[0]['small'] else ''}, {own[0]['epochs']} epochs: "
            + ", ".join(f"{key} {value}" for key, value in numbers.items())
            + f" ({temperature:.2f}), Mahalanobis distance of the centre {centre:.2f} of a test row's"
        )
        lines.append(
            f"{'AUROC / FPR95':22}" + "".join(f"{name:>24}" for name in OOD_SETS) + "  OpenOOD: CIFAR-100, near"
        )
        for label in own[0]["ood"]["cifar100"]:
            cells = [
                " / ".join(percent([r["ood"][name][label][key] for r in own]) for key in ("auroc", "fpr95"))
                for name in OOD_SETS
            ]
            published = "  {:.2f}, {}".format(*PUBLISHED[label]) if label in PUBLISHED and kind == "plain" else ""
            lines.append(f"{label:22}" + "".join(f"{cell:>24}" for cell in cells) + published)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints and results")
    parser.add_argument("--networks", default="plain,sn", help="plain, sn, or both with a comma between them")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument(
        "--members", type=int, default=5, help="members of the ensemble, of which there is one; 0 for none"
    )
    parser.add_argument("--epochs", type=int, help="default 100, or 10 without a GPU")
    parser.add_argument("--small", action="store_true", help="a network for a CPU, and the default there")
    parser.add_argument("--limit", type=int, help="at most so many images of each set, for a dry run")
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further network is begun")
    arguments = parser.parse_args()
    kinds = arguments.networks.split(",")
    if unknown := set(kinds) - {"plain", "sn"}:
        parser.error(f"--networks: unknown {', '.join(sorted(unknown))}. The networks are plain and sn.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.epochs = arguments.epochs or (100 if device == "cuda" else 10)
    arguments.small = arguments.small or device == "cpu"
    if arguments.small:
        print("The network is SMALL, so its numbers are not comparable with OpenOOD's.")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = cache(partial(load, arguments.root, device, arguments.limit))
    names = [(kind, seed) for seed in range(arguments.seeds) for kind in kinds] + [("ensemble", 0)] * bool(
        arguments.members
    )
    jobs = {f"{kind}-{seed}": partial(run, kind, seed, data, arguments) for kind, seed in names}
    settings = {key: getattr(arguments, key) for key in ("epochs", "small", "limit", "members")}
    results, left_out = run_jobs(jobs, arguments.out, settings, arguments.budget)
    print(table(list(results.values())))
    if left_out:
        print(f"Left out by the budget: {', '.join(left_out)}")


if __name__ == "__main__":
    sys.exit(main())

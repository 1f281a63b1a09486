"""Deep Deterministic Uncertainty on the MNIST family (figure 1 of arXiv 2102.11582): Dirty-MNIST against four other sets.

    python benchmarks/reproduce/ddu.py --root DATA --out FOLDER [--networks lenet,vgg16,resnet18_sn] [--seeds 5] [--full]
        [--budget MINUTES] [--publish]

Networks are trained on MNIST and as many ambiguous digits, whose labels disagree. The entropy of a prediction is high for ambiguous digits
and for other images alike; the density of the features is to be low for other images alone. DATA holds torchvision's files of MNIST,
FashionMNIST and KMNIST, and those that ``image_sets.py`` names. The published ambiguous digits are used where their files lie under DATA or
DATA/AmbiguousMNIST; else DirtyMNISTDataModule makes pixel averages w a + (1 - w) b of two digits of different classes, w in [0.4, 0.6], each
with ten labels, a's class with probability w. 6,000 such images train and 6,000 test, in either case.

SGD with momentum 0.9, weight decay 5e-4, batches of 128, a learning rate that falls from 0.1 along a cosine with each step; a tenth of the
samples validates. ``resnet18_sn`` has spectral normalisation with coefficient 3 and otherwise the usual layers. ``--full`` is the paper's
figure, and the default on a GPU: 100 epochs of all samples. Without it, LeNet is trained for fewer epochs, and the other two with an eighth
of their channels on a part of the samples; the table says so.

Each network is one JSON file, and a file of its logits. An ensemble pools the logits of ``--members`` networks of consecutive seeds. What
exists is not made again, so a stopped run continues when it is called again.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from ddu_data import OOD_SETS, Data, Samples, load
from ddu_plans import CPU, FULL
from lightning.pytorch import seed_everything
from recipe import Recipe, collect, densities, quiet_trainer
from results import markdown, mean_and_error, reproduce
from torch import Tensor

from lightning_uq import DeterministicModule, FitKNN, TemperatureScaling
from lightning_uq.data.image_dataset import shuffled_split
from lightning_uq.functional import SCORES, auroc, expected_calibration_error
from lightning_uq.functional.entropy import mean_log_probs


class Single(Recipe, DeterministicModule):
    """One network."""


def run(name: str, seed: int, load_data: Callable[[], Data], options: Namespace) -> dict[str, Any]:
    """Train a network, fit its densities, and score the test images; their logits are kept for the ensemble."""
    data, plan = load_data(), (FULL if options.full else CPU)[name]
    x, y, rows = data.train
    split = [
        part[: plan.samples and int(plan.samples * share)]
        for part, share in zip(shuffled_split(len(y), seed), (0.9, 0.1), strict=True)
    ]
    train, val = (Samples(x, y[part], rows[part]).loader(shuffle=part is split[0]) for part in split)
    seed_everything(seed, verbose=False)
    module = Single(plan.build(), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4))
    fits: dict[str, Any] = {**densities(), "knn": FitKNN()}
    module.scores = {"entropy": "predictive_entropy", "energy": "energy"}
    module.scores |= {label: fit.ood_score_names[0] for label, fit in fits.items()}
    scaling = TemperatureScaling()
    trainer = quiet_trainer([*fits.values(), scaling], max_epochs=plan.epochs)
    trainer.fit(module, train, val)
    found = {"test": collect(trainer, module, Samples(data.test[0]).loader())}
    found |= {other: collect(trainer, module, Samples(images).loader()) for other, images in data.others.items()}
    logits = {part: scores.pop("logits") for part, scores in found.items()}
    torch.save(logits, options.out / f"{name}-{seed}.pt")
    temperature = float(scaling.temperature)
    return {
        "about": plan.about,
        "epochs": plan.epochs,
        "samples": len(split[0]),
        "source": data.source,
        "parameters": sum(p.numel() for p in module.parameters()),
        "temperature": temperature,
        **quality(logits["test"], data, "before"),
        **quality(logits["test"] / temperature, data, "after T"),
        "auroc": aurocs(found, data),
        "histograms": {
            "entropy": histograms(found, data, "entropy", 1),
            "log-density": histograms(found, data, "gmm_raw", -1),
        },
    }


def run_ensemble(name: str, seeds: range, load_data: Callable[[], Data], options: Namespace) -> dict[str, Any]:
    """The entropy and the mutual information of several networks."""
    members = [torch.load(options.out / f"{name}-{seed}.pt", weights_only=True) for seed in seeds]
    logits = {part: torch.cat([member[part] for member in members], 1) for part in members[0]}
    names = {"ensemble entropy": "predictive_entropy", "ensemble MI": "mutual_information"}
    found = {
        part: {label: SCORES[score](values.movedim(1, 0)) for label, score in names.items()}
        for part, values in logits.items()
    }
    data = load_data()
    return {"members": len(seeds), **quality(logits["test"], data, "before"), "auroc": aurocs(found, data)}


def quality(logits: Tensor, data: Data, when: str) -> dict[str, Any]:
    """Accuracy of digits and of ambiguous samples, ECE and NLL of logits [N, Z, C]."""
    _, y, rows = data.test
    log_probs = mean_log_probs(logits.movedim(1, 0))[rows]
    probs = log_probs.exp()
    right = (probs.argmax(1) == y).double()
    ece = expected_calibration_error(probs, y, num_bins=15)
    nll = -log_probs[torch.arange(len(y)), y].double().mean()
    clean, ambiguous = right[: data.num_clean], right[data.num_clean :]
    return {
        when: {"clean": float(clean.mean()), "ambiguous": float(ambiguous.mean()), "ece": float(ece), "nll": float(nll)}
    }


def aurocs(found: dict[str, dict[str, Tensor]], data: Data) -> dict[str, dict[str, float]]:
    """By column, then by score: Dirty-MNIST against each set, ambiguous digits against FashionMNIST, and digits against ambiguous ones."""

    def separation(inside: Tensor, outside: Tensor) -> float:
        is_ood = torch.arange(len(inside) + len(outside)) >= len(inside)
        return float(auroc(torch.cat([inside, outside]), is_ood))

    labels, n = list(found["test"]), data.num_clean
    test = found["test"]
    columns = {
        name: {label: separation(test[label][data.test[2]], found[name][label]) for label in labels}
        for name in OOD_SETS
    }
    columns["ambiguous against fashion"] = {
        label: separation(test[label][n:], found["fashion"][label]) for label in labels
    }
    columns["digits against ambiguous"] = {label: separation(test[label][:n], test[label][n:]) for label in labels}
    return columns


def histograms(found: dict[str, dict[str, Tensor]], data: Data, label: str, sign: int) -> dict[str, Any]:
    """Shares of 40 bins, for digits, ambiguous digits and FashionMNIST.

    The first bin also holds all that is below: a log-density has no lower bound, so the bins begin at the lower quartile of FashionMNIST.
    """
    test, outside = sign * found["test"][label], sign * found["fashion"][label]
    both = torch.cat([test, outside])
    low = float(both.min() if sign > 0 else outside.quantile(0.25))
    edges = torch.linspace(low, float(both.max()), 41, dtype=torch.float64)
    parts = {"MNIST": test[: data.num_clean], "ambiguous digits": test[data.num_clean :], "FashionMNIST": outside}
    shares = {name: (torch.histogram(x.clamp(low), edges).hist / len(x)).tolist() for name, x in parts.items()}
    return {"edges": edges.tolist(), "shares": shares}


def by_network(results: Mapping[str, Any]) -> dict[str, tuple[list[Any], list[Any]]]:
    """The results of single networks and of ensembles, by network."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for job, result in results.items():
        found.setdefault(job.split("-")[0], ([], []))["members" in result].append(result)
    return found


def table(results: Mapping[str, Any]) -> str:
    """What was trained, and the AUROCs of each network."""

    def cell(values: list[float], scale: float = 100, digits: int = 2) -> str:
        return "".join(mean_and_error([scale * value for value in values], digits))

    head = ["network", "parameters", "samples", "epochs", "seeds", "accuracy, digits", "accuracy, ambiguous", "ECE"]
    networks = by_network(results).values()
    rows = []
    for single, ensembles in networks:
        first = single[0]
        sizes = [f"{first['parameters']:,}", f"{first['samples']:,}", str(first["epochs"])]
        after = [cell([run["after T"]["ece"] for run in single]), cell([run["temperature"] for run in single], 1)]
        for runs, begin, end in (
            (single, [first["about"], *sizes], after),
            (ensembles, ["its ensemble", "", "", ""], ["", ""]),
        ):
            if runs:
                before = [cell([run["before"][key] for run in runs]) for key in ("clean", "ambiguous", "ece")]
                rows.append([*begin, str(len(runs)), *before, *end])
    lines = markdown([*head, "ECE after T", "T"], rows)
    columns = {
        **OOD_SETS,
        "ambiguous against fashion": "ambiguous digits against FashionMNIST",
        "digits against ambiguous": "digits against ambiguous digits",
    }
    for single, ensembles in networks:
        rows = [
            [label, *(cell([run["auroc"][key][label] for run in runs], 1, 3) for key in columns)]
            for runs in filter(None, (single, ensembles))
            for label in runs[0]["auroc"]["fashion"]
        ]
        lines += markdown([f"{single[0]['about']}: AUROC", *columns.values()], rows)
    return "\n".join(lines).strip()


def jobs(options: Namespace) -> dict[str, Any]:
    """One for each network and seed, the networks in turn, then one for each ensemble."""
    names = options.networks.split(",")
    if unknown := set(names) - FULL.keys():
        raise SystemExit(f"--networks: unknown {', '.join(sorted(unknown))}. The networks are {', '.join(FULL)}.")
    data = cache(partial(load, options.root))
    found = {
        f"{name}-{seed}": partial(run, name, seed, data, options) for seed in range(options.seeds) for name in names
    }
    for first in range(0, options.seeds - options.members + 1, options.members):
        seeds = range(first, first + options.members)
        found |= {f"{name}-from{first}": partial(run_ensemble, name, seeds, data, options) for name in names}
    return found


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--networks", default=",".join(FULL), help="names with commas between them")
    parser.add_argument("--seeds", type=int, default=5, help="networks of each kind")
    parser.add_argument("--members", type=int, default=5, help="networks in an ensemble")
    parser.add_argument(
        "--full", action="store_true", default=torch.cuda.is_available(), help="all samples and channels, 100 epochs"
    )
    reproduce("ddu", parser, jobs, table, settings=("members", "full"), about=__doc__)

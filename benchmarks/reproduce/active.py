"""Active learning by Deep Deterministic Uncertainty (arXiv 2102.11582): which digits to label next, on MNIST and on Dirty-MNIST.

    python benchmarks/reproduce/active.py --root DATA --out FOLDER [--data mnist,dirty_mnist] [--seeds 5] [--budget MINUTES] [--publish]

The experiment is that of `lightning-uq active`. Twenty digits are labelled, two of each class. A new network is trained on the labelled
samples, and of the unlabelled ones those with the highest score are labelled next, until 300 are. The accuracy is that on MNIST's test
images. Scores: random numbers, the entropy of one network, minus the log-density of one network's features (a Gaussian per class), and the entropy
and the mutual information of five networks. The pool of ``mnist`` has 54,000 digits. That of ``dirty_mnist`` has 1,000 digits and 54,000 ambiguous
samples, of which ten share an image: the published ones where their files lie under DATA, else generated ones (DirtyMNISTDataModule).

The paper labels 5 samples at a time (``--step 5``), draws 5,056 samples per epoch (``--samples 5056``), and its network is a ResNet-18. Here it
is a LeNet, without weight decay. As in the paper: 20 epochs of Adam with a learning rate of 1e-3, batches of 64, the weights of the last step.

One JSON file per data, seed and score, and one per round. Files that exist are not made again, so a stopped run continues when it is called again. The
scores of one network come first, for all seeds: an ensemble costs four times as much.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from results import markdown, reproduce

from lightning_uq.compare.active import ActiveConfiguration, ActiveTraining, run_active
from lightning_uq.functional.standard_error import standard_error

SINGLE = {
    "random": "random@softmax",
    "softmax entropy": "predictive_entropy@softmax",
    "density": "log_density@ddu",
}
ENSEMBLES = {
    "ensemble entropy": "predictive_entropy@ensemble",
    "ensemble MI": "mutual_information@ensemble",
}
SCORES = SINGLE | ENSEMBLES
"""Scores of `lightning-uq active` by their name on the page."""
DATA = {"mnist": "MNIST", "dirty_mnist": "Dirty-MNIST"}
METRICS = {"mnist": ("accuracy",), "dirty_mnist": ("accuracy", "ambiguous")}
TITLES = {"accuracy": "accuracy, %", "ambiguous": "share of ambiguous samples, %"}


def run(name: str, seed: int, label: str, options: Namespace) -> dict[str, Any]:
    """Label with one score: after each training the number of labels, the accuracy, and for Dirty-MNIST the share of ambiguous samples."""
    configuration = ActiveConfiguration(
        name,
        (SCORES[label],),
        seeds=1,
        seed=seed,
        num=options.step,
        until=options.labels,
        training=ActiveTraining(options.epochs, options.samples),
        root=str(options.root),
    )
    found = run_active(configuration, options.out / name, resume=True)
    curves = {metric: found.curve(SCORES[label], metric)[0].tolist() for metric in METRICS[name]}
    return {"notes": list(found.notes), "labels": found.labels, **curves}


def by_score(results: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """The results of all seeds by data and score."""
    found: dict[str, dict[str, list[Any]]] = {}
    for job, result in results.items():
        name, _, label = job.split("-")
        found.setdefault(name, {}).setdefault(label, []).append(result)
    return found


def over_seeds(runs: list[Any], key: str) -> list[tuple[float, float | None]]:
    """The mean and its standard error in per cent, after each training; one run has no error."""
    columns = [[100 * value for value in column] for column in zip(*(run[key] for run in runs), strict=True)]
    return [(mean(column), standard_error(column)) for column in columns]


def table(results: Mapping[str, Any]) -> str:
    """Accuracies over the number of labels, then the share of ambiguous samples."""
    lines: list[str] = []
    for name, scores in by_score(results).items():
        first = next(iter(scores.values()))[0]
        for key in METRICS[name]:
            rows = []
            for label, runs in scores.items():
                cells = [
                    f"{centre:.1f}" + ("" if error is None else f" ±{error:.1f}")
                    for centre, error in over_seeds(runs, key)
                ]
                rows.append([label, str(len(runs)), *cells])
            head = [f"{DATA[name]}: {TITLES[key]}", "seeds", *(f"{labels} labels" for labels in first["labels"])]
            lines += markdown(head, rows)
    return "\n".join(lines).strip()


def jobs(options: Namespace) -> dict[str, Any]:
    """One for each data, seed and score."""
    names = options.data.split(",")
    if unknown := set(names) - DATA.keys():
        raise SystemExit(f"--data: unknown {', '.join(sorted(unknown))}. The data are {', '.join(DATA)}.")
    return {
        f"{name}-{seed}-{label}": partial(run, name, seed, label, options)
        for labels in (SINGLE, ENSEMBLES)
        for seed in range(options.seeds)
        for name in names
        for label in labels
    }


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", default=",".join(DATA), help="mnist, dirty_mnist, or both with a comma between them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=300, help="labels after which a run ends")
    parser.add_argument("--step", type=int, default=40, help="samples labelled at a time; the paper's are 5")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=640, help="drawn in an epoch; the paper's are 5,056")
    settings = ("labels", "step", "epochs", "samples")
    reproduce("active", parser, jobs, table, settings=settings, about=__doc__)

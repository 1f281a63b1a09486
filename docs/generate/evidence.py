"""One sentence per method on what ``benchmarks/reproduce/published/`` found on published data."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "reproduce" / "published"


def of(name: str) -> str:
    """The sentence on a method; empty where no published data were tried."""
    make = {
        "ensemble": lambda: _uci("ensemble"),
        "dropout": lambda: _uci("dropout"),
        "evidential": lambda: _uci("evidential"),
        "laplace": lambda: _uci("laplace"),
        "bayes_by_backprop": lambda: _testbed("Bayes by backprop"),
        "ensemble_prior": lambda: _testbed("ensemble+, 10"),
        "epinet": lambda: _testbed("epinet"),
        "hypermodel": lambda: _testbed("hypermodel"),
        "temperature": _temperature,
        "conformal": lambda: _coverage("absolute"),
        "conformal_quantile": lambda: _coverage("cqr"),
        "ddu": lambda: _mnist("resnet18_sn", "gmm_raw"),
        "density": lambda: _cifar("gmm_combined"),
        "knn": lambda: _cifar("knn"),
        "vim": lambda: _cifar("vim"),
        "energy": lambda: _cifar("energy"),
        "relative_mahalanobis": lambda: _cifar("relative_mahalanobis"),
    }.get(name)
    return make() if make else ""


@functools.cache
def _results(name: str) -> dict[str, dict]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())["results"]


def _by_set(runs: Iterable[str]) -> dict[str, list[str]]:
    """The runs of each data set: "yacht-0" is a run of "yacht"."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(run.rsplit("-", 1)[0], []).append(run)
    return found


def _uci(method: str) -> str:
    results = _results("uci")
    lower = []
    for runs in _by_set(results).values():  # the runs of a set are of a method or two each, over the same splits
        splits = [split for run in runs for split in results[run]["splits"]]
        own, single = ([split[m]["nll"] for split in splits if m in split] for m in (method, "single"))
        gain = [one - other for one, other in zip(single, own, strict=True)]
        lower.append(fmean(gain) > 2 * stdev(gain) / len(gain) ** 0.5)
    return f"UCI regression: mean NLL below one network's by more than two standard errors on {sum(lower)} of {len(lower)} sets"


def _testbed(agent: str) -> str:
    problems = [agents for run, agents in _results("testbed").items() if not run.startswith("stored")]
    better = sum(agents[agent]["kl_tau10"] < agents["MLP"]["kl_tau10"] for agents in problems)
    return f"Neural Testbed: lower KL of ten labels than one network on {better} of {len(problems)} problems"


def _temperature() -> str:
    results = _results("calibration")
    sets = _by_set(results)
    better = sum(
        fmean(results[run]["T"]["nll"] for run in runs) < fmean(results[run]["before"]["nll"] for run in runs)
        for runs in sets.values()
    )
    return f"Saved predictions: lower mean NLL than before on {better} of {len(sets)} classifiers"


def _coverage(kind: str) -> str:
    found = [values[kind]["coverage"] for run, values in _results("conformal").items() if run.startswith("numbers-")]
    return (
        f"UCI regression: 90 % intervals cover {100 * min(found):.1f} to {100 * max(found):.1f} % on {len(found)} sets"
    )


def _mnist(network: str, score: str) -> str:
    runs = _by_set(_results("ddu"))[network]
    seeds = [
        _results("ddu")[run]["auroc"] for run in runs if run.rsplit("-", 1)[1].isdigit()
    ]  # the others are ensembles
    sets = ("fashion", "kmnist", "notmnist", "omniglot")
    better = sum(
        fmean(auroc[name][score] for auroc in seeds) > fmean(auroc[name]["entropy"] for auroc in seeds) for name in sets
    )
    return f"Digits and ambiguous digits: higher AUROC than the entropy on {better} of {len(sets)} sets of other images"


def _cifar(score: str) -> str:
    sets = _results("cifar")["plain-0"]["ood"].values()
    better = sum(scores[score]["auroc"] > scores["predictive_entropy"]["auroc"] for scores in sets)
    return f"CIFAR-10 with one small network: higher AUROC than the entropy on {better} of {len(sets)} sets of other images"

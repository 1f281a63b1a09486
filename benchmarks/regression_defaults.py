"""Choose the training and the settings of methods for regression, by the validation NLL on small UCI tables.

    python benchmarks/regression_defaults.py ROOT

``ROOT`` holds ``yacht/data.txt`` and the others of :data:`TABLES`. The result is ``regression_defaults.md`` beside this file. Seeds are from 100 on. The
comparison's own data for regression, diabetes, have no part in it. It takes about 15 minutes on one core.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lightning_uq.compare import Configuration, Recipe
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.training.monitor import find_monitor
from lightning_uq.compare.training.quiet import one_thread, quiet
from lightning_uq.compare.training.training import Progress, train
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.method import Method, Setting
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.bayes_by_backprop import BayesByBackpropModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.epinet import EpinetHead, EpinetModule
from lightning_uq.modules.evidential_regression import EvidentialRegressionModule
from lightning_uq.tasks import EvidentialRegression

TABLES = ("yacht", "energy", "concrete")
SEEDS = (100, 101)
Build = Callable[[Setting], UncertaintyModule]


def gaussian(setting: Setting) -> UncertaintyModule:
    """The plain network."""
    return DeterministicModule(setting.network, **setting.training)


def dropout(rate: float) -> Build:
    """A network with this rate of dropout."""
    return lambda setting: DropoutModule(setting.network_for(dropout=rate), **setting.training)


def bayes(kl_weight: float) -> Build:
    """A Gaussian over the weights, with this factor of the divergence."""
    return lambda setting: BayesByBackpropModule(setting.network, kl_weight=kl_weight, **setting.training)


def epinet(prior_scale: float) -> Build:
    """An epinet with this scale of its prior."""
    return lambda setting: EpinetModule(setting.network, head=EpinetHead(prior_scale=prior_scale), **setting.training)


def evidential(reg_factor: float) -> Build:
    """A normal-inverse-gamma with this weight of the regularizer."""

    def build(setting: Setting) -> UncertaintyModule:
        task = EvidentialRegression(target_scale=setting.target_scale, reg_factor=reg_factor)
        return EvidentialRegressionModule(setting.network_for(task), task=task, optimizer=setting.optimizer)

    return build


SHORT = Recipe(max_epochs=100, patience=10)
RECIPES = {
    "learning rate 2e-3, batches of 32, patience 10, 100 epochs": SHORT,
    "learning rate 1e-3": replace(SHORT, learning_rate=1e-3),
    "learning rate 5e-3": replace(SHORT, learning_rate=5e-3),
    "batches of 16": replace(SHORT, batch_size=16),
    "batches of 64": replace(SHORT, batch_size=64),
    "patience 30, 300 epochs": Recipe(max_epochs=300, patience=30),
}
SETTINGS: dict[str, dict[str, Build]] = {
    "dropout, rate": {f"{rate:g}": dropout(rate) for rate in (0.02, 0.05, 0.1)},
    "bayes_by_backprop, kl_weight": {f"{weight:g}": bayes(weight) for weight in (1.0, 0.1, 0.01)},
    "epinet, prior_scale": {f"{scale:g}": epinet(scale) for scale in (0.03, 0.1, 0.3, 1.0)},
    "evidential, reg_factor": {f"{factor:g}": evidential(factor) for factor in (0.01, 0.1, 1.0)},
}


def validation_nll(root: str, table: str, seed: int, build: Build, recipe: Recipe) -> float:
    """NLL of the validation rows at the weights that are kept, with the targets in units of the training targets' standard deviation."""
    configuration = Configuration(data=table, root=root, methods=("candidate",), seed=seed, seeds=1, recipe=recipe)
    problem = make_problem(configuration, seed)
    method = Method(name="candidate", ood_score="variance", build=build, tasks=("regression",))
    monitor = find_monitor(method, problem.setting, problem.data)
    module = train(method, [], problem, seed, configuration, Progress(), monitor=monitor).module
    assert isinstance(module, UncertaintyModule)
    module.return_members = True
    x, y = problem.data.dataset("val").tensors[:2]
    with torch.no_grad():
        nll = module.task.row_scores(module.predict(x), y)["nll"].mean().item()
    assert problem.setting.target_scale is not None
    (scale,) = problem.setting.target_scale[1]
    return nll - math.log(scale)


def line(root: str, name: str, build: Build, recipe: Recipe) -> str:
    """A line of a table: the mean over seeds for each data set, and over all with the standard error over seeds."""
    found = [[validation_nll(root, table, seed, build, recipe) for table in TABLES] for seed in SEEDS]
    by_table = [statistics.mean(column) for column in zip(*found, strict=True)]
    means = [statistics.mean(row) for row in found]
    cells = [name, *(f"{mean:.3f}" for mean in by_table), f"{statistics.mean(means):.3f} ± {standard_error(means):.3f}"]
    text = "| " + " | ".join(cells) + " |"
    print(text, file=sys.stderr, flush=True)
    return text


def tables(root: str, recipe: Recipe) -> list[str]:
    """The whole text: recipes with the plain network, then settings of methods under the chosen recipe."""
    head = ["| | " + " | ".join(TABLES) + " | mean |", "|---|" + "---|" * (len(TABLES) + 1)]
    lines = [
        "# Defaults for regression",
        "",
        f"Validation NLL in units of the targets' standard deviation, mean of seeds {SEEDS[0]} to {SEEDS[-1]}, by `benchmarks/regression_defaults.py`.",
        "",
        "## Training of the plain network",
        *head,
        *(line(root, name, gaussian, one) for name, one in RECIPES.items()),
    ]
    for title, builds in SETTINGS.items():
        lines += ["", f"## {title}", *head, *(line(root, name, build, recipe) for name, build in builds.items())]
    return lines


if __name__ == "__main__":
    with quiet(), one_thread():
        text = tables(sys.argv[1], Recipe())
    Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n")

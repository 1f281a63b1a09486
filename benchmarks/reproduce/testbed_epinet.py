"""Why the testbed's epinet has a low accuracy where d = n = 100 and T = 0.01: one setting changed at a time.

    python benchmarks/reproduce/testbed_epinet.py --out FOLDER [--problems 4] [--steps 1000] [--budget MINUTES] [--publish]

The problems are the first generated ones (seeds 0, 1, ...) whose rarer label has at least a quarter of the training rows: on the others,
one constant label is nearly right. `gap at z = 0` is the standard deviation, over test inputs, of the difference of the two logits at the
index 0, where the prior is 0: how much the trained network depends on its input. Accuracies are those of the mean probabilities of 100
and 1,000 indices, and of 500 indices with their negatives, between which the prior's first-order effect cancels.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import seed_everything
from recipe import quiet_trainer
from results import markdown, reproduce

from lightning_uq import EpinetModule, UncertaintyModule
from lightning_uq.compare.testbed import (
    AGENTS,
    accuracy_and_calibration,
    agent_setting,
    divergences,
    epinet_for_testbed,
)
from lightning_uq.data import TestbedDataModule, classification_problem, save_problem
from lightning_uq.networks.epinet.head import EpinetHead

D = N = 100
T = 0.01
COLUMNS = {"acc_100": "100", "acc_1000": "1,000", "acc_pairs": "500 pairs"}
PUBLISHED_AGENT = {"decay": 0.4, "prior": 0.3 / T, "hidden": 15, "rate": 1e-3, "steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "epinet, as published": {},
    "half the L2 term (the MLP's)": {"decay": 2 * math.sqrt(T)},
    "a tenth of it": {"decay": 0.04},
    "a third of the prior": {"prior": 10.0},
    "a tenth of the prior": {"prior": 3.0},
    "a tenth of both": {"prior": 3.0, "decay": 0.04},
    "three times the steps": {"steps": 3},
    "three times the learning rate": {"rate": 3e-3},
    "hidden layers of 50": {"hidden": 50},
}


def make_epinet(decay: float, prior: float, hidden: int, rate: float, steps: int) -> EpinetModule:
    """The testbed's epinet with some of its settings replaced; Adam's decay is twice the factor of the L2 term."""
    head = EpinetHead(
        index_dim=8,
        hidden_sizes=[hidden, hidden],
        prior_scale=0.0,
        additive_prior_scale=prior,
        standardize_features=False,
        calibrate_prior=False,
    )
    optimizer = partial(torch.optim.Adam, lr=rate, weight_decay=decay)
    return epinet_for_testbed(D, 2, N, T, head=head, optimizer=optimizer)


def measure(module: UncertaintyModule, data: TestbedDataModule, epochs: int) -> dict[str, float]:
    """Train, and take the accuracies and divergences."""
    trainer = quiet_trainer(accelerator="cpu", limit_val_batches=0, max_epochs=epochs)
    trainer.fit(module, datamodule=data)
    found = divergences(module, data)
    for number in (100, 1000):
        values = accuracy_and_calibration(module, data, num_indices=number)
        found[f"acc_{number}"], found["acc_train"] = values["test_acc"], values["train_acc"]
    if isinstance(module, EpinetModule):
        x, y = data.dataset("test").tensors
        with torch.inference_mode():
            gap = module.network(x, torch.zeros(1, 8))[0].diff(dim=1)
            z = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
            probs = torch.cat([module.network(x, part).double().softmax(-1) for part in torch.cat([z, -z]).split(50)])
        found["gap"] = float(gap.std())
        found["acc_pairs"] = float((probs.mean(0).argmax(1) == y).double().mean())
    return found


def run(seed: int, steps: int) -> dict[str, Any]:
    """The MLP and every variant on one problem."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(classification_problem(D, N, T, seed=seed), path)
        data = TestbedDataModule(str(path), num_steps=steps)
        seed_everything(0, verbose=False)
        found = {"MLP": measure(AGENTS["softmax"].build(agent_setting(data, 1e-3)), data, 1)}
        for name, changes in VARIANTS.items():
            settings = PUBLISHED_AGENT | changes
            seed_everything(0, verbose=False)
            found[name] = measure(make_epinet(**settings), data, settings["steps"])
    return found


def is_mixed(seed: int) -> bool:
    """Whether the rarer label has at least a quarter of the training rows."""
    share = float(classification_problem(D, N, T, num_test=1, seed=seed)["y_train"].mean())
    return 0.25 <= share <= 0.75


def jobs(options: Namespace) -> dict[str, Any]:
    """One per problem."""
    mixed = filter(is_mixed, range(10 * options.problems))
    seeds = [seed for seed, _ in zip(mixed, range(options.problems), strict=False)]
    return {f"problem-{seed}": partial(run, seed, options.steps) for seed in seeds}


def table(results: Mapping[str, Any]) -> str:
    """Means over the problems, the gap on each, and the accuracies on the first one."""
    problems = list(results.values())
    first = next(iter(results)).replace("-", " ")
    gap = "gap at z = 0, problems " + ", ".join(name.removeprefix("problem-") for name in results)
    head = ["d = n = 100, T = 0.01", "KL 1", "KL 10", gap, "on training rows"]
    head += [f"{where}, {number}" for where in ("accuracy", first) for number in COLUMNS.values()]
    return "\n".join(markdown(head, [line(problems, name) for name in ("MLP", *VARIANTS)])).strip()


def line(problems: Sequence[Any], name: str) -> list[str]:
    """A line of the table."""
    own = [problem[name] for problem in problems]

    def cell(several: Sequence[Any], key: str, form: str) -> str:
        return format(mean(one[key] for one in several), form) if key in several[0] else ""

    return [
        name,
        cell(own, "kl_tau1", ".2f"),
        cell(own, "kl_tau10", ".2f"),
        ", ".join(f"{one['gap']:.1f}" for one in own if "gap" in one),  # some are 0 and others are not, so no mean
        *(cell(own, key, ".3f") for key in ("acc_train", *COLUMNS)),
        *(cell(own[:1], key, ".3f") for key in COLUMNS),
    ]


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000, help="of a training")
    reproduce("testbed_epinet", parser, jobs, table, settings=("steps",), about=__doc__)

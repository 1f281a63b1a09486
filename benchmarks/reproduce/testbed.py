"""The Neural Testbed (Osband et al., NeurIPS 2022): how far agents' joint predictions are from the environment that drew their data.

    python benchmarks/reproduce/testbed.py --out FOLDER [--stored FOLDER] [--repeats 1] [--steps 1000] [--budget MINUTES] [--publish]

A repeat is 27 generated problems: d = 2, 10 and 100 inputs, 1, 10 and 100 d training points, temperatures T of 0.01, 0.1 and 0.5, each with a
teacher of its own. Test inputs are polyadic with two anchors (dyadic): ten labels belong to two inputs. The agents are those of
`lightning-uq compare --data testbed`, with the authors' hyperparameters; none was tuned here. For each: the divergence (KL, in nats) of the
joint prediction of 1 and of 10 labels from 1,000 draws and 1,000 indices, the accuracy of 100 indices, all weights (frozen priors too) and
the processor's seconds of the training.

`--stored` holds `problem_20.npz` and `problem_80.npz`, two problems of the original, on which the original's own agents were run: see REFERENCE.
"""

import dataclasses
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

from lightning.pytorch import seed_everything
from recipe import quiet_trainer
from results import markdown, mean_and_error, reproduce

from lightning_uq.compare.testbed import AGENTS, accuracy_and_calibration, agent_setting, divergences, num_epochs
from lightning_uq.compare.training.evaluation import num_weights
from lightning_uq.data import TestbedDataModule, classification_problem, save_problem

DIMENSIONS, RATIOS, TEMPERATURES = (2, 10, 100), (1, 10, 100), (0.01, 0.1, 0.5)
FIRST_SEED = 1000
ROWS = {  # name on the page: agent and number of members
    "MLP": ("softmax", 1),
    "ensemble, 10": ("ensemble", 10),
    "ensemble, 30": ("ensemble", 30),
    "ensemble+, 10": ("ensemble_prior", 10),
    "ensemble+, 30": ("ensemble_prior", 30),
    "dropout": ("dropout", 1),
    "Bayes by backprop": ("bayes_by_backprop", 1),
    "hypermodel": ("hypermodel", 1),
    "epinet": ("epinet", 1),
}
REFERENCE = {  # KL of 1 and of 10 labels of the original's agents, seed 0, measured with its code on its problems
    80: {
        "epinet": (0.112, 0.643),
        "ensemble+, 10": (0.101, 0.650),
        "ensemble+, 30": (0.104, 0.645),
        "hypermodel": (0.111, 0.678),
        "ensemble, 10": (0.105, 1.060),
        "ensemble, 30": (0.106, 1.063),
        "dropout": (0.106, 1.067),
        "MLP": (0.109, 1.090),
    },
    20: {
        "epinet": (0.108, 0.681),
        "ensemble+, 10": (0.087, 0.716),
        "ensemble+, 30": (0.069, 0.508),
        "ensemble, 10": (0.077, 0.835),
        "ensemble, 30": (0.079, 0.848),
        "MLP": (0.100, 1.090),
    },
}
SEED_SPREAD = {"epinet": 0.058, "ensemble+, 10": 0.050}
"""Standard deviation of the original's KL of 10 labels over five of its seeds, on problem 80."""

Problem = tuple[int, int, float, int]
"""d, n, T and the seed of a generated problem."""


def train_agent(row: str, path: Path, steps: int, seed: int) -> dict[str, float]:
    """What an agent gives on a stored problem."""
    name, members = ROWS[row]
    data = TestbedDataModule(str(path), seed=seed, num_steps=steps)
    setting = dataclasses.replace(agent_setting(data, learning_rate=1e-3), num_members=members)
    seed_everything(seed, verbose=False)
    module = AGENTS[name].build(setting)
    trainer = quiet_trainer(accelerator="cpu", limit_val_batches=0, max_epochs=num_epochs(name, setting))
    began = process_time()
    trainer.fit(module, datamodule=data)
    seconds = process_time() - began
    return {
        **divergences(module, data),
        **accuracy_and_calibration(module, data),
        "weights": num_weights(module.network),
        "seconds": round(seconds, 2),
    }


def run_generated(d: int, n: int, temperature: float, seed: int, steps: int) -> dict[str, Any]:
    """All agents on a problem of a teacher that nobody else sees: {row: numbers}."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(classification_problem(d, n, temperature, seed=seed), path)
        return {row: train_agent(row, path, steps, seed=0) for row in ROWS}


def run_stored(path: Path, rows: Sequence[str], steps: int, seed: int) -> dict[str, Any]:
    """Some agents on a problem of the original."""
    return {row: train_agent(row, path, steps, seed) for row in rows}


def jobs(options: Namespace) -> dict[str, Any]:
    """One per problem, in an order of which each nine have every d, every ratio and every temperature three times."""
    found: dict[str, Any] = {}
    if options.stored:
        for number, reference in REFERENCE.items():
            path = options.stored / f"problem_{number}.npz"
            found[f"stored-{number}-0"] = partial(run_stored, path, list(reference), options.steps, 0)
    seed = FIRST_SEED
    for _ in range(options.repeats):
        for shift in range(3):
            for i, d in enumerate(DIMENSIONS):
                for j, ratio in enumerate(RATIOS):
                    temperature = TEMPERATURES[(i + j + shift) % 3]
                    name = f"{d}-{ratio * d}-{temperature}-{seed}"
                    found[name] = partial(run_generated, d, ratio * d, temperature, seed, options.steps)
                    seed += 1
    if options.stored:  # more seeds of two agents, where the original's spread over seeds is known
        for more in range(1, 5):
            path = options.stored / "problem_80.npz"
            found[f"stored-80-{more}"] = partial(run_stored, path, list(SEED_SPREAD), options.steps, more)
    return found


def generated(results: Mapping[str, Any]) -> dict[Problem, Any]:
    """The results of generated problems by (d, n, T, seed)."""
    found = {}
    for job, rows in results.items():
        if not job.startswith("stored"):
            d, n, temperature, seed = job.split("-")
            found[int(d), int(n), float(temperature), int(seed)] = rows
    return found


def paired(differences: Sequence[float]) -> str:
    """The mean of differences, and its standard error."""
    error = f" ±{stdev(differences) / math.sqrt(len(differences)):.2f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.2f}{error}"


def table(results: Mapping[str, Any]) -> str:
    """Means over the generated problems; the divergence of ten labels by d, n / d and T; the stored problems."""
    found = generated(results)
    lines = [*summary(found), *by_setting(found)] if found else []
    for number in REFERENCE:
        runs = [rows for job, rows in results.items() if job.startswith(f"stored-{number}-")]
        if runs:
            lines += stored_problem(number, runs)
    return "\n".join(lines).strip()


def summary(found: Mapping[Problem, Any]) -> list[str]:
    """Each agent's means, and its difference from the epinet on the same problems."""
    head = ["agent", "weights, d = 10", "training, s", "KL 1", "KL 10", "KL 10 less the epinet's", "accuracy"]
    lines = []
    for row in ROWS:
        own = [rows[row] for rows in found.values()]
        weights = {rows[row]["weights"] for (d, _, _, _), rows in found.items() if d == 10}
        differences = [rows[row]["kl_tau10"] - rows["epinet"]["kl_tau10"] for rows in found.values()]
        numbers = [f"{mean(one[key] for one in own):.3f}" for key in ("kl_tau1", "kl_tau10", "test_acc")]
        lines.append(
            [
                row,
                "".join(f"{number:,}" for number in weights),  # one number, or none without such a problem
                f"{mean(one['seconds'] for one in own):.1f}",
                *numbers[:2],
                "" if row == "epinet" else paired(differences),
                numbers[2],
            ]
        )
    return markdown(head, lines)


def by_setting(found: Mapping[Problem, Any]) -> list[str]:
    """The mean divergence of ten labels over the problems that share d, n / d or T; the lowest is bold."""
    groups: dict[str, list[Any]] = {}
    for name, place in (("T", 2), ("d", 0), ("n / d", 1)):
        for key in sorted(found, key=lambda key: key[place] / (key[0] if place == 1 else 1)):
            value = key[1] // key[0] if place == 1 else key[place]
            groups.setdefault(f"{name} = {value}", []).append(found[key])
    lines = []
    for group, problems in groups.items():
        means = {row: mean(rows[row]["kl_tau10"] for rows in problems) for row in ROWS}
        lowest = f"{min(means.values()):.2f}"
        texts = [f"**{value:.2f}**" if f"{value:.2f}" == lowest else f"{value:.2f}" for value in means.values()]
        lines.append([group, str(len(problems)), *texts])
    return markdown(["KL 10", "problems", *ROWS], lines)


def stored_problem(number: int, runs: Sequence[Any]) -> list[str]:
    """Ours (seed 0, and the mean over seeds where there are several) beside the original's agents."""
    head = [f"problem {number}", "original: KL 1", "KL 1", "original: KL 10", "KL 10", "KL 10 over seeds"]
    lines = []
    for row, (one, ten) in REFERENCE[number].items():
        several = [rows[row]["kl_tau10"] for rows in runs if row in rows]
        first = runs[0][row]
        over = "".join(mean_and_error(several, 3)) if len(several) > 1 else ""
        lines.append([row, f"{one:.3f}", f"{first['kl_tau1']:.3f}", f"{ten:.3f}", f"{first['kl_tau10']:.3f}", over])
    return markdown(head, lines)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--stored", type=Path, help="folder of problem_20.npz and problem_80.npz")
    parser.add_argument("--repeats", type=int, default=1, help="of the 27 generated problems")
    parser.add_argument("--steps", type=int, default=1000, help="of the training; the hypermodel takes twice as many")
    reproduce("testbed", parser, jobs, table, settings=("steps",), about=__doc__)

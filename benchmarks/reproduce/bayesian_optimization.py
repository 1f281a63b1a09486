"""Bayesian optimisation with networks as BoTorch models, beside a Gaussian process:

    python benchmarks/reproduce/bayesian_optimization.py --out FOLDER [--functions branin,hartmann6] [--seeds 5] [--steps 20] [--publish]

Branin (2 inputs) and Hartmann-6 (6 inputs) are minimised from 10 points of a scrambled Sobol sequence, the same for all methods of a seed.
Each step trains a new model on all points seen and evaluates the best point of qLogEI with 128 samples, found by ``optimize_acqf`` with 4
restarts from 64 raw samples. The methods whose name ends in ``Thompson`` draw one function of the posterior instead, and evaluate the best of
2,000 Sobol points for it.

The networks have two hidden layers of 50 Tanh units and learn standardised targets for 200 steps of Adam on all points at once, learning
rate 0.01, in a plain loop, since a Trainer's start and its steps take longer than such a step; nothing was tuned. ``gp`` is BoTorch's SingleTaskGP with its own defaults, on inputs in the unit cube; ``random`` takes points at
random. The regret is the lowest value seen minus the minimum.

One JSON file per function, method and seed. Files that exist are not made again, so a stopped run continues when it is called again.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from statistics import mean, median, stdev
from typing import Any

import torch
from lightning.pytorch import seed_everything
from results import reproduce
from torch import Tensor, nn

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, EpinetModule, FitLaplace, Regression
from lightning_uq.active_learning import as_botorch_model

FUNCTIONS = {
    "branin": "Branin",
    "hartmann6": "Hartmann",
}  # names in botorch.test_functions; Hartmann's default has 6 inputs
NUM_INITIAL = 10
NUM_CANDIDATES = 2000
TRAINING_STEPS = 200


def make_network(inputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers and a mean."""
    layers: list[nn.Module] = []
    for size in (inputs, 50):
        layers += [nn.Linear(size, 50), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(50, 1))


def fit_network(method: str, X: Tensor, Y: Tensor) -> Any:
    """A BoTorch model of a network that was trained on points [N, d] of the unit cube and their values [N, 1]."""
    task = Regression(head="mean", target_scale=(float(Y.mean()), float(Y.std())))
    training: dict[str, Any] = {"task": task, "optimizer": partial(torch.optim.Adam, lr=0.01)}
    network = partial(make_network, X.shape[1])
    module = {
        "ensemble": lambda: EnsembleModule(network, num_members=10, **training),
        "epinet": lambda: EpinetModule(network(), num_eval_samples=64, **training),
        "dropout": lambda: DropoutModule(network(0.1), num_eval_samples=64, **training),
        "laplace": lambda: DeterministicModule(network(), **training),
    }[method]()
    x, y = 2 * X.float() - 1, Y.float()  # a network sees inputs from -1 to 1
    optimizer = module.configure_optimizers()
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        module.training_loss(x, y, (x, y)).backward()
        optimizer.step()
    if method == "laplace":
        FitLaplace(select="marginal_likelihood", num_samples=64).fit(module, [(x, y)])
    return module


def fit_gp(X: Tensor, Y: Tensor) -> Any:
    """BoTorch's default Gaussian process."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(X, Y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def fit_model(method: str, X: Tensor, Y: Tensor) -> Any:
    """The model of a method for points in the unit cube."""
    from botorch.models.transforms import Normalize

    if method == "gp":
        return fit_gp(X, Y)
    model = as_botorch_model(fit_network(method, X, Y))
    d = X.shape[1]
    # Normalize maps [0.5, 1] to [0, 1], and so [0, 1] to [-1, 1].
    model.input_transform = Normalize(d, bounds=torch.tensor([[0.5] * d, [1.0] * d], dtype=X.dtype))
    return model


def next_point(method: str, X: Tensor, Y: Tensor, seed: int) -> Tensor:
    """The point [1, d] of the unit cube to evaluate next; the largest value is wanted."""
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.generation import MaxPosteriorSampling
    from botorch.optim import optimize_acqf
    from botorch.sampling.get_sampler import get_sampler

    d = X.shape[1]
    if method == "random":
        return torch.rand(1, d, dtype=X.dtype)
    name, _, acquired_by = method.partition(" ")
    model = fit_model(name, X, Y)
    if acquired_by == "Thompson":
        candidates = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(NUM_CANDIDATES, dtype=X.dtype)
        return MaxPosteriorSampling(model)(candidates, num_samples=1)
    sampler = get_sampler(model.posterior(X[:1]), torch.Size([128]), seed=seed)
    acquisition = qLogExpectedImprovement(model, best_f=Y.max(), sampler=sampler)
    bounds = torch.stack([torch.zeros(d, dtype=X.dtype), torch.ones(d, dtype=X.dtype)])
    point, _ = optimize_acqf(
        acquisition, bounds, q=1, num_restarts=4, raw_samples=64, options={"maxiter": 50, "seed": seed}
    )
    return point


def run(function: str, method: str, seed: int, steps: int) -> dict[str, Any]:
    """The regret after the first points and after each step."""
    import botorch.test_functions

    problem = getattr(botorch.test_functions, FUNCTIONS[function])(negate=True).double()
    low, high = problem.bounds
    seed_everything(seed, verbose=False)
    X = torch.quasirandom.SobolEngine(problem.dim, scramble=True, seed=seed).draw(NUM_INITIAL, dtype=torch.float64)
    evaluate: Callable[[Tensor], Tensor] = lambda x: problem(low + (high - low) * x).unsqueeze(-1)  # noqa: E731
    Y = evaluate(X)
    regret = [float(problem.optimal_value - Y.max())]
    for step in range(steps):
        point = next_point(method, X, Y, seed=1000 * seed + step)
        X, Y = torch.cat([X, point.detach()]), torch.cat([Y, evaluate(point.detach())])
        regret.append(float(problem.optimal_value - Y.max()))
    return {"regret": regret}


def table(results: Mapping[str, Any]) -> str:
    """Regret after the last step: the mean and its standard error over seeds, and the median."""
    found: dict[tuple[str, str], list[float]] = {}
    for job, result in results.items():
        function, method, _ = job.split("-")
        found.setdefault((function, method), []).append(result["regret"][-1])
    functions = list(dict.fromkeys(function for function, _ in found))
    head = ["method", *(f"{name}: {what}" for name in functions for what in ("mean", "median"))]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for method in dict.fromkeys(method for _, method in found):
        cells = []
        for function in functions:
            values = found.get((function, method), [])
            error = f" ±{stdev(values) / sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells += [f"{mean(values):.3f}{error}", f"{median(values):.3f}"] if values else ["", ""]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    seeds = sorted({len(values) for values in found.values()})
    return "\n".join([*lines, "", f"Seeds per row: {', '.join(map(str, seeds))}."])


METHODS = (
    "random",
    "gp",
    "ensemble",
    "epinet",
    "dropout",
    "laplace",
    "gp Thompson",
    "ensemble Thompson",
    "epinet Thompson",
)


def jobs(options: Namespace) -> dict[str, Any]:
    """One per function, method and seed, all methods of a seed in turn."""
    names, methods = options.functions.split(","), options.methods.split(",")
    if unknown := set(names) - FUNCTIONS.keys():
        raise SystemExit(
            f"--functions: unknown {', '.join(sorted(unknown))}. The functions are {', '.join(FUNCTIONS)}."
        )
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"--methods: unknown {', '.join(sorted(unknown))}. The methods are {', '.join(METHODS)}.")
    return {
        f"{name}-{method}-{seed}": partial(run, name, method, seed, options.steps)
        for seed in range(options.seeds)
        for name in names
        for method in methods
    }


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--functions", default=",".join(FUNCTIONS), help="names, with commas between them")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas between them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="points evaluated after the first ten")
    reproduce("bayesian_optimization", parser, jobs, table, settings=("steps",), about=__doc__)

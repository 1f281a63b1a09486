"""Cost of fitting and scoring the feature density, against the original's schedule. Run on one thread:

    OMP_NUM_THREADS=1 python benchmarks/gmm.py [--part fit|score|memory] [--quick]

The original tries 310 jitters, from 0 over 1e-308 to 0.1, and factors every class at each (Mukhoti et al., CVPR 2023). That
loop is written anew here from its description, for this comparison alone.
"""

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.networks.density import GaussianDensity


def rows(number: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around class means, in float32 as a network gives them."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(number) % classes
    return centers[labels] + torch.randn(number, features, generator=generator), labels


def original_schedule(x: Tensor, y: Tensor, classes: int) -> tuple[MultivariateNormal, float, int]:
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    centered = [x[y == c] - means[c] for c in range(classes)]
    covariances = torch.stack([part.T @ part / (len(part) - 1) for part in centered])
    jitters = [0, torch.finfo(torch.double).tiny, *(10**exponent for exponent in range(-308, 0))]
    for attempt, jitter in enumerate(jitters, 1):
        ridge = jitter * torch.eye(x.shape[1]).unsqueeze(0)  # float32: most of these are zero
        try:
            return MultivariateNormal(means, covariances + ridge, validate_args=False), jitter, attempt
        except torch.linalg.LinAlgError:
            continue
    raise RuntimeError("No jitter made every covariance positive definite.")


def cpu_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def fit_speed(quick: bool) -> dict[str, float]:
    number, features, classes = (2000, 256, 10) if quick else (4000, 512, 10)
    x, y = rows(number, features, classes)
    start = time.process_time()
    _, jitter, attempts = original_schedule(x, y, classes)
    original = time.process_time() - start
    result = {"original_s": original, "original_attempts": attempts, "original_jitter": jitter}
    for regularization in ("ddu", "oas"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds = cpu_seconds(
                lambda r=regularization: GaussianDensity.fit_features(x, y, regularization=r)  # type: ignore[misc]
            )
        result |= {f"{regularization}_s": seconds, f"{regularization}_speedup": original / seconds}
    return result


def score_speed(quick: bool) -> dict[str, float]:
    number, features, classes = (4000, 256, 10) if quick else (50_000, 512, 10)
    x, y = rows(20 * features, features, classes)
    density = GaussianDensity.fit_features(x, y)
    single = GaussianDensity.fit_features(x, y, dtype=torch.float32)
    test, _ = rows(number, features, classes, seed=2)
    factors = torch.linalg.inv(density.whitening)

    def triangular() -> Tensor:
        columns = []
        for mean, factor, log_det in zip(density.mean, factors, density.log_det, strict=True):
            white = torch.linalg.solve_triangular(factor, (test.double() - mean).T, upper=False)
            columns.append(-0.5 * (white.square().sum(0) + log_det + features * torch.tensor(2 * torch.pi).log()))
        return torch.stack(columns, 1).logsumexp(1)

    seconds = {
        "triangular64_s": cpu_seconds(triangular, 1),
        "product64_s": cpu_seconds(lambda: density.log_density(test), 1),
        "product32_s": cpu_seconds(lambda: single.log_density(test), 2),
    }
    error = (single.log_density(test) - density.log_density(test)).abs().max()
    return {
        **seconds,
        "speedup32": seconds["triangular64_s"] / seconds["product32_s"],
        "speedup64": seconds["triangular64_s"] / seconds["product64_s"],
        "max_abs_error32": float(error),
        "median_log_density": float(density.log_density(test).median()),
    }


def high_water_mark() -> float:
    """Largest resident size of this process in MB; getrusage would give a child its parent's. Linux alone has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _peak(number: int, features: int, classes: int, connection: "multiprocessing.connection.Connection") -> None:
    before = high_water_mark()
    statistics = ClassStatistics(classes, features)
    for start in range(0, number, 128):  # batches are made as they are needed, as a loader does
        statistics.update(*rows(min(128, number - start), features, classes, seed=start))
    GaussianDensity(fit_gaussian(statistics))
    connection.send(high_water_mark() - before)


def peak_memory(quick: bool) -> dict[str, float]:
    features, classes = (64, 10) if quick else (512, 10)
    context = multiprocessing.get_context("spawn")
    result = {"scatter_mb": 8 * classes * features**2 / 2**20}
    for number in (1000, 10_000) if quick else (10_000, 100_000):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(number, features, classes, sender))
        process.start()
        result[f"peak_mb_{number}"] = receiver.recv()
        process.join()
    return result


PARTS = {"fit": fit_speed, "score": score_speed, "memory": peak_memory}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Cost of the feature density.")
    parser.add_argument("--part", choices=sorted(PARTS), action="append", help="what to measure; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for part in options.part or PARTS:
        print(json.dumps({"part": part, **PARTS[part](options.quick)}))


if __name__ == "__main__":
    main(sys.argv[1:])

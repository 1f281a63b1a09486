"""How often intervals for the difference of two methods contain it: a simulation.

    python -m benchmarks.seed_differences [--repetitions 2000] > benchmarks/seed_differences.md

Differences of losses are d_si = a_s + b_i + e_si for seeds s and test rows i. Their variances are named by the parts that they give one seed's mean
over N rows: ``2 : 1 : 9`` is Var(a) = 2 / N, Var(b) = 1 and Var(e) = 9.
"""

import argparse
import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.seed_differences_metrics import CALIBRATION_ALONE, METHODS, METRICS, metric_coverage
from benchmarks.seed_differences_rows import few_rows
from lightning_uq.functional.best_method import best_method
from lightning_uq.functional.half_widths import MIN_SEEDS, crossed_half_width, seed_half_width
from lightning_uq.functional.paired_difference import paired_difference

LEVEL = 0.95
PARTS = {
    "0 : 1 : 0.2": (0, 1, 0.2),
    "0 : 1 : 9": (0, 1, 9),
    "2 : 1 : 1": (2, 1, 1),
    "5 : 1 : 9": (5, 1, 9),
    "20 : 1 : 1": (20, 1, 1),
}
TAILS = ("Gaussian", "t3", "lognormal")
ROWS = (200, 1000)
SEEDS = (3, 5, 10)
CHUNK = 500
ERRORS = "0/1 errors"


def noise(tails: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Numbers with mean 0 and variance 1: Gaussian, Student-t with 3 degrees of freedom, or log-normal (skewness 6.2)."""
    z = torch.randn(shape, generator=draw, dtype=torch.float64)
    if tails == "t3":
        squares = sum(torch.randn(shape, generator=draw, dtype=torch.float64).square() for _ in range(3))
        return z / squares.sqrt()
    if tails == "lognormal":
        return (z.exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    return z


def draw_differences(
    parts: tuple[float, float, float],
    tails: str,
    repetitions: int,
    num_seeds: int,
    num_rows: int,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Differences [T, S, N] whose expectation is 0, and their expectation given the networks, [T, S]."""
    seeds, rows, both = parts
    a = math.sqrt(seeds / num_rows) * torch.randn(repetitions, num_seeds, generator=draw, dtype=torch.float64)
    b = math.sqrt(rows) * noise(tails, (repetitions, 1, num_rows), draw)
    e = math.sqrt(both) * noise(tails, (repetitions, num_seeds, num_rows), draw)
    return a[..., None] + b + e, a


def draw_errors(repetitions: int, num_seeds: int, num_rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same for errors of two methods that are wrong on 12 % and 8 % of rows: where the sum of row, seed and noise is above a threshold."""
    rows = math.sqrt(0.8) * torch.randn(repetitions, 1, num_rows, generator=draw, dtype=torch.float64)
    seed_variance, found, means = 2 / num_rows, [], []
    for rate in (0.12, 0.08):
        a = math.sqrt(seed_variance) * torch.randn(repetitions, num_seeds, generator=draw, dtype=torch.float64)
        e = math.sqrt(0.2 - seed_variance) * torch.randn(
            repetitions, num_seeds, num_rows, generator=draw, dtype=torch.float64
        )
        threshold = -torch.special.ndtri(torch.tensor(rate, dtype=torch.float64))
        found.append((a[..., None] + rows + e > threshold).double())
        means.append(torch.special.ndtr((a - threshold) / math.sqrt(1 - seed_variance)))
    return found[0] - found[1] - 0.04, means[0] - means[1] - 0.04


def own_coverage(differences: Tensor, network_means: Tensor, bound: float | None = None) -> Tensor:
    """Whether the interval of :func:`paired_difference` contains the expectation, [T]: below 5 seeds that of these networks."""
    expected = network_means.mean(1) if differences.shape[1] < MIN_SEEDS else 0
    return (differences.mean((1, 2)) - expected).abs() <= crossed_half_width(differences, LEVEL, bound)


def resampling(num: int, size: int, draw: torch.Generator) -> Tensor:
    """Weights [R, size] of resamples, which sum to 1."""
    drawn = torch.randint(size, (num, size), generator=draw)
    return torch.zeros(num, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / size, dtype=torch.float64)
    )


def others_coverage(differences: Tensor, draw: torch.Generator, resamples: int = 500) -> dict[str, Tensor]:
    """Whether other intervals contain 0, [T] each: percentile bootstraps over rows, over seeds and over both, and a t interval over seeds."""
    _, num_seeds, num_rows = differences.shape
    by_rows = differences @ resampling(resamples, num_rows, draw).T  # [T, S, R]
    seeds = resampling(resamples, num_seeds, draw)
    means = differences.mean(2)
    values = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = {}
    replicates = {
        "bootstrap, rows": by_rows.mean(1),
        "bootstrap, seeds": means @ seeds.T,
        "bootstrap, both": (by_rows * seeds.T).sum(1),
    }
    for name, replicate in replicates.items():
        low, high = replicate.quantile(values, dim=1)
        found[name] = (low <= 0) & (high >= 0)
    t = means.mean(1).abs() / (means.std(1) / math.sqrt(num_seeds))
    quantile = {3: 4.302653, 5: 2.776445, 10: 2.262157}[num_seeds]
    return {**found, "t, seeds": t <= quantile}


def share(flags: Tensor) -> str:
    """A share in percent, with its standard error."""
    p = float(flags.double().mean())
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / len(flags)):.1f}"


def crossed(repetitions: int) -> None:
    """The table of one test set for all seeds."""
    print("\n## One test set for all seeds")
    print(
        "| losses | seeds : rows : both | rows | seeds | paired_difference | bootstrap, rows | bootstrap, seeds | bootstrap, both | t, seeds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [(tails, name, partial(draw_differences, parts, tails)) for tails in TAILS for name, parts in PARTS.items()]
    for tails, name, make in [*cases, (ERRORS, "", draw_errors)]:
        for num_rows in ROWS:
            for num_seeds in SEEDS:
                draw, columns = torch.Generator().manual_seed(num_seeds), {}
                for start in range(0, repetitions, CHUNK):
                    differences, means = make(min(CHUNK, repetitions - start), num_seeds, num_rows, draw)
                    found = {
                        "": own_coverage(differences, means, 1.0 if tails == ERRORS else None),
                        **others_coverage(differences, draw),
                    }
                    for column, flags in found.items():
                        columns.setdefault(column, []).append(flags)
                cells = " | ".join(share(torch.cat(flags)) for flags in columns.values())
                print(f"| {tails} | {name} | {num_rows} | {num_seeds} | {cells} |", flush=True)


PAIRS = {"zero and least squares": (1e12, 0.0), "ridge and least squares": (10.0, 0.0)}


def draw_resplits(
    ridges: tuple[float, float], repetitions: int, num_seeds: int, num_train: int, num_test: int, draw: torch.Generator
) -> Tensor:
    """Differences [T, S, N] of the squared errors of two ridge regressions with five inputs, on random splits of T data sets."""
    num, dims = num_train + num_test, 5
    x = torch.randn(repetitions, num, dims, generator=draw, dtype=torch.float64)
    y = 0.3 * x.sum(2, keepdim=True) + torch.randn(repetitions, num, 1, generator=draw, dtype=torch.float64)
    differences = []
    for _ in range(num_seeds):
        order = torch.rand(repetitions, num, 1, generator=draw).argsort(1)
        x_s, y_s = x.gather(1, order.expand(-1, -1, dims)), y.gather(1, order)
        x_train, y_train = x_s[:, :num_train], y_s[:, :num_train]
        losses = []
        for ridge in ridges:
            gram = x_train.mT @ x_train + ridge * torch.eye(dims, dtype=torch.float64)
            fitted = torch.linalg.solve(gram, x_train.mT @ y_train)
            losses.append((x_s[:, num_train:] @ fitted - y_s[:, num_train:]).square()[..., 0])
        differences.append(losses[0] - losses[1])
    return torch.stack(differences, 1)


def resplit_coverage(differences: Tensor, num_train: int) -> tuple[Tensor, Tensor]:
    """Whether the corrected t interval, and the plain one over seeds, contain the expectation over data sets, [T] each."""
    _, num_seeds, num_test = differences.shape
    means = differences.mean(2)
    errors = (means.mean(1) - means.mean()).abs()
    shares = (1 / num_seeds + num_test / num_train, 1 / num_seeds)
    corrected, plain = (errors <= seed_half_width(means, LEVEL, share) for share in shares)
    return corrected, plain


def resplits(repetitions: int) -> None:
    """The table of a split per seed."""
    print("\n## A new split for each seed")
    print("| regressions | training rows | test rows | seeds | paired_difference | t, seeds |")
    print("|---|---|---|---|---|---|")
    for name, ridges in PAIRS.items():
        for num_train, num_test in ((90, 10), (80, 20), (200, 100)):
            for num_seeds in (5, 10, 30):
                draw = torch.Generator().manual_seed(num_seeds)
                flags = resplit_coverage(
                    draw_resplits(ridges, repetitions, num_seeds, num_train, num_test, draw), num_train
                )
                print(
                    f"| {name} | {num_train} | {num_test} | {num_seeds} | {share(flags[0])} | {share(flags[1])} |",
                    flush=True,
                )


def metrics(repetitions: int, num_test: int = 200) -> None:
    """The table of metrics of linear regressions."""
    print(f"\n## Metrics of linear regressions by `metric_difference`, {num_test} test rows")
    print(
        "| each seed has | regressions | metric | 3 seeds, rows only | 5 seeds | 10 seeds |\n|---|---|---|---|---|---|"
    )
    for resplit in (False, True):
        for pair in METHODS:
            for metric in METRICS:
                if pair == CALIBRATION_ALONE and not metric.startswith("ece"):
                    continue
                cells = [
                    share(metric_coverage(metric, pair, repetitions, num_seeds, num_test, resplit=resplit)[0])
                    for num_seeds in SEEDS
                ]
                kind = "a split" if resplit else "the same rows"
                print(f"| {kind} | {pair} | {metric} | {' | '.join(cells)} |", flush=True)


def best_is_kept(
    repetitions: int, num_methods: int, gap: float, num_seeds: int, num_rows: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Whether the best of several methods is the best of the data or tied with it, [T], and how many others are. The others are worse by ``gap``."""
    kept, others = [], []
    for _ in range(repetitions):
        rows = torch.randn(num_rows, generator=draw)
        losses = {
            str(k): rows
            + gap * (k > 0)
            + 0.1 * torch.randn(num_seeds, 1, generator=draw)
            + torch.randn(num_rows, generator=draw)
            + torch.randn(num_seeds, num_rows, generator=draw)
            for k in range(num_methods)
        }
        best = best_method(losses, level=LEVEL, difference=paired_difference)
        candidates = {best.name, *best.tied}
        kept.append("0" in candidates)
        others.append(len(candidates - {"0"}))
    return torch.tensor(kept), torch.tensor(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    print("# Intervals for differences between methods: coverage\n")
    print(
        f"`python -m benchmarks.seed_differences`: how often {100 * LEVEL:.0f} % intervals contain the difference, in percent ± standard error,"
    )
    print(
        f"over {repetitions:,} repetitions per line, {repetitions // 5} of metrics and {repetitions // 4} of the best method.\n"
    )
    print(
        f"- Below {MIN_SEEDS} seeds, `paired_difference` and `metric_difference` are measured against the difference of these networks, because that is"
    )
    print("  what their intervals are for. All other numbers are measured against the difference over seeds.")
    print(
        "- `seeds : rows : both` are the parts of the variance of one seed's mean: the seed's effect, the rows' and the interaction's."
    )
    print("- `bootstrap` columns are percentile intervals that resample the rows, the seeds or both.")
    print(
        "- In the table of new splits, the corrected interval is exact where one method is better on the same rows after each training, and too wide where"
    )
    print("  the difference comes from the noise of the training.")
    print(
        "- The regressions' metrics on new rows are known (`seed_differences_metrics.py`). An ECE's estimate from 200 rows is biased upwards, the more the"
    )
    print(
        "  better calibrated a method is. `ece` is its expectation, which the intervals are for; they miss the error for all rows where the biases differ."
    )
    print(
        "- These intervals are too wide for AUROC and ECE where two methods are nearly the same, and for splits of nearly equal methods, as above. They are"
    )
    print(
        "  too short for the ECE of a calibrated method: its expectation is covered in 85 to 91 % with one test set, the error for all rows in 34 to 62 %."
    )
    print(
        "- `best_method`: how often the truly best method is the best of the data or tied with it, and how often all methods are."
    )
    few_rows(repetitions)
    crossed(repetitions)
    resplits(repetitions)
    metrics(repetitions // 5)
    print("\n## `best_method`, 5 seeds, 200 rows")
    print("| methods | the best is better by | the best is kept | others that are kept, mean | all are kept |")
    print("|---|---|---|---|---|")
    for num_methods in (2, 5, 10):
        for gap in (0.0, 0.2, 0.5):
            kept, others = best_is_kept(
                repetitions // 4, num_methods, gap, 5, 200, torch.Generator().manual_seed(num_methods)
            )
            everyone = kept & (others == num_methods - 1)
            print(
                f"| {num_methods} | {gap} | {share(kept)} | {others.double().mean():.2f} | {share(everyone)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

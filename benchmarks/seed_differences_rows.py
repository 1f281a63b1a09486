"""How often intervals over few test rows hold, and how wide they are: those of a difference for one seed, and those of a single model's mean loss.

The width is relative to that of the shortest interval of a fixed length that holds as often as its level says, which the simulation knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_uq.compare.statistics.value_intervals import mean_interval
from lightning_uq.functional.half_widths import crossed_half_width, t_quantile

ROWS = (36, 100, 1000)
LEVELS = (0.95, 0.9962)
"""Those of two and of 14 methods in a comparison with the best."""

Draw = Callable[[int, int, torch.Generator], Tensor]
"""Takes T, N and a generator; returns numbers [T, N] of expectation 0."""


def lognormal(repetitions: int, num_rows: int, draw: torch.Generator) -> Tensor:
    """Numbers of skewness 6.2."""
    z = torch.randn(repetitions, num_rows, generator=draw, dtype=torch.float64)
    return (z.exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def gaussian(repetitions: int, num_rows: int, draw: torch.Generator) -> Tensor:
    return torch.randn(repetitions, num_rows, generator=draw, dtype=torch.float64)


def lognormals(repetitions: int, num_rows: int, draw: torch.Generator) -> Tensor:
    """The difference of two losses that are log-normal."""
    return lognormal(repetitions, num_rows, draw) - lognormal(repetitions, num_rows, draw)


def errors(only_a: float, only_b: float) -> Draw:
    """Differences 1 where only A is wrong, -1 where only B is, else 0."""

    def make(repetitions: int, num_rows: int, draw: torch.Generator) -> Tensor:
        u = torch.rand(repetitions, num_rows, generator=draw, dtype=torch.float64)
        return (u < only_a).double() - (u > 1 - only_b).double()

    return make


DIFFERENCES: dict[str, tuple[Draw, float, float | None]] = {
    "Gaussian": (gaussian, 0, None),
    "difference of log-normals": (lognormals, 0, None),
    "log-normal": (lognormal, 0, None),
    "0/1, one wrong in 8 and 5 %": (errors(0.08, 0.05), 0.03, 1.0),
    "0/1, one wrong in 2.8 and 2.8 %": (errors(1 / 36, 1 / 36), 0, 1.0),
    "0/1, one wrong in 2.8 and 0 %": (errors(1 / 36, 0), 1 / 36, 1.0),
}
"""Differences of the rows, their expectation and the largest difference that is known to be possible."""


def few_rows(repetitions: int) -> None:
    """The tables of differences and of single values."""
    print("\n## Few test rows, one seed")
    print("Coverage, and the mean width relative to that of an interval which knows the distribution.\n")
    head = " | ".join(
        f"{method}, {100 * level:.4g} % | width" for level in LEVELS for method in ("paired_difference", "t")
    )
    print(f"| differences | rows | {head} |\n|---|---|{'---|' * 8}")
    for name, (make, truth, bound) in DIFFERENCES.items():
        for num_rows in ROWS:
            x = make(repetitions, num_rows, torch.Generator().manual_seed(num_rows))
            cells = [cell for level in LEVELS for cell in _cells(x, truth, bound, level)]
            print(f"| {name} | {num_rows} | {' | '.join(cells)} |", flush=True)
    print("\n## Mean losses of one model")
    print("Intervals of `UncertaintyReport` at 95 %: how often the mean lies within, below and above.\n")
    print("| losses | rows | within | below | above | width | t, within | below | above | width |")
    print(f"|{'---|' * 10}")
    for name, loss in LOSSES.items():
        expected = float(loss((torch.arange(10**6, dtype=torch.float64) + 0.5).div(10**6)).mean())
        for num_rows in ROWS:
            draw = torch.Generator().manual_seed(num_rows)
            x = loss(torch.rand(repetitions, num_rows, generator=draw, dtype=torch.float64))
            centre, half = x.mean(1), t_half_width(x, 0.95)
            own = torch.tensor([mean_interval(one, is_positive=True) for one in x], dtype=torch.float64)
            shortest = 2 * (centre - expected).abs().quantile(0.95)
            cells = []
            for lower, upper in (own.unbind(1), (centre - half, centre + half)):
                below, above = (100 * flags.double().mean() for flags in (expected < lower, expected > upper))
                width = (upper - lower).mean() / shortest
                cells += [f"{100 - below - above:.1f}", f"{below:.1f}", f"{above:.1f}", f"{width:.2f}"]
            print(f"| {name} | {num_rows} | {' | '.join(cells)} |", flush=True)


def nll(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """The NLL at a quantile of the logits of the right class of two."""
    return lambda u: torch.nn.functional.softplus(-(mean + std * torch.special.ndtri(u)))


LOSSES = {
    "NLL of a logit of 1 ± 2": nll(1, 2),
    "NLL of a logit of 3 ± 2": nll(3, 2),
    "NLL of a logit of 5 ± 3": nll(5, 3),
    "exponential": lambda u: -torch.log1p(-u),
    "log-normal": lambda u: torch.special.ndtri(u).exp(),
    "absolute value of a Gaussian": lambda u: torch.special.ndtri(u).abs(),
}
"""Positive losses at a quantile of the rows."""


def t_half_width(x: Tensor, level: float) -> Tensor:
    """Of the t interval of the mean of each row of [T, N]."""
    num_rows = x.shape[1]
    return t_quantile(level, x.new_tensor(num_rows - 1.0)) * (x.var(1) / num_rows).sqrt()


def own_half_width(x: Tensor, level: float, bound: float | None) -> Tensor:
    """Of the interval of :func:`~lightning_uq.functional.paired_difference` for differences [T, N] of one seed."""
    return crossed_half_width(x.unsqueeze(1), level, bound)


def _cells(x: Tensor, truth: float, bound: float | None, level: float) -> list[str]:
    error, cells = (x.mean(1) - truth).abs(), []
    shortest = error.quantile(level)
    for half_width in (own_half_width(x, level, bound), t_half_width(x, level)):
        covered = (error <= half_width + 1e-12).double().mean()  # a count of rows may lie on the end
        cells += [f"{100 * covered:.1f}", f"{half_width.mean() / shortest:.2f}"]
    return cells

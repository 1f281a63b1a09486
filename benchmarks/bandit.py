"""The table of docs/acting.md, from the results of `lightning-uq bandit`:

    lightning-uq bandit --methods epinet,ensemble_prior,ensemble,dropout,softmax,uniform --seeds 15 --steps 1000 --out runs/bandit
    python benchmarks/bandit.py runs/bandit/results.json

It keeps the results as benchmarks/bandit.json, from which the site draws its figure.
"""

import statistics
import sys
from pathlib import Path

from kept import publish

from lightning_uq.functional.standard_error import standard_error

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "acting.md"
BEGIN, END = "<!-- bandit -->\n", "<!-- end of bandit -->"
STUCK = 0.02
"""Regret per step, over the last tenth of the steps, of an agent that keeps a bad action."""


def table(results: dict) -> str:
    """What the page shows of results: one column per agent, the best of each row in bold."""
    curves, steps = results["curves"], results["curve_steps"]
    last = len(steps) - 1 - len(steps) // 10
    span = steps[-1] - steps[last]
    total = {name: [run[-1] for run in runs] for name, runs in curves.items()}
    stuck = {name: sum((run[-1] - run[last]) / span > STUCK for run in runs) for name, runs in curves.items()}
    rows = {
        f"Regret of {steps[-1]:,} steps": {name: statistics.mean(values) for name, values in total.items()},
        "Its median": {name: statistics.median(values) for name, values in total.items()},
        "Its largest value": {name: max(values) for name, values in total.items()},
        f"Problems with more than {STUCK} regret per step at the end": stuck,
    }
    lines = ["| | " + " | ".join(curves) + " |", "|---|" + "---:|" * len(curves)]
    for i, (title, values) in enumerate(rows.items()):
        cells = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in values.items()}
        best = cells[min(values, key=values.__getitem__)]
        cells = {name: f"**{cell}**" if cell == best else cell for name, cell in cells.items()}
        if i == 0:
            cells = {name: f"{cell} ±{standard_error(total[name]):.1f}" for name, cell in cells.items()}
        lines.append(f"| {title} | " + " | ".join(cells.values()) + " |")
    return "\n" + "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    publish(Path(sys.argv[1]), RESULTS, PAGE, table, BEGIN, END)

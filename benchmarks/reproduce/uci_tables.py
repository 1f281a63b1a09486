"""The tables of the UCI reproduction."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from results import mean_and_error
from uci_training import INTERVALS

PAPER = {  # RMSE and NLL: MC-dropout, then the ensemble with adversarial training; means and the paper's own error bars
    "boston": (("2.97±.85", "3.28±1.00"), ("2.46±.25", "2.41±.25")),
    "concrete": (("5.23±.53", "6.03±.58"), ("3.04±.09", "3.06±.18")),
    "energy": (("1.66±.19", "2.09±.29"), ("1.99±.09", "1.38±.22")),
    "kin8nm": ((".10±.00", ".09±.00"), ("-.95±.03", "-1.20±.02")),
    "naval": ((".01±.00", ".00±.00"), ("-3.80±.05", "-5.63±.05")),
    "power": (("4.02±.18", "4.11±.17"), ("2.80±.05", "2.79±.04")),
    "protein": (("4.36±.04", "4.71±.06"), ("2.89±.01", "2.83±.02")),
    "wine": ((".62±.04", ".64±.04"), (".93±.06", ".94±.12")),
    "yacht": (("1.11±.38", "1.58±.48"), ("1.55±.12", "1.18±.21")),
}
# Amini et al. (NeurIPS 2020), as quoted in a later comparison; boston's NLL is from memory.
EVIDENTIAL = {
    "boston": ("3.06±.16", "2.35±.06"),
    "concrete": ("5.85±.15", "3.01±.02"),
    "energy": ("2.06±.10", "1.39±.06"),
    "kin8nm": (".09", "-1.24±.01"),
    "naval": (".00", "-5.73±.07"),
    "power": ("4.23±.09", "2.81±.07"),
    "protein": ("4.64±.03", "2.63±.00"),
    "wine": (".61±.02", ".89±.05"),
    "yacht": ("1.57±.56", "1.03±.19"),
}
ENSEMBLES = ("ensemble+AT", "ensemble", "single")
OTHERS = ("laplace", "dropout", "evidential", "epinet")
WIDTHS = ("before", *INTERVALS)
Splits = list[dict[str, Any]]


def table(results: Mapping[str, Any]) -> str:
    """Means and standard deviations over the splits: ensembles, other methods and intervals."""
    sets: dict[str, dict[str, Splits]] = {}
    for job, result in results.items():
        for split in result["splits"]:
            for method, found in split.items():
                sets.setdefault(job.partition("-")[0], {}).setdefault(method, []).append(found)
    lines: list[str] = []
    for methods, title, column in ((ENSEMBLES, "ensemble+AT", 1), (OTHERS, "MC-dropout", 0)):
        for i, metric in enumerate(("rmse", "nll")):
            rows = [
                [name, count(found), *(cell(found, m, name, metric) for m in methods), PAPER[name][i][column]]
                for name, found in sorted(sets.items())
            ]
            head = [metric.upper(), "splits", *methods, f"paper: {title}"]
            if methods is OTHERS:
                head.append("paper: evidential (quoted)")
                rows = [[*row, EVIDENTIAL[row[0]][i]] for row in rows]
            lines += markdown(head, rows)
    head = ["90 % intervals", *(f"{value}, {kind}" for value in ("coverage", "width") for kind in WIDTHS)]
    lines += markdown(
        head, [[name, *intervals(found["conformal"])] for name, found in sorted(sets.items()) if "conformal" in found]
    )
    minutes = sum(result["processor_seconds"] for job, result in results.items() if job.endswith(ENSEMBLES[:2])) / 60
    lines.append(
        f"The columns of ensembles took {minutes:.0f} minutes of one core, the search of the learning rates included."
    )
    return "\n".join(lines)


def count(found: Mapping[str, Splits]) -> str:
    """The splits that most methods have."""
    return str(max(map(len, found.values())))


def cell(found: Mapping[str, Splits], method: str, name: str, metric: str) -> str:
    """Mean and standard deviation of a method, with the number of splits where it has fewer than others; or nothing."""
    if method not in found:
        return ""
    digits = {"naval": 4, "kin8nm": 3}.get(name, 2) if metric == "rmse" else 2  # of two sets with small targets
    values = [split[metric] for split in found[method]]
    fewer = "" if str(len(values)) == count(found) else f" ({len(values)})"
    return "".join(mean_and_error(values, digits)) + fewer


def intervals(splits: Splits) -> list[str]:
    """Mean coverages, then mean widths."""
    return [
        f"{mean(split[kind][value] for split in splits):.{places}f}"
        for value, places in (("coverage", 3), ("width", 2))
        for kind in WIDTHS
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
    ]

"""The page over several data sets: a card for each, and a table of the methods' numbers and mean ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_uq.compare.directory.join import Run, join, tested_on_same_rows
from lightning_uq.compare.directory.reading import RESULTS, read_run
from lightning_uq.compare.directory.writing import PAGE, write_page
from lightning_uq.compare.statistics.verdict import listed, quality_key
from lightning_uq.errors import InputError
from lightning_uq.report import Column, Link, Report, render_html, shown_columns, write_files

_RANK = Column(
    "mean_rank", "Mean rank", "lower", "prediction", lambda value: f"{value:.2f}", "Mean rank over data sets, 1 is best"
)
_TIES = "Ranks of tied methods are meaningless."
MIN_SETS = 6
"""The number of data sets from which a two-sided sign test between two methods can reach 5 %: 2 / 2^6 < 0.05 < 2 / 2^5."""


def find_runs(directory: Path) -> dict[str, Run]:
    """The runs in the folders of a directory, by folder name.

    Raises:
        InputError: There is no run, or one cannot be read.
    """
    folders = sorted(path.parent for path in directory.glob(f"*/{RESULTS}"))
    if not folders:
        raise InputError(
            f"{directory} has no {RESULTS}, and neither has any of its folders, so it is not a run and contains no runs."
        )
    return {folder.name: read_run(folder) for folder in folders}


def skipped_folders(directory: Path, runs: Mapping[str, Run]) -> list[str]:
    """For each folder of a directory that is not a run, a sentence with the reason. Hidden folders are skipped."""
    found = []
    for folder in sorted(one for one in directory.iterdir() if one.is_dir() and not one.name.startswith(".")):
        if folder.name not in runs:
            inner = [path.parent.name for path in folder.glob(f"*/{RESULTS}")]
            runs_inside = f", but its folders do. Make its own page with `lightning-uq report {folder}`"
            found.append(f"Skipped {folder.name}: it has no {RESULTS}{runs_inside if inner else ''}.")
    return found


def write_index(runs: Mapping[str, Run], directory: Path) -> dict[str, Any] | None:
    """Write the page over runs into a directory, and rewrite the pages of the runs with links in both directions.

    Runs of modules that were tested on the same rows become one comparison of these modules.

    Args:
        runs: The runs by the names of their folders in the directory.
        directory: The existing directory, which contains the folders of the runs.

    Returns:
        The results of the comparison of modules, or None.
    """
    joined = join(list(runs.values())) if len(runs) > 1 and tested_on_same_rows(list(runs.values())) else None
    top = "All modules" if joined else "All data sets"
    for name, (results, records) in runs.items():
        folder = directory / name
        folder.mkdir(exist_ok=True)
        others = [Link(other, f"../{other}/{PAGE}") for other in runs if other != name]
        write_page(results, records, folder, [Link(top, f"../{PAGE}"), *others])
    if joined is None:
        write_files(directory, {PAGE: render_html(make_index(runs)).encode()})
        return None
    write_page(*joined, directory, [Link(name, f"{name}/{PAGE}") for name in runs])
    return joined[0]


def make_index(runs: Mapping[str, Run]) -> Report:
    """The page over runs: a card for each, and a table of the deciding number of each.

    On each data set, methods are ranked by that number, such as the NLL. Ranks have no unit, so they can be averaged. Several runs on the same data set are
    not independent, and count as one.

    Args:
        runs: The runs by the names of their folders.
    """
    decisive = [
        found for name, (results, _) in runs.items() for found in [_Decisive.of(name, results)] if found is not None
    ]
    data_sets = list(dict.fromkeys(one.data for one in decisive))
    results = [one for one, _ in runs.values()]
    methods: dict[str, Any] = {}
    for one in results:
        methods |= one["methods"]
    common = [name for name in methods if {one.data for one in decisive if name in one.values} == set(data_sets)]
    ranks = _mean_ranks(decisive, common, data_sets) if len(common) > 1 and len(data_sets) > 1 else {}
    rows: list[dict[str, Any]] = []
    for method in methods:
        row: dict[str, Any] = {one.name: one.values[method] for one in decisive if method in one.values}
        row |= {"mean_rank": {"mean": ranks[method], "se": None}} if method in ranks else {}
        if row:  # methods without a row have no numbers
            rows.append({"method": method, **row})
    rows.sort(key=lambda row: row["mean_rank"]["mean"] if "mean_rank" in row else math.inf)
    ranked = [row for row in rows if "mean_rank" in row]
    count = f"{len(data_sets)} data sets" if len(data_sets) > 1 else " and ".join(data_sets)
    is_table = len(rows) > 1
    return Report(
        title=f"Uncertainty methods compared on {count}",
        verdict=_verdict(ranked, decisive, len(data_sets)),
        rows=rows if is_table else (),
        columns=[*(one.column for one in decisive), *([_RANK] if ranked else [])],
        tied={one.name: one.tied for one in decisive},
        methods={row["method"]: _about(methods[row["method"]]) for row in rows} if is_table else {},
        notes=_notes(len(rows) - len(ranked), decisive, len(data_sets)) if is_table else (),
        pages=[
            Link(name, f"{name}/{PAGE}", " ".join(one["verdict"][:1]) or "No verdict.")
            for name, (one, _) in runs.items()
        ],
    )


def _about(method: Mapping[str, Any]) -> tuple[str, str | None]:
    return method["about"] or "no description", method["link"]


@dataclass(frozen=True)
class _Decisive:
    """The deciding number of one run: its column in the table over runs, and each method's value."""

    name: str
    data: str
    column: Column
    values: Mapping[str, Mapping[str, Any]]
    tied: Sequence[str]
    best: str | None

    @classmethod
    def of(cls, name: str, results: Mapping[str, Any]) -> "_Decisive | None":
        key = quality_key(results["rows"])
        column = next((one for one in shown_columns(results["rows"]) if one.key == key), None)
        if key is None or column is None:
            return None
        data = results["problem"]["name"]
        values = {row["method"]: row[key] for row in results["rows"] if row.get(key, {}).get("mean") is not None}
        found = results["differences"].get(key, {})
        shown = replace(
            column, key=name, label=f"{name} {column.label}", title=f"{column.title}, on {data}", in_units=False
        )
        return cls(name, data, shown, values, found.get("tied", ()), found.get("best"))

    def rank(self, method: str, among: Sequence[str]) -> float:
        """The rank of a method among those with a number; equal numbers share the mean of their ranks."""
        sign = -1 if self.column.better == "higher" else 1
        own, *all_means = (float(sign * self.values[name]["mean"]) for name in (method, *among) if name in self.values)
        better, equal = sum(other < own for other in all_means), sum(other == own for other in all_means)
        return 1.0 + better + (equal - 1) / 2

    def is_unbeaten(self, method: str) -> bool:
        return method == self.best or method in self.tied


def _mean_ranks(decisive: Sequence[_Decisive], common: Sequence[str], data_sets: Sequence[str]) -> dict[str, float]:
    """Mean ranks over data sets of the methods that all of them have. Several runs on the same data set count as one."""
    found = {}
    for method in common:
        of_sets = [
            [one.rank(method, common) for one in decisive if one.data == data and method in one.values]
            for data in data_sets
        ]
        found[method] = mean(map(mean, of_sets))
    return found


def _verdict(ranked: Sequence[Mapping[str, Any]], decisive: Sequence[_Decisive], num_sets: int) -> list[str]:
    if len(ranked) < 2:
        return []
    best = ranked[0]["method"]
    first = [row["method"] for row in ranked if row["mean_rank"]["mean"] == ranked[0]["mean_rank"]["mean"]]
    if len(first) > 1:
        return [
            f"{listed(first)} share the best mean rank over {num_sets} data sets ({ranked[0]['mean_rank']['mean']:.2f} of {len(ranked)}). {_TIES}"
        ]
    unbeaten = len(
        {one.data for one in decisive if one.is_unbeaten(best)}
        - {one.data for one in decisive if not one.is_unbeaten(best)}
    )
    where = f"all {num_sets}" if unbeaten == num_sets else f"{unbeaten} of them"
    runner_up = ranked[1]
    sentence = (
        f"{best} has the best mean rank over {num_sets} data sets ({ranked[0]['mean_rank']['mean']:.2f} of {len(ranked)}; {runner_up['method']} "
        f"{runner_up['mean_rank']['mean']:.2f}), and on {where} no method is better beyond doubt."
    )
    return [
        f"{sentence} {_TIES}",
        "This describes these data sets. It does not test whether the order would be the same on others.",
    ]


def _notes(num_unranked: int, decisive: Sequence[_Decisive], num_sets: int) -> list[str]:
    if num_sets < 2:
        return []
    notes = [
        "A method's rank on a data set is its place by the number in the table, 1 for the best. Equal numbers share a place. The mean rank gives all data "
        "sets the same weight, regardless of their units and sizes.",
    ]
    if num_sets < MIN_SETS:
        notes.append(
            f"With {num_sets} data sets, no rank test at 5 % can tell two methods apart, not even if one is better on all of them: {MIN_SETS} are needed."
        )
    if len(decisive) > num_sets:
        notes.append(
            "Runs on the same data set are not independent. Their ranks are averaged first, and count as one data set."
        )
    if num_unranked:
        notes.append(
            "Methods without a number on every data set have no mean rank. The others are ranked without them."
        )
    return notes

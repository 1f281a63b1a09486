"""Makes the results of a comparison from the records of its methods."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.environment import command_line, git_state, versions
from lightning_uq.compare.planning.discovery import PLAIN
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.differences import find_differences
from lightning_uq.compare.statistics.measures import find_single_rows, measured
from lightning_uq.compare.statistics.verdict import make_verdict
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.report.table import ALL_COLUMNS

FORMAT = 2
"""Version of the layout of ``results.json``."""

NOT_COMPLETE = "There is no verdict, because the comparison is incomplete."


def make_rows(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """One mapping per method: ``{"method": name, key: {"mean": m, "se": s, "seeds": [...]}, ...}``."""
    return [{"method": name, **summarize([measured(record) for record in found])} for name, found in records.items()]


def summarize(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The mean and standard error over seeds of every key, and each seed's value.

    The error is None with one seed. Mean and error are None if a value is not finite, and so is that value, since JSON has no NaN.

    Example:
        >>> summarize([{"nll": 1.0}, {"nll": 3.0}])
        {'nll': {'mean': 2.0, 'se': 1.0, 'seeds': [1.0, 3.0]}}
    """
    summary: dict[str, dict[str, Any]] = {}
    for key in (column.key for column in ALL_COLUMNS):
        column = [one[key] for one in values if key in one]
        if not column:
            continue
        seeds = [value if math.isfinite(value) else None for value in column]
        if None in seeds:
            summary[key] = {"mean": None, "se": None, "seeds": seeds}
        else:
            summary[key] = {"mean": statistics.mean(column), "se": standard_error(column), "seeds": seeds}
    return summary


def make_results(
    configuration: Configuration,
    problem: Problem,
    methods: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Sequence[Record]],
    left_out: Mapping[str, str] | None = None,
    tuned: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    *,
    statistics: bool = True,
) -> dict[str, Any]:
    """The contents of ``results.json``, from which the page can be made again.

    Methods without the records of all seeds have no row. ``"missing"`` has the number of missing records of each, except for methods that are left out.

    Args:
        configuration: The configuration.
        problem: The data of the first seed.
        methods: What a page shows of each method, by name.
        records: Each method's records.
        left_out: Methods that could not run on these data with this network, or diverged, and why.
        tuned: For each method, the settings that tuning chose on each seed.
        statistics: Whether to compute which differences are significant, and which method to recommend.
    """
    left_out = left_out or {}
    complete = {name: one for name, one in records.items() if len(one) == configuration.seeds}
    rows = make_rows(complete)
    plain = next((name for name in complete if name in PLAIN), next(iter(complete), ""))
    baseline = configuration.baseline if configuration.baseline in complete else plain
    differences = find_differences(complete, baseline, problem.setting.num_train) if complete and statistics else {}
    single_rows = find_single_rows(complete)
    settings = {name: list((tuned or {}).get(name, ())) for name in complete}
    untuned = [name for name, found in settings.items() if configuration.recipe.tune and not all(found)]
    verdict = make_verdict(
        rows,
        differences,
        configuration.seeds,
        data=problem.data.name,
        baseline=baseline,
        single_rows=single_rows,
        untuned=untuned,
    )
    return {
        "format": FORMAT,
        "data": configuration.data,
        "task": problem.data.task,
        "verdict": verdict if statistics else [NOT_COMPLETE],
        "rows": rows,
        "notes": _notes(complete, untuned, configuration.baseline, baseline),
        "missing": {
            name: configuration.seeds - len(one)
            for name, one in records.items()
            if name not in complete and name not in left_out
        },
        "baseline": baseline,
        "differences": differences,
        "single_rows": single_rows,
        "methods": {name: {**methods[name], "num_indices": found[0].num_indices} for name, found in complete.items()},
        "left_out": dict(left_out),
        "tuned": settings,
        "problem": problem.facts(),
        "configuration": replace(configuration, recipe=configuration.recipe.for_task(problem.data.task)).as_plain(),
        "command": command_line(configuration),
        "versions": versions(),
        "git": git_state(),
    }


def _notes(
    records: Mapping[str, Sequence[Record]], untuned: Sequence[str], asked_baseline: str | None, baseline: str
) -> list[str]:
    """Notes about single rows for readers of the table."""
    notes = []
    if asked_baseline not in (None, baseline):
        notes.append(f"{asked_baseline}, the requested baseline, has no row. {baseline} replaces it.")
    stopped = [
        f"{name}, seed {record.seed}, {record.stopped}"
        for name, found in records.items()
        for record in found
        if record.stopped is not None
    ]
    if stopped:
        notes.append(f"Trainings stopped early, because a validation metric was not finite: {'; '.join(stopped)}.")
    if untuned:
        notes.append(
            f"Not tuned: {', '.join(untuned)}. A user's own LightningModule has its own optimizer, and trials need a finite validation metric."
        )
    return notes

"""Several runs of UncertaintyReport on the same test rows, joined into one comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_uq.compare.records import Record
from lightning_uq.compare.results import make_rows
from lightning_uq.compare.statistics.differences import find_differences
from lightning_uq.compare.statistics.measures import find_single_rows
from lightning_uq.compare.statistics.verdict import make_verdict
from lightning_uq.errors import InputError

Run = tuple[Mapping[str, Any], Mapping[str, Sequence[Record]]]
"""Results and records, as returned by :func:`~lightning_uq.compare.directory.reading.read_run`."""


def tested_on_same_rows(runs: Sequence[Run]) -> bool:
    """Whether all runs tested modules on the same rows with the same targets."""
    if not all(results.get("kind") == "test" for results, _ in runs):
        return False
    first, *others = (_only(run) for run in runs)
    return all(
        torch.equal(one.row_ids, first.row_ids) and torch.equal(one.rows["target"], first.rows["target"])
        for one in others
    )


def join(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """The results and records of one comparison of the modules. Runs with the same name are seeds of one method.

    Args:
        runs: The runs, tested on the same rows.

    Raises:
        InputError: The numbers of runs differ between names.
    """
    records: dict[str, list[Record]] = {}
    for one in map(_only, runs):
        seeds = records.setdefault(one.method, [])
        seeds.append(replace(one, seed=len(seeds)))
    counts = {name: len(found) for name, found in records.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"Runs with the same `name` are seeds of one method, and all methods need the same number of seeds, but there are {listed}. Give different modules "
            "different names: UncertaintyReport(directory, name='mine')."
        )
    rows, first = make_rows(records), runs[0][0]
    baseline = next(iter(records))
    differences = find_differences(records, baseline, None)
    single_rows = find_single_rows(records)
    methods: dict[str, Any] = {}
    for results, _ in runs:
        methods |= results["methods"]
    results = {
        **first,
        "verdict": make_verdict(
            rows, differences, counts[baseline], data=first["data"], baseline=baseline, single_rows=single_rows
        ),
        "rows": rows,
        "baseline": baseline,
        "differences": differences,
        "single_rows": single_rows,
        "intervals": {},
        "methods": methods,
    }
    return results, records


def _only(run: Run) -> Record:
    ((record,),) = run[1].values()
    return record

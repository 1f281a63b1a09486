"""Reads a run's directory: its results and its records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_uq.compare.records import FOLDER, Record
from lightning_uq.compare.results import FORMAT
from lightning_uq.errors import InputError, without_period

RESULTS = "results.json"
_NEEDED = ("rows", "methods", "problem", "differences", "verdict", "task", "baseline", "versions")


def read_run(directory: Path) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """The contents of a run's ``results.json``, and the records of its methods in the order of their seeds.

    Args:
        directory: The directory of a comparison or :class:`~lightning_uq.compare.UncertaintyReport` wrote.

    Raises:
        InputError: The directory is not that of a run, was written by another version, or lacks records.
    """
    results = read_results(directory)
    records: dict[str, list[Record]] = {row["method"]: [] for row in results["rows"]}
    for path in sorted((directory / FOLDER).glob("*.npz")):
        record = Record.load(path)
        if record.method in records:  # skips methods without a row, from an interrupted run
            records[record.method].append(record)
    missing = [name for name, found in records.items() if not found]
    if missing:
        raise InputError(
            f"{directory / FOLDER} has no records of {', '.join(missing)}, which the figures need. Copy the folder {FOLDER} together with "
            f"{RESULTS}, or run again."
        )
    return results, {name: sorted(found, key=lambda record: record.seed) for name, found in records.items()}


def read_results(directory: Path) -> dict[str, Any]:
    """The contents of a run's ``results.json``.

    Raises:
        InputError: The directory is not that of a run, or was written by another version.
    """
    if not directory.is_dir():
        raise InputError(
            f"{directory} {'is a file' if directory.exists() else 'does not exist'}. A run is a directory."
        )
    path = directory / RESULTS
    if not path.is_file():
        raise InputError(f"{directory} has no {RESULTS}, so it is not the directory of a run.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {without_period(error)}.") from error
    if not isinstance(results, Mapping) or "format" not in results:
        raise InputError(f"{path} does not hold the results of a run.")
    if results["format"] != FORMAT:
        raise InputError(f"{path} has format {results['format']}, but this version reads format {FORMAT}.")
    missing = [key for key in _NEEDED if key not in results]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}, so it does not hold the results of a run.")
    return dict(results)

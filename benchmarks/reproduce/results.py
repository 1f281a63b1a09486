"""A folder of results, one JSON file per job: what exists is not made again, so a stopped run continues when it is called again."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_uq.writing import replacing

Result = dict[str, Any]


def run_jobs(
    jobs: Mapping[str, Callable[[], Result]], folder: Path, settings: Result, budget: float
) -> tuple[dict[str, Result], list[str]]:
    """The results of the jobs by name, and the names of those that the budget left out.

    Args:
        jobs: What is called for each name.
        folder: Where ``<name>.json`` is written; each holds ``result`` and the ``seconds`` that it took.
        settings: What all results of the folder depend on.
        budget: Minutes after which no job is begun.

    Raises:
        SystemExit: The folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / "settings.json"
    if noted.exists() and (old := json.loads(noted.read_text())) != settings:
        raise SystemExit(
            f"--out: {folder} holds results of {old}, but the settings are {settings}. Choose another folder."
        )
    write(noted, settings)
    results, left_out, start = {}, [], time.monotonic()
    bar = tqdm(jobs)
    for name in bar:
        path = folder / f"{name}.json"
        if not path.exists():
            if time.monotonic() - start > 60 * budget:
                left_out.append(name)
                continue
            bar.set_description(name)
            began = time.monotonic()
            result = jobs[name]()
            seconds = round(time.monotonic() - began, 1)
            write(path, {"result": result, "seconds": seconds})
            tqdm.write(f"{name}: {seconds:.0f} s")
        results[name] = json.loads(path.read_text())["result"]
    return results, left_out


def write(path: Path, content: Result) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as partial_path:
        partial_path.write_text(json.dumps(content, indent=1))

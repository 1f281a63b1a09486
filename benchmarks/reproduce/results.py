"""A folder of results, one JSON file per job: jobs whose file exists are not run again, so a stopped run continues when it is called again.

`reproduce` is what the scripts share: options, the loop, the table, and `--publish`, which keeps the results in ``published/NAME.json`` and
rewrites the part of docs/results.md between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

import json
import logging
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
from tqdm import tqdm

from lightning_uq.writing import replacing

Result = dict[str, Any]
PUBLISHED = Path(__file__).with_name("published")
PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def reproduce(
    name: str,
    parser: ArgumentParser,
    jobs: Callable[[Namespace], Mapping[str, Callable[[], Result]]],
    table: Callable[[Mapping[str, Result]], str],
    settings: Sequence[str] = (),
    *,
    about: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """The command of a script.

    Args:
        name: Of the results.
        parser: Has the options of the script.
        jobs: Makes the jobs from the options.
        table: Makes Markdown from results by job.
        settings: The options on which every result depends.
        about: The docstring of the script.
        argv: The arguments; None: those of the process.
    """
    parser.description, parser.formatter_class = about, RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files that are written")
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further job is begun")
    parser.add_argument(
        "--publish", action="store_true", help="keep the results in the repository and on docs/results.md"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    chosen = {key: getattr(options, key) for key in settings}
    results, left_out = run_jobs(jobs(options), options.out, chosen, options.budget)
    print(table(results))
    if left_out:
        print(f"\nLeft out by the budget: {', '.join(left_out)}")
    if options.publish:
        publish(name, results, chosen, left_out, table)


def publish(
    name: str,
    results: Mapping[str, Result],
    settings: Result,
    left_out: Sequence[str],
    table: Callable[[Mapping[str, Result]], str],
) -> None:
    """Write ``published/NAME.json`` and the part of docs/results.md."""
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"torch": torch.__version__.partition("+")[0], "lightning": lightning.__version__},
        "settings": settings,
        "left_out": list(left_out),
        "results": results,
    }
    PUBLISHED.mkdir(exist_ok=True)
    write(PUBLISHED / f"{name}.json", content)
    text = PAGE.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, after = text[: text.index(begin)], text[text.index(end) :]
    PAGE.write_text(before + begin + part(content, table) + after)


def part(content: Result, table: Callable[[Mapping[str, Result]], str]) -> str:
    """What docs/results.md shows of published results."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    left_out = content["left_out"]
    budget = f" Left out by the budget: {', '.join(left_out)}." if left_out else ""
    return f"\n{table(content['results'])}\n\nMeasured on {content['date']} with {versions}.{budget}\n\n"


def mean_and_error(values: Sequence[float], digits: int) -> tuple[str, str]:
    """The mean, and ``±`` with the standard deviation over splits, or nothing for one split.

    Example:
        >>> mean_and_error([1.0, 3.0], 1)
        ('2.0', ' ±1.4')
    """
    return f"{mean(values):.{digits}f}", f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, numbers to the right, and an empty one.

    Example:
        >>> markdown(["set", "rows"], [["yacht", "308"]])
        ['| set | rows |', '|---|---:|', '| yacht | 308 |', '']
    """
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


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

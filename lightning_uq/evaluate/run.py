"""The evaluation of all runs, and its JSON file."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_uq.errors import InputError, without_period
from lightning_uq.evaluate.data import EvaluationData, make_data
from lightning_uq.evaluate.errors import naming_argument
from lightning_uq.evaluate.models import find_device, load_model
from lightning_uq.evaluate.names import with_plain_names
from lightning_uq.evaluate.numbers import NUM_BINS, metrics
from lightning_uq.evaluate.page import make_report
from lightning_uq.evaluate.reading import join, read
from lightning_uq.evaluate.settings import Settings
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.report import render_html
from lightning_uq.report.files import writable_directory, write_files
from lightning_uq.version import __version__

PAGE_SUFFIX = ".html"


def evaluate(settings: Settings, progress: Callable[[str], None] = lambda path: None) -> dict[str, Any]:
    """Evaluate every run and return the contents of the JSON file.

    Args:
        settings: The checkpoints and the data.
        progress: Called with the path of each checkpoint before it is read.

    Returns:
        ``mean``, ``se`` (the standard error over runs; None with one run), ``std`` (the original's name for ``se``) and
        ``values`` (one per run) by key, and ``info``. The keys are those of the table in :mod:`lightning_uq.evaluate`.

    Raises:
        InputError: A checkpoint, the data, or an argument is invalid.
    """
    data: dict[int | None, EvaluationData] = {}
    values, temperatures, grid = [], [], []
    for run, seeds in zip(settings.runs, settings.seeds(), strict=True):
        members = []
        for path, seed in zip(run, seeds, strict=True):
            progress(path)
            if seed not in data:
                data[seed] = make_data(settings, seed)
            device = find_device(settings.accelerator)
            with naming_argument("runs", {"path": "runs", "target": "network"}):
                model = load_model(path, settings.module, settings.network, settings.init_args)
                members.append(read(model.to(device), data[seed], settings, path))
        joined = join(members, run, settings.model_type)
        values.append(with_plain_names(settings.model_type, metrics(settings.model_type, joined)))
        temperatures.append(joined.temperature.tolist())
        grid.append(torch.cat([member.grid_temperature for member in members]).tolist())
    keys = list(values[0])
    columns = {key: [one[key] for one in values] for key in keys}
    errors = {key: standard_error(column) for key, column in columns.items()}
    first = next(iter(data.values()))
    return {
        "mean": {key: statistics.mean(column) for key, column in columns.items()},
        "std": errors,
        "se": errors,
        "values": columns,
        "info": {
            **{name: value for name, value in vars(settings).items() if name != "runs"},
            "runs": [list(map(str, run)) for run in settings.runs],
            "data_seeds": settings.seeds(),
            "ood_name": first.ood_name,
            "temperature": temperatures,
            "grid_temperature": grid,
            "num_bins": NUM_BINS,
            "lightning_uq": __version__,
        },
    }


def write(result: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Write the JSON file, and beside it the page with the suffix ``.html``; either both or none.

    Returns:
        The two paths.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    path = Path(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    page = path.with_suffix(PAGE_SUFFIX)
    files = {path.name: text.encode(), page.name: render_html(make_report(result)).encode()}
    write_files(writable_directory(path.parent), files)
    return [path, page]


def read_result(path: Path) -> dict[str, Any]:
    """The contents of a JSON file that :func:`write` wrote.

    Raises:
        InputError: The file is not such a file.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {without_period(error)}.") from error
    if not isinstance(result, dict) or not {"mean", "se", "info"} <= set(result) or "model_type" not in result["info"]:
        raise InputError(f"{path} is not the JSON file of an evaluation.")
    return result


def write_page(result: Mapping[str, Any], page: Path) -> None:
    """Write only the page."""
    write_files(writable_directory(page.parent), {page.name: render_html(make_report(result)).encode()})

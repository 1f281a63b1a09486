"""What has to agree between two runs for their records to stand in one table."""

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.planning.discovery import is_source, load_source, methods_of
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError

FREE = ("methods", "method_file", "baseline", "config")
"""Fields of the configuration that may differ: they choose rows, and no number of a row depends on them. What a file of arguments holds is compared
instead of its path.
"""

JOINING = ("module", "config: module")
"""Fields that choose rows as well: one run may have none, but two may not have different ones."""

PLACES = ("data", "ood", "root", "problem")
"""Fields that say where the data lie. They may differ if the data are the same."""

READ_BATCHES = 2
"""Batches of each loader that a fingerprint reads, where the data are not tensors in memory."""

WAYS_OUT = "Choose another `out`, or start anew with `overwrite`."


def plain_configuration(configuration: Configuration, problem: Problem) -> dict[str, Any]:
    """A configuration as JSON has it, with every default filled in: two that mean the same are equal."""
    held_out = tuple(getattr(problem.data, "ood_classes", ()))
    recipe = configuration.recipe.for_task(problem.data.task)
    filled = replace(
        configuration,
        ood_classes=held_out,
        network=None if problem.is_testbed else configuration.network or problem.network,
        recipe=recipe,
    )
    plain: dict[str, Any] = json.loads(json.dumps(filled.as_plain(), default=str))
    return plain


def data_fingerprint(problem: Problem) -> str:
    """A hash of the samples of all parts, for the first seed: it follows from the values, and not from a file's name or date.

    Of data that are not tensors in memory, such as folders of images, it reads the first :data:`READ_BATCHES` batches of each loader.

    Example:
        >>> from lightning_uq.compare.problem import make_problem
        >>> digits = make_problem(Configuration(), 0)
        >>> data_fingerprint(digits) == data_fingerprint(make_problem(Configuration(), 0))
        True
    """
    data, digest = problem.data, hashlib.sha256()
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    for part, loader in {**loaders, **data.ood_dataloaders()}.items():
        tensors = getattr(getattr(loader, "dataset", None), "tensors", None)
        digest.update(part.encode())
        if tensors is None:
            with seeded(0):  # a transform may be random
                tensors = list(itertools.islice(loader, READ_BATCHES))
        for array in _arrays(tensors):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(data.test_rows.numpy().tobytes())
    digest.update(str(data.num_train).encode())
    return digest.hexdigest()


def _arrays(value: Any) -> Iterator["np.ndarray[Any, Any]"]:
    """The numbers and texts in a batch of any kind."""
    if isinstance(value, Tensor):
        yield value.detach().cpu().double().numpy() if value.is_floating_point() else value.cpu().numpy()
    elif isinstance(value, np.ndarray | int | float | str):
        yield np.asarray(value)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _arrays(value[key])
    elif isinstance(value, Sequence):
        for one in value:
            yield from _arrays(one)


def source_hashes(configuration: Configuration) -> dict[str, str]:
    """Hashes of the texts of a user's files by what they define: ``method NAME``, ``network``, ``module`` or ``data_module``.

    What such a file imports is not read.
    """
    files: dict[str, str | None] = {}
    for name in (*filter(is_source, configuration.methods or ()), *configuration.method_file):
        module = load_source(name)
        files |= {f"method {method.name}": module.__file__ for method in methods_of(module)}
    for name in ("network", "module", "data_module"):
        path = getattr(configuration, name)
        if path is None or path.startswith("timm:") or not ("." in path or ":" in path):
            continue  # names of this package's or timm's networks are covered by the versions
        module_name = path.partition(":")[0] if ":" in path else path.rpartition(".")[0]
        spec = importlib.util.find_spec(module_name)
        files[name] = None if spec is None else spec.origin
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None and Path(file).is_file()
    }


def check_agreement(then: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Check that a run may go on in a directory.

    Args:
        then: What ``run.json`` says: ``configuration``, ``data``, ``sources`` and ``save_predictions``.
        now: The same of this run.
        directory: The directory.

    Raises:
        InputError: They do not agree.
    """
    same_data = then["data"] == now["data"]
    before, after = _flat(then["configuration"]), _flat(now["configuration"])
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old == new or name in FREE or (name in PLACES and same_data) or (name in JOINING and None in (old, new)):
            continue
        raise InputError(
            f"`{name}` is {_shown(new)}, but in the comparison in {directory} it is {_shown(old)}. {WAYS_OUT}"
        )
    if not same_data:
        raise InputError(
            f"`data`: {after['data']} does not hold the same samples as when the comparison in {directory} began. {WAYS_OUT}"
        )
    for name in then["sources"].keys() & now["sources"].keys():
        if then["sources"][name] != now["sources"][name]:
            argument = "methods" if name.startswith("method ") else name
            what = name if name.startswith("method ") else f"the {name.replace('_', ' ')}"
            raise InputError(
                f"`{argument}`: the file of {what} has changed since the comparison in {directory} began. {WAYS_OUT}"
            )
    if now["save_predictions"] and not then["save_predictions"]:
        raise InputError(
            f"`save_predictions` is given, but the comparison in {directory} began without it, and its networks are gone. {WAYS_OUT}"
        )


def merged_configuration(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a comparison that further methods join."""
    merged = {**then, "recipe": now["recipe"]}
    for name in ("methods", "method_file"):
        merged[name] = list(dict.fromkeys([*then[name], *now[name]]))
    for name in ("baseline", "module", "config"):
        merged[name] = then[name] if now[name] is None else now[name]
    merged["contents"] = {**then["contents"], **now["contents"]}
    return merged


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with those of the recipe and of the file of arguments among them."""
    flat = {name: value for name, value in configuration.items() if name not in ("recipe", "contents")}
    return {**flat, **configuration["recipe"], **{f"config: {k}": v for k, v in configuration["contents"].items()}}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)

"""What has to agree between two runs for their records to stand in one table."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.discovery import is_source, load_source, methods_of
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.training import seeded
from lightning_uq.errors import InputError

FREE = ("methods", "baseline")
"""Fields of the configuration that may differ: they choose rows, and no number of a row depends on them."""

PLACES = ("data", "root", "problem")
"""Fields that say where the data lie. They may differ if the data are the same."""

SAMPLED = 64
"""Samples of each part that a fingerprint reads, where the data are not tensors in memory."""

WAYS_OUT = "Choose another `out`, or start anew with `overwrite`."


def data_fingerprint(problem: Problem) -> str:
    """A hash of the samples of all parts, for the first seed: it follows from the values, and not from a file's name or date.

    Of data that are not tensors in memory, such as folders of images, it reads :data:`SAMPLED` samples of each part.

    Example:
        >>> from lightning_uq.compare.problem import make_problem
        >>> digits = make_problem(Configuration(), 0)
        >>> data_fingerprint(digits) == data_fingerprint(make_problem(Configuration(), 0))
        True
    """
    digest = hashlib.sha256()
    for part in ("train", "val", "test", "ood"):
        dataset = problem.data.dataset(part)
        digest.update(f"{part} {len(dataset)}".encode())
        tensors = getattr(dataset, "tensors", None)
        if tensors is None:
            rows = (
                sorted({round(i * (len(dataset) - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}) if len(dataset) else []
            )
            with seeded(0):  # a transform may be random
                tensors = [torch.as_tensor(value) for row in rows for value in dataset[row][:2]]
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def source_hashes(configuration: Configuration) -> dict[str, str]:
    """Hashes of the texts of a user's files by what they define: a method's name, or ``network``.

    What such a file imports is not read.
    """
    files: dict[str, str | None] = {}
    for name in filter(is_source, configuration.methods or ()):
        module = load_source(name)
        files |= {method.name: module.__file__ for method in methods_of(module)}
    module_name, colon, _ = (configuration.network or "").partition(":")
    if colon and module_name != "timm":
        spec = importlib.util.find_spec(module_name)
        files["network"] = None if spec is None else spec.origin
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
        if name in FREE or (name in PLACES and same_data):
            continue
        if before.get(name) != after.get(name):
            raise InputError(
                f"`{name}` is {_shown(after.get(name))}, but in the comparison in {directory} it is {_shown(before.get(name))}. {WAYS_OUT}"
            )
    if not same_data:
        raise InputError(
            f"`data`: {after['data']} does not hold the same samples as when the comparison in {directory} began. {WAYS_OUT}"
        )
    for name in then["sources"].keys() & now["sources"].keys():
        if then["sources"][name] != now["sources"][name]:
            what = "the network" if name == "network" else f"method {name}"
            raise InputError(
                f"`{'network' if name == 'network' else 'methods'}`: the file of {what} has changed since the comparison in {directory} began. "
                f"{WAYS_OUT}"
            )
    if now["save_predictions"] and not then["save_predictions"]:
        raise InputError(
            f"`save_predictions` is given, but the comparison in {directory} began without it, and its networks are gone. {WAYS_OUT}"
        )


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, those of the recipe among them."""
    return {**{name: value for name, value in configuration.items() if name != "recipe"}, **configuration["recipe"]}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)

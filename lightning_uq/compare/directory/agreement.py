"""Checks whether the records of two runs may be in one table."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.planning.discovery import is_source, load_source, methods_of
from lightning_uq.compare.problem import Problem
from lightning_uq.errors import InputError

WAYS_OUT = "Choose another `out`, or start again with `overwrite`."


def plain_configuration(configuration: Configuration, problem: Problem) -> dict[str, Any]:
    """A configuration as JSON, with all defaults filled in, so that equivalent configurations are equal."""
    filled = replace(
        configuration,
        task=problem.data.task,
        ood_classes=tuple(getattr(problem.data, "ood_classes", ())),
        network=None if problem.is_testbed else configuration.network or problem.network,
        recipe=configuration.recipe.for_task(problem.data.task),
    )
    plain: dict[str, Any] = json.loads(json.dumps(filled.as_plain(), default=str))
    return plain


def settings_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plain configuration that affect the numbers, apart from the samples. Those of a module are included only if there is one.

    The other fields locate the data, or choose rows.
    """
    contents = configuration["contents"]
    names = ("data_module", "task", "ood_classes", "network", "seed", "accelerator")
    found = {name: configuration[name] for name in names}
    found |= {**configuration["recipe"], "config: data": contents.get("data", {})}
    if configuration["module"] is not None:
        found |= {"module": configuration["module"], "config: module": contents.get("module", {})}
    return found


def source_hashes(configuration: Configuration) -> dict[str, str]:
    """Hashes of the source texts of a user's files, by what they define: ``method NAME``, ``network``, ``module`` or ``data_module``.

    The imports of such a file are not read.
    """
    files: dict[str, str | None] = {}
    for name in (*filter(is_source, configuration.methods or ()), *configuration.method_file):
        module = load_source(name)
        files |= {f"method {method.name}": module.__file__ for method in methods_of(module)}
    for name in ("network", "module", "data_module"):
        path = getattr(configuration, name)
        if path is None or path.startswith("timm:") or not ("." in path or ":" in path):
            continue  # the versions cover networks of this package and of timm
        module_name = path.partition(":")[0] if ":" in path else path.rpartition(".")[0]
        spec = importlib.util.find_spec(module_name)
        files[name] = None if spec is None else spec.origin
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None and Path(file).is_file()
    }


def check_agreement(then: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Check that a run may continue in a directory.

    Args:
        then: The contents of ``run.json``: ``configuration``, ``data``, ``sources`` and ``save_predictions``.
        now: The same for this run.
        directory: The directory.

    Raises:
        InputError: They do not agree.
    """
    shared_seeds = then["data"].keys() & now["data"].keys()
    old_data, new_data = then["configuration"]["data"], now["configuration"]["data"]
    same_data = all(then["data"][seed] == now["data"][seed] for seed in shared_seeds)
    before, after = settings_of(then["configuration"]), settings_of(now["configuration"])
    if same_data or old_data == new_data:  # otherwise the settings differ because the data do
        for name, new in after.items():
            old = before.get(name, new)  # a run without a module has no such entry
            if old != new:
                raise InputError(
                    f"`{name}` is {_shown(new)}, but in the comparison in {directory} it is {_shown(old)}. {WAYS_OUT}"
                )
    if not same_data:
        raise InputError(
            f"`data`: The samples of {new_data} differ from those of {old_data} at the start of the comparison in {directory}. {WAYS_OUT}"
        )
    seeds, earlier = now["configuration"]["seeds"], then["configuration"]["seeds"]
    if seeds < earlier:
        raise InputError(f"`seeds` is {seeds}, but in the comparison in {directory} it is {earlier}. {WAYS_OUT}")
    lacking = [name for name in then["methods"] if name not in now["methods"]]
    if seeds > earlier and lacking:
        raise InputError(
            f"`seeds` is {seeds}, but in the comparison in {directory} it is {earlier}, and its rows of {', '.join(lacking)} would lack the additional "
            f"seeds. Add these methods to `methods`. {WAYS_OUT}"
        )
    for name in then["sources"].keys() & now["sources"].keys():
        if then["sources"][name] != now["sources"][name]:
            argument = "methods" if name.startswith("method ") else name
            what = name if name.startswith("method ") else f"the {name.replace('_', ' ')}"
            raise InputError(
                f"`{argument}`: The file of {what} has changed since the start of the comparison in {directory}. {WAYS_OUT}"
            )
    if now["save_predictions"] and not then["save_predictions"]:
        raise InputError(
            f"`save_predictions` is set, but the comparison in {directory} was started without it, and its networks no longer exist. {WAYS_OUT}"
        )


def merged_configuration(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a comparison after adding methods or seeds."""
    merged = {**then, **{name: value for name, value in now.items() if value is not None}}
    for name in ("methods", "method_file"):
        merged[name] = list(dict.fromkeys([*then[name], *now[name]]))
    merged["contents"] = {**then["contents"], **now["contents"]}
    return merged


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)

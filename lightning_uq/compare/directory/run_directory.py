"""A run's directory: the results of an earlier run, and the state for continuing it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.directory.agreement import (
    WAYS_OUT,
    check_agreement,
    merged_configuration,
    plain_configuration,
    source_hashes,
)
from lightning_uq.compare.directory.writing import RESULTS, STALE, to_json
from lightning_uq.compare.environment import versions
from lightning_uq.compare.planning.plan import Plan
from lightning_uq.compare.planning.tuning import TRIALS
from lightning_uq.compare.records import FOLDER, Record, record_path
from lightning_uq.compare.training.saved_predictions import FOLDER as PREDICTIONS
from lightning_uq.errors import InputError
from lightning_uq.method import Method, Monitor
from lightning_uq.writing import partial_path, replacing

STATE = "run.json"
"""The file that describes the comparison of a directory's records."""

_FORMAT = 2
_OWN = (STATE, TRIALS, *RESULTS, *STALE, f"{FOLDER}/*-*.npz", f"{PREDICTIONS}/*-*.npz")
"""Patterns of a comparison's files."""


@dataclass
class RunDirectory:
    """A directory with the records of a comparison.

    Attributes:
        path: The directory.
        state: The contents of ``run.json``.
    """

    path: Path
    state: dict[str, Any]
    _read: dict[tuple[str, int], Record] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """What a page shows of each method that has a record here or will have one, by name."""
        found: dict[str, dict[str, Any]] = self.state["methods"]
        return found

    @property
    def left_out(self) -> dict[str, str]:
        """The methods without a row, and why: they could not run, or they diverged."""
        diverged: dict[str, dict[str, str]] = self.state["diverged"]
        reasons = {
            name: "; ".join(f"it diverged at seed {seed} ({reason})" for seed, reason in seeds.items())
            for name, seeds in diverged.items()
        }
        return {**self.state["left_out"], **reasons}

    def has(self, method: str, seed: int) -> bool:
        """Whether a method's record for a seed exists."""
        return record_path(self.path, method, seed).is_file()

    def is_done(self, method: str, seed: int) -> bool:
        """Whether a method's record for a seed exists, or cannot exist because its training diverged."""
        return self.has(method, seed) or str(seed) in self.state["diverged"].get(method, {})

    def add_diverged(self, method: str, seed: int, reason: str) -> None:
        """Record that a method diverged, so that it is not trained again."""
        self.state["diverged"].setdefault(method, {})[str(seed)] = reason
        self.save()

    def records(self, seeds: Sequence[int]) -> dict[str, list[Record]]:
        """The existing records, by method.

        Raises:
            InputError: A file is not a record.
        """
        return {name: [self._record(name, seed) for seed in seeds if self.has(name, seed)] for name in self.methods}

    def _record(self, method: str, seed: int) -> Record:
        if (method, seed) not in self._read:
            self._read[method, seed] = Record.load(record_path(self.path, method, seed))
        return self._read[method, seed]

    def save(self) -> None:
        """Write ``run.json``."""
        with replacing(self.path / STATE) as path:
            path.write_bytes(to_json(self.state))

    def discard_if_empty(self) -> None:
        """Remove the files if no training has ended, so that a failed attempt leaves nothing."""
        if not self.has_work:
            remove_own(self.path)

    @property
    def has_work(self) -> bool:
        """Whether any training has ended."""
        return _has_work(self.path, self.state)


def open_run(
    path: Path,
    configuration: Configuration,
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    save_predictions: bool = False,
) -> tuple[RunDirectory, list[str]]:
    """Start a run in a directory, or continue the existing one.

    Args:
        path: An existing directory.
        configuration: The configuration, with defaults filled in.
        plan: The methods of this run.
        resume: Whether to continue an interrupted run.
        overwrite: Whether to remove the files of an earlier comparison.
        save_predictions: Whether predictions are saved.

    Returns:
        The directory, and notes for the user.

    Raises:
        InputError: The directory holds results that do not match this run, or an interrupted run without ``resume`` or ``overwrite``
            being set.
    """
    if resume and overwrite:
        raise InputError("`resume` continues a comparison, and `overwrite` removes it. Pass only one of them.")
    now = _state_of(configuration, plan, save_predictions)
    if overwrite:
        remove_own(path)
    then = _read(path)
    _check_baseline(configuration.baseline, [*(then["methods"] if then else ()), *plan.chosen])
    if then is None:
        _check_foreign(path)
        run = RunDirectory(path, now)
        run.save()
        return run, []
    check_agreement(then, now, path)
    for partial in [one for one in _own_files(path) if one.name.startswith(".")]:
        partial.unlink()  # left by a process that was killed while writing
    before = RunDirectory(path, then)
    seeds = configuration.all_seeds
    unfinished = [name for name in before.methods if not all(before.is_done(name, seed) for seed in seeds)]
    if unfinished and not resume:
        raise InputError(
            f"{path} holds an incomplete comparison: {', '.join(unfinished)} lacks seeds. Continue it with `resume`, or start again with "
            "`overwrite`."
        )
    merged = {**then, **{name: {**then[name], **now[name]} for name in ("data", "sources", "methods")}}
    left_out = {**then["left_out"], **now["left_out"]}
    merged["left_out"] = {name: reason for name, reason in left_out.items() if name not in merged["methods"]}
    merged["configuration"] = merged_configuration(then["configuration"], now["configuration"])
    run = RunDirectory(path, merged)
    run.save()
    return run, _notes(before, plan, seeds)


def remove_own(path: Path) -> None:
    """Remove only the files of a comparison from a directory."""
    for one in _own_files(path):
        one.unlink()
    for folder in (path / FOLDER, path / PREDICTIONS):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _has_work(path: Path, state: Mapping[str, Any]) -> bool:
    return bool(state["diverged"]) or (path / TRIALS).is_file() or any((path / FOLDER).glob("*-*.npz"))


def _check_baseline(baseline: str | None, methods: Sequence[str]) -> None:
    if baseline is not None and baseline not in methods:
        raise InputError(
            f"`baseline` is {baseline!r}, but the compared methods are {', '.join(dict.fromkeys(methods))}. Add it to `methods`."
        )


def _own_files(path: Path) -> Iterator[Path]:
    for pattern in _OWN:
        folder, name = (path / pattern).parent, (path / pattern).name
        for one in (name, partial_path(Path(name)).name):
            yield from sorted(folder.glob(one))


def _state_of(configuration: Configuration, plan: Plan, save_predictions: bool) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "configuration": plain_configuration(configuration, plan.problem),
        "data": {str(seed): marks for seed, marks in plan.marks.items()},
        "sources": source_hashes(configuration),
        "save_predictions": save_predictions,
        "versions": versions(),
        "methods": {name: about(method, plan.monitors.get(method.trainee)) for name, method in plan.chosen.items()},
        "left_out": plan.left_out,
        "diverged": {},
    }


def about(method: Method, monitor: Monitor | None = None) -> dict[str, Any]:
    """What a page shows of a method, as plain data.

    Args:
        method: The method.
        monitor: The validation metric whose best epoch is kept; None: the last weights are kept.
    """
    return {
        "about": method.about,
        "link": method.link,
        "ood_score": method.ood_score,
        "trained_as": method.trained_as,
        "best_by": None if method.reading is None else "last" if monitor is None else monitor.name,
    }


def _read(path: Path) -> dict[str, Any] | None:
    """The contents of ``run.json``; None if there is none, or if no training has ended."""
    file = path / STATE
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        if state["format"] != _FORMAT:
            raise InputError(
                f"{file} has format {state['format']}, but this version reads format {_FORMAT}. {WAYS_OUT}"
            )
        has_work = _has_work(path, state)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not the state of a comparison ({error}). {WAYS_OUT}") from error
    if not has_work:
        remove_own(path)  # left by a run that was killed before its first training ended
        return None
    return state


def _check_foreign(path: Path) -> None:
    """Reject results without a ``run.json``; other files are harmless."""
    found = next((one for one in _own_files(path) if not one.name.startswith(".")), None)
    if found is not None:
        raise InputError(f"`out`: {path} holds {found.name}, but no comparison to continue. {WAYS_OUT}")


def _notes(before: RunDirectory, plan: Plan, seeds: Sequence[int]) -> list[str]:
    notes = []
    there = [name for name in plan.chosen if all(before.has(name, seed) for seed in seeds)]
    if there:
        verb = "is" if len(there) == 1 else "are"
        notes.append(f"{', '.join(there)} {verb} already in {before.path} and not trained again.")
    diverged = [name for name in plan.chosen if name in before.state["diverged"]]
    if diverged:
        verb = "is" if len(diverged) == 1 else "are"
        notes.append(
            f"{', '.join(diverged)} diverged in {before.path}, and {verb} not trained again. To start again, use `overwrite`."
        )
    kept = [name for name in before.methods if name not in plan.chosen]
    if kept:
        notes.append(f"The rows of {', '.join(kept)} in {before.path} are kept.")
    then, now = before.state["versions"], versions()
    changed = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        notes.append(f"The records in {before.path} were made with other versions: {'; '.join(changed)}.")
    return notes

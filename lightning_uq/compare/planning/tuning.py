"""Tuning: for each trained method and seed, the same number of settings is drawn, and the one with the best validation metric is compared.

The settings of all methods are the learning rate and the weight decay of the shared optimizer. A method may have more (``setting.choose`` in its ``build``). The first trial
uses the recipe's own settings, so tuning never chooses settings with a worse validation metric than theirs. A trial trains on the training rows of its seed and is
evaluated on the seed's validation rows. No test row therefore affects the settings with which it is predicted, even if each seed has its own split.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.planning.plan import Job, Plan
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.method import Method, Setting
from lightning_uq.writing import replacing

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import Trial

TRIALS = "trials.json"
"""The file of all trials in a run's directory."""

LEARNING_RATES = (3e-4, 1e-2)
"""The range of learning rates, drawn evenly on a logarithmic scale."""

WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
"""The choices of weight decays."""


def check_optuna() -> None:
    """Check that Optuna is installed, before any training.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            "`tune` needs Optuna, which is not installed. Install the extra `tune`: pip install 'lightning-uq[tune]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def choices_of(method: Method, setting: Setting) -> dict[str, tuple[Any, ...]]:
    """The method's own settings, with their possible values; the first one is the default."""
    asked = replace(setting, tuned={}, choices={})
    with seeded(0):
        method.make_module(asked)
    return asked.choices


def space(configuration: Configuration, own: Mapping[str, tuple[Any, ...]]) -> "dict[str, BaseDistribution]":
    """The distribution of each setting of a method, by name.

    Args:
        configuration: The configuration, with the shared settings.
        own: The method's own settings.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    rate, decay = configuration.recipe.learning_rate, configuration.recipe.weight_decay
    return {
        "learning_rate": FloatDistribution(min(rate, LEARNING_RATES[0]), max(rate, LEARNING_RATES[1]), log=True),
        "weight_decay": CategoricalDistribution(sorted({decay, *WEIGHT_DECAYS})),
        **{name: CategoricalDistribution(values) for name, values in own.items()},
    }


@dataclass
class _Search:
    """The study of one method on one seed, and its running trial."""

    study: "Study"
    space: "dict[str, BaseDistribution]"
    running: "Trial | None" = None


@dataclass
class Tuning:
    """The trials of all trained methods, including those of an earlier run.

    Attributes:
        directory: The run's directory.
        configuration: The configuration; its recipe has the number of trials.
        plan: The methods.
        kept: For each method, ``{"mode": "min", "seeds": {"0": [trial, ...], ...}}``, where a finished trial is
            ``{"settings": {...}, "value": v, "epochs": n, "seconds": t}``, with a value of None if the training diverged.
    """

    directory: Path
    configuration: Configuration
    plan: Plan
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    _searches: dict[tuple[str, int], _Search] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.directory / TRIALS
        if self.configuration.recipe.tune and file.is_file():
            try:
                self.kept = json.loads(file.read_text())["methods"]
            except (KeyError, ValueError, TypeError) as error:
                raise InputError(f"{file} holds no trials ({error}). Start again with `overwrite`.") from error

    def tunes(self, trainee: str) -> bool:
        """Whether a method has trials. A user's own LightningModule has its own optimizer and no trials."""
        has_judge = self.plan.monitors.get(trainee) is not None
        return self.configuration.recipe.tune > 0 and has_judge and self.plan.known[trainee].reading is None

    def left(self, trainee: str, seed: int) -> int:
        """The number of a method's remaining trials on a seed."""
        return self.configuration.recipe.tune - len(self._trials(trainee, seed)) if self.tunes(trainee) else 0

    def _trials(self, trainee: str, seed: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.kept.get(trainee, {"seeds": {}})["seeds"].get(str(seed), [])
        return found

    def next_job(self, job: Job) -> Job:
        """The next trial before a job, or, if all are done, the job itself with the settings of the best trial."""
        if not self.left(job.trainee, job.seed):
            return replace(job, settings=tuple(self.chosen(job.trainee, job.seed).items()))
        key = job.trainee, job.seed
        if key not in self._searches:
            self._searches[key] = self._search(*key)
        search = self._searches[key]
        search.running = search.study.ask(search.space)
        return Job(job.trainee, (), job.seed, tuple(search.running.params.items()))

    def tell(self, job: Job, value: float | None, epochs: int, seconds: float) -> None:
        """Record the result of a trial, and write it to the run's directory."""
        value = None if value is None or not math.isfinite(value) else value
        search = self._searches[job.trainee, job.seed]
        assert search.running is not None
        _report_value(search.study, search.running, value)
        trial = {"settings": dict(job.settings), "value": value, "epochs": epochs, "seconds": seconds}
        monitor = self.plan.monitors[job.trainee]
        assert monitor is not None
        of_method = self.kept.setdefault(job.trainee, {"mode": monitor.mode, "seeds": {}})
        of_method["seeds"].setdefault(str(job.seed), []).append(trial)
        with replacing(self.directory / TRIALS) as path:
            path.write_text(json.dumps({"methods": self.kept}, indent=2) + "\n")

    def _best(self, trainee: str, seed: int) -> dict[str, Any] | None:
        """The best trial on a seed; None if no trial of the method ended well."""
        good = [trial for trial in self._trials(trainee, seed) if trial["value"] is not None]
        choose = max if good and self.kept[trainee]["mode"] == "max" else min
        return choose(good, key=lambda trial: trial["value"], default=None)

    def chosen(self, trainee: str, seed: int) -> dict[str, Any]:
        """The settings of the best trial on a seed; empty if no trial of the method ended well."""
        best = self._best(trainee, seed)
        return {} if best is None else dict(best["settings"])

    def outcome(self, trainee: str, seed: int) -> str:
        """A sentence about the best trial on a seed."""
        best, monitor, count = self._best(trainee, seed), self.plan.monitors[trainee], len(self._trials(trainee, seed))
        who = f"{trainee}, seed {seed}"
        if best is None or monitor is None:
            return f"{who}: all {count} trials diverged, so it keeps the settings of the recipe."
        settings = ", ".join(f"{name} = {setting_text(value)}" for name, value in best["settings"].items())
        return f"{who}: the best of {count} trials has {settings} ({monitor.name} {best['value']:.4g})."

    def _search(self, trainee: str, seed: int) -> _Search:
        """A study in its state after the recorded trials, whose draws follow from the seed and the values."""
        import optuna

        monitor = self.plan.monitors[trainee]
        assert monitor is not None
        recipe = self.configuration.recipe
        own = choices_of(self.plan.known[trainee], self.plan.problem.setting)
        study = optuna.create_study(
            direction="maximize" if monitor.mode == "max" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        first = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        study.enqueue_trial({**first, **{name: values[0] for name, values in own.items()}})
        search = _Search(study, space(self.configuration, own))
        for kept in self._trials(trainee, seed):
            trial = study.ask(search.space)
            if trial.params != kept["settings"]:
                raise InputError(
                    f"{self.directory / TRIALS} holds other trials of {trainee} than this version of Optuna draws. Continue with the version that drew "
                    "them, or start again with `overwrite`."
                )
            _report_value(study, trial, kept["value"])
        return search


def setting_text(value: Any) -> str:
    """The value of a setting, as printed on a page."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report_value(study: "Study", trial: "Trial", value: float | None) -> None:
    from optuna.trial import TrialState

    if value is None:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def tuned_configuration(
    configuration: Configuration, settings: Mapping[str, Any]
) -> tuple[Configuration, dict[str, Any]]:
    """The configuration with a trial's settings in its recipe, and the method's own settings."""
    shared = {name: settings[name] for name in ("learning_rate", "weight_decay") if name in settings}
    own = {name: value for name, value in settings.items() if name not in shared}
    return replace(configuration, recipe=replace(configuration.recipe, **shared)), own

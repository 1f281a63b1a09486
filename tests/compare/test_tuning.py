"""Settings are drawn alike for all methods, judged by validation data alone, and kept from run to run."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_uq import DeterministicModule, Method
from lightning_uq.compare import Configuration, Interrupted, Progress, Recipe, RunOptions, compare
from lightning_uq.compare.jobs import jobs
from lightning_uq.compare.planning import discovery
from lightning_uq.compare.planning import plan as plan_module
from lightning_uq.compare.planning.tuning import LEARNING_RATES, WEIGHT_DECAYS
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.training import training
from lightning_uq.data import DiabetesDataModule
from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.method import Monitor, Setting
from tests.compare.runs import TIMES

pytest.importorskip("optuna")
QUICK = Configuration(
    data="diabetes", methods=("gaussian", "conformal", "dropout"), seeds=2, recipe=Recipe(max_epochs=1, tune=3)
)


class Log(Progress):
    def __init__(self):
        self.trained_seeds, self.begun, self.trials, self.notes = [], None, [], []

    def trial(self, method, seed, number, count):
        self.trials.append((method, seed, number, count))

    def note(self, text):
        self.notes.append(text)

    def start(self, trainings, epochs, done):
        self.begun = trainings, done

    def trained(self, method, seed, epochs, seconds):
        self.trained_seeds.append((method, seed))


def trials(folder):
    found = json.loads((folder / "trials.json").read_text())
    for one in found["methods"].values():
        for trial in (trial for of_seed in one["seeds"].values() for trial in of_seed):
            assert trial.pop("seconds") > 0
    return {name: one["seeds"] for name, one in found["methods"].items()}


def rows(comparison):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in comparison.rows]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder, log = tmp_path_factory.mktemp("tuned"), Log()
    return compare(QUICK, log, folder), log, folder


def test_trials_are_numbered_and_their_outcome_is_told(tuned):
    comparison, log, _ = tuned
    names = ("dropout", "gaussian")
    assert sorted(log.trials) == [(name, seed, number, 3) for name in names for seed in (0, 1) for number in (1, 2, 3)]
    assert "4 trainings for 3 methods with 2 seeds: some methods use the network of another one." in log.notes
    for name in names:
        for seed in (0, 1):
            (said,) = (note for note in log.notes if note.startswith(f"{name}, seed {seed}: the best of 3 trials has "))
            assert f"learning_rate = {comparison.tuned[name][seed]['learning_rate']:.4g}, weight_decay" in said
            assert "(val_nll " in said


def test_each_trained_method_has_the_same_number_of_trials_with_each_seed(tuned):
    _, log, folder = tuned
    assert log.begun == (2 * 2 * (3 + 1), 0)
    assert log.trained_seeds == [(name, seed) for name in ("gaussian", "dropout") for seed in (0, 0, 0, 0, 1, 1, 1, 1)]
    found = trials(folder)
    assert list(found) == ["gaussian", "dropout"]
    for name, seeds in found.items():
        own = {"dropout": 0.02} if name == "dropout" else {}
        assert {seed: len(one) for seed, one in seeds.items()} == {"0": 3, "1": 3}
        for one in seeds.values():
            assert one[0]["settings"] == {"learning_rate": 2e-3, "weight_decay": 0.0, **own}
            assert len({json.dumps(trial["settings"]) for trial in one}) > 1
            for trial in one:
                assert LEARNING_RATES[0] <= trial["settings"]["learning_rate"] <= LEARNING_RATES[1]
                assert trial["settings"]["weight_decay"] in WEIGHT_DECAYS
                assert trial["epochs"] == 1


def test_the_best_trial_of_each_seed_is_compared(tuned):
    comparison, _, folder = tuned
    results, found = comparison.results(statistics=False), trials(folder)
    best = {
        name: [min(one, key=lambda trial: trial["value"])["settings"] for one in seeds.values()]
        for name, seeds in found.items()
    }
    assert results["tuned"] == {"gaussian": best["gaussian"], "conformal": best["gaussian"], "dropout": best["dropout"]}
    assert results["notes"] == []
    assert "--tune 3" in results["command"]
    # A run of one seed whose recipe has these settings gives the same numbers.
    for seed, settings in enumerate(best["gaussian"]):
        recipe = Recipe(max_epochs=1, learning_rate=settings["learning_rate"], weight_decay=settings["weight_decay"])
        alone = compare(replace(QUICK, methods=("gaussian", "conformal"), recipe=recipe, seed=seed, seeds=1))
        for mine, others in zip(alone.rows, comparison.rows[:2], strict=True):
            assert mine["nll"]["mean"] == others["nll"]["seeds"][seed]


def test_a_trial_sees_no_test_row_of_its_seed(monkeypatch):
    """The settings with which a seed's test rows are predicted follow from its training and validation rows alone."""
    seen = []
    original = training.train

    def watching(trainee, readers, problem, seed, *arguments, **options):
        if not readers:
            seen.append(seed)
            monkeypatch.setattr(type(problem.data), "test_dataloader", refuse)
        try:
            return original(trainee, readers, problem, seed, *arguments, **options)
        finally:
            monkeypatch.setattr(type(problem.data), "test_dataloader", loader)

    def refuse(self):
        raise AssertionError("a trial reads test rows")

    loader = DiabetesDataModule.test_dataloader
    monkeypatch.setattr(jobs, "train", watching)
    compare(replace(QUICK, methods=("gaussian",), recipe=Recipe(max_epochs=1, tune=2)))
    assert seen == [0, 0, 1, 1]


def test_the_value_of_a_trial_is_the_best_validation_metric(tuned):
    """Recomputed by a training with the seed, whose one epoch is the best one."""
    configuration = replace(QUICK, recipe=Recipe(max_epochs=1))
    problem = make_problem(configuration, 1)
    gaussian = discovery.methods("regression")["gaussian"]
    module = training.train(gaussian, [], problem, 1, configuration, Progress(), monitor=Monitor("val_nll")).module
    x, y = problem.data.dataset("val").tensors
    with torch.no_grad():
        prediction = module.predict(x)
    expected = -float(prediction.log_prob(y).double().mean())
    assert trials(tuned[2])["gaussian"]["1"][0]["value"] == pytest.approx(expected, rel=1e-4)


def test_further_seeds_are_tuned_on_their_own(tuned, tmp_path):
    gaussian = replace(QUICK, methods=("gaussian",))
    compare(replace(gaussian, seeds=1), None, tmp_path)
    log = Log()
    more = compare(gaussian, log, tmp_path, RunOptions(resume=True))
    assert log.begun == (8, 4)
    assert log.trained_seeds == [("gaussian", 1)] * 4
    assert rows(more) == rows(tuned[0])[:1]


def test_rows_that_are_not_tuned_are_told():
    """A module of one's own has its own optimizer."""
    both = replace(QUICK, module="tests.compare.users_modules:LitRegressor", methods=("module", "gaussian"), seeds=1)
    results = compare(replace(both, recipe=Recipe(max_epochs=1, tune=1))).results()
    assert [row["method"] for row in results["rows"]] == ["module", "gaussian"]
    assert results["notes"][0].startswith("Not tuned: module. ")
    assert results["verdict"][-1] == "Not all methods were tuned: module ran with fixed settings."


def test_resumed_tuning_draws_and_finds_the_same(tuned, tmp_path):
    class Stop(Log):
        def training(self, method, seed):
            if len(self.trained_seeds) == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted after 2 of 16 trainings. Continue with --resume."):
        compare(QUICK, Stop(), tmp_path)
    assert len(trials(tmp_path)["gaussian"]["0"]) == 2
    with pytest.raises(InputError, match="Continue it with `resume`, or start again with `overwrite`"):
        compare(QUICK, None, tmp_path)
    log = Log()
    resumed = compare(QUICK, log, tmp_path, RunOptions(resume=True))
    assert log.begun == (16, 2)
    assert len(log.trained_seeds) == 14
    assert rows(resumed) == rows(tuned[0])
    assert trials(tmp_path) == trials(tuned[2])


@pytest.mark.slow
def test_several_processes_find_the_same(tuned, tmp_path):
    found = compare(QUICK, None, tmp_path, RunOptions(jobs=2))
    assert rows(found) == rows(tuned[0])
    together, alone = trials(tmp_path), trials(tuned[2])
    assert together == alone


def test_a_method_that_joins_reads_the_settings_that_were_chosen(tmp_path, tuned):
    one = replace(QUICK, seeds=1, recipe=Recipe(max_epochs=1, tune=2))
    compare(replace(one, methods=("gaussian",)), None, tmp_path)
    before, log = trials(tmp_path), Log()
    joined = compare(replace(one, methods=("conformal",)), log, tmp_path)
    assert log.trained_seeds == [("gaussian", 0)]
    assert trials(tmp_path) == before
    names = joined.results(statistics=False)["tuned"]
    assert names["conformal"] == names["gaussian"] != [{}]
    assert joined.rows[0]["nll"] == joined.rows[1]["nll"]  # the same network
    with pytest.raises(InputError, match="`tune` is 3, but in the comparison in .* it is 2"):
        compare(replace(one, recipe=Recipe(max_epochs=1, tune=3)), None, tmp_path)


def test_a_training_that_diverges_is_a_trial_that_failed(tmp_path, monkeypatch):
    """With a scale that makes the loss infinite; the other value is chosen."""
    seen = []

    def build(setting: Setting):
        seen.append(dict(setting.tuned))
        return DeterministicModule(Scaled(setting.network(), setting.choose("scale", 1.0, np.inf)), **setting.training)

    method = Method(name="scaled", build=build, ood_score="variance", tasks=("regression",))
    known = {**discovery.methods("regression"), "scaled": method}
    monkeypatch.setattr(plan_module, "methods", lambda task="classification": dict(known))
    comparison = compare(
        replace(QUICK, methods=("scaled",), seeds=1, recipe=Recipe(max_epochs=1, tune=6)), None, tmp_path
    )
    found = trials(tmp_path)["scaled"]["0"]
    values = {trial["settings"]["scale"]: trial["value"] for trial in found}
    assert values[np.inf] is None
    assert np.isfinite(values[1.0])
    assert comparison.results(statistics=False)["tuned"]["scaled"][0]["scale"] == 1.0
    assert seen[-1]["scale"] == 1.0


class Scaled(torch.nn.Module):
    def __init__(self, network, scale):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x):
        return self.network(x) * self.scale


def test_without_optuna_nothing_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"`tune` needs Optuna.*pip install 'lightning-uq\[tune\]'"):
        compare(QUICK, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Recipe(tune=-1)}, "`tune` must not be negative, but it is -1"),
        ({"data": "testbed", "problem": "x.npz", "recipe": Recipe(tune=1)}, "data='testbed' takes no `tune`"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Configuration(**changes)

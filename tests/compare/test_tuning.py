"""Settings are drawn alike for all methods, judged by validation data of another seed, and kept from run to run."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_uq import DeterministicModule, Method
from lightning_uq.compare import Configuration, Interrupted, Progress, Recipe, RunOptions, compare
from lightning_uq.compare.planning import discovery
from lightning_uq.compare.planning import plan as plan_module
from lightning_uq.compare.planning.tuning import LEARNING_RATES, WEIGHT_DECAYS
from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.method import Setting
from tests.compare.runs import TIMES

pytest.importorskip("optuna")
QUICK = Configuration(
    data="diabetes", methods=("gaussian", "conformal", "dropout"), seeds=2, recipe=Recipe(max_epochs=1, tune=3)
)


class Log(Progress):
    def __init__(self):
        self.trained_seeds, self.begun = [], None

    def start(self, trainings, epochs, done):
        self.begun = trainings, done

    def trained(self, method, seed, epochs, seconds):
        self.trained_seeds.append((method, seed))


def trials(folder):
    found = json.loads((folder / "trials.json").read_text())
    for one in found["methods"].values():
        for trial in one["trials"]:
            assert trial.pop("seconds") > 0
    return found


def rows(comparison):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in comparison.rows]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder, log = tmp_path_factory.mktemp("tuned"), Log()
    return compare(QUICK, log, folder), log, folder


def test_each_trained_method_has_the_same_number_of_trials_on_a_seed_of_their_own(tuned):
    _, log, folder = tuned
    assert log.begun == (2 * 3 + 2 * 2, 0)
    assert log.trained_seeds == [(name, seed) for name in ("gaussian", "dropout") for seed in (2, 2, 2, 0, 1)]
    found = trials(folder)
    assert found["seed"] == 2
    assert {name: len(one["trials"]) for name, one in found["methods"].items()} == {"gaussian": 3, "dropout": 3}
    for name, one in found["methods"].items():
        own = {"dropout": 0.02} if name == "dropout" else {}
        assert one["trials"][0]["settings"] == {"learning_rate": 2e-3, "weight_decay": 0.0, **own}
        assert len({json.dumps(trial["settings"]) for trial in one["trials"]}) > 1
        for trial in one["trials"]:
            assert LEARNING_RATES[0] <= trial["settings"]["learning_rate"] <= LEARNING_RATES[1]
            assert trial["settings"]["weight_decay"] in WEIGHT_DECAYS
            assert trial["epochs"] == 1


def test_the_best_trial_is_compared(tuned):
    comparison, _, folder = tuned
    results, found = comparison.results(statistics=False), trials(folder)["methods"]
    best = {name: min(one["trials"], key=lambda trial: trial["value"])["settings"] for name, one in found.items()}
    assert results["tuned"] == {"gaussian": best["gaussian"], "conformal": best["gaussian"], "dropout": best["dropout"]}
    assert "--tune 3" in results["command"]
    # A run whose recipe has these settings gives the same numbers.
    settings = best["gaussian"]
    recipe = Recipe(max_epochs=1, learning_rate=settings["learning_rate"], weight_decay=settings["weight_decay"])
    alone = compare(replace(QUICK, methods=("gaussian", "conformal"), recipe=recipe))
    assert rows(alone) == rows(comparison)[:2]


def test_the_value_of_a_trial_is_the_best_validation_metric(tuned):
    """Recomputed by a training of the tuning seed, whose one epoch is the best one."""
    from lightning_uq.compare.problem import make_problem
    from lightning_uq.compare.training.training import train

    configuration = replace(QUICK, recipe=Recipe(max_epochs=1))
    problem = make_problem(configuration, 2)
    gaussian = discovery.methods("regression")["gaussian"]
    module = train(gaussian, [], problem, 2, configuration, Progress()).module
    x, y = problem.data.dataset("val").tensors
    with torch.no_grad():
        prediction = module.predict(x)
    expected = -float(prediction.log_prob(y).double().mean())
    assert trials(tuned[2])["methods"]["gaussian"]["trials"][0]["value"] == pytest.approx(expected, rel=1e-4)


def test_resumed_tuning_draws_and_finds_the_same(tuned, tmp_path):
    class Stop(Log):
        def training(self, method, seed):
            if len(self.trained_seeds) == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted after 2 of 10 trainings. Go on with --resume."):
        compare(QUICK, Stop(), tmp_path)
    assert len(trials(tmp_path)["methods"]["gaussian"]["trials"]) == 2
    with pytest.raises(InputError, match="Go on with `resume`, or start anew with `overwrite`"):
        compare(QUICK, None, tmp_path)
    log = Log()
    resumed = compare(QUICK, log, tmp_path, RunOptions(resume=True))
    assert log.begun == (10, 2)
    assert len(log.trained_seeds) == 8
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
    assert names["conformal"] == names["gaussian"] != {}
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
    found = trials(tmp_path)["methods"]["scaled"]["trials"]
    values = {trial["settings"]["scale"]: trial["value"] for trial in found}
    assert values[np.inf] is None
    assert np.isfinite(values[1.0])
    assert comparison.results(statistics=False)["tuned"]["scaled"]["scale"] == 1.0
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

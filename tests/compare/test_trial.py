"""Methods that cannot run are found before the first training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_uq.cli import main
from lightning_uq.compare import Configuration, Progress, Recipe, compare
from lightning_uq.compare.planning.discovery import load_file, methods, methods_of
from lightning_uq.compare.planning.plan import make_plan
from lightning_uq.compare.planning.trial import try_methods
from lightning_uq.compare.problem import make_problem
from lightning_uq.errors import InputError

ONE = {"seeds": 1, "recipe": Recipe(max_epochs=1)}
BAD = """
import torch
from lightning_uq import DeterministicModule, Method

def build(setting):
    return DeterministicModule(setting.network, task=setting.task, optimizer=torch.optim.Adam, loss=fails)

def fails(output, target):
    raise KeyError("no such thing")

def build_good(setting):
    return DeterministicModule(setting.network, task=setting.task)

METHODS = [
    Method(name="mine", build=build_good, ood_score="energy"),
    Method(name="broken", build=build, ood_score="energy"),
]
"""


class Trainings(Progress):
    def __init__(self):
        self.names = []

    def training(self, method, seed):
        self.names.append(method)


@pytest.fixture
def file(tmp_path):
    path = Path(tmp_path) / f"methods_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(BAD)
    return str(path)


@pytest.mark.parametrize("data", ["digits", "diabetes"])
def test_all_methods_of_the_package_run_on_the_embedded_data(data):
    plan = make_plan(Configuration(data=data, **ONE))
    assert plan.left_out == {}
    assert len(plan.chosen) > 9


def test_a_named_method_that_fails_is_an_error_before_any_training(file):
    log = Trainings()
    with pytest.raises(InputError, match=r"methods: broken cannot run on digits .*KeyError: 'no such thing'"):
        compare(Configuration(methods=("softmax", file), **ONE), log)
    assert log.names == []


def test_dropout_needs_dropout_layers():
    arguments = {"data": "digits", "network": "tests.compare.test_trial:plain", **ONE}
    with pytest.raises(InputError, match=r"methods: dropout cannot run .*no dropout layers"):
        make_plan(Configuration(methods=("softmax", "dropout"), **arguments))
    plan = make_plan(Configuration(**arguments))
    assert "no dropout layers" in plan.left_out["dropout"]
    assert "dropout" not in plan.chosen
    assert "softmax" in plan.chosen


def test_results_tell_what_was_left_out(tmp_path):
    path = tmp_path / f"left_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(BAD)
    method = next(one for one in methods_of(load_file(str(path))) if one.name == "broken")
    known = {"softmax": methods()["softmax"], "broken": method}
    problem = make_problem(Configuration(**ONE), 0)
    groups = {name: [one] for name, one in known.items()}
    left_out = try_methods(groups, known, set(), problem, Configuration(**ONE))
    assert left_out == {"broken": "KeyError: 'no such thing'"}
    done = compare(Configuration(methods=("softmax",), **ONE))
    assert replace(done, left_out=left_out).results()["left_out"] == left_out
    with pytest.raises(InputError, match="No method can run on digits. broken: KeyError"):
        try_methods({"broken": [method]}, known, set(), problem, Configuration(**ONE))


def plain(num_outputs, in_features):
    return torch.nn.Sequential(torch.nn.Linear(in_features, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_outputs))


@pytest.mark.parametrize(("data", "held_out"), [("digits", (8, 9)), ("diabetes", None), ("shapes", None)])
def test_the_filled_configuration_opens_the_same_data(data, held_out):
    """Each training opens its data with it: the crosses of the shapes are out of distribution, but no argument."""
    configuration = Configuration(data=data, **ONE)
    opened = configuration.make_data(0)
    filled = configuration.filled(opened, ("softmax",))
    assert filled.ood_classes == held_out
    again = filled.make_data(0)
    assert list(again.ood_dataloaders()) == list(opened.ood_dataloaders())
    assert torch.equal(again.test_rows, opened.test_rows)


def test_a_trial_leaves_random_states_and_results_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    make_plan(Configuration(methods=("softmax",), **ONE))
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_by_name_through_the_command_line(tmp_path, capsys):
    """A factory of one's own, and a network of timm on images of a data module of one's own."""
    pytest.importorskip("timm")
    config = tmp_path / "data.yaml"
    config.write_text("data: {init_args: {num: 60}}")
    letters = ["--data-module", "tests.compare.users_modules:LettersData", "--config", str(config)]
    for network, data in (("tests.compare.test_trial:plain", []), ("timm:test_resnet", letters)):
        out = tmp_path / network.replace(":", "_")
        arguments = ["--network", network, "--methods", "softmax", "--seeds", "1", "--max-epochs", "1"]
        main(["compare", *arguments, *data, "--out", str(out)])
        results = json.loads((out / "results.json").read_text())
        assert results["problem"]["network"] == network
        assert results["rows"][0]["nll"]["mean"] > 0
    assert "Wrote results.json" in capsys.readouterr().out


def test_methods_of_a_file_come_beside_the_others(file):
    good = Path(file).with_name(f"good_{Path(file).name}")
    good.write_text(BAD.replace('    Method(name="broken", build=build, ood_score="energy"),\n', ""))
    plan = make_plan(Configuration(methods=("softmax",), method_file=(str(good),), **ONE))
    assert list(plan.chosen) == ["softmax", "mine"]
    plan = make_plan(Configuration(methods=(str(good),), method_file=(str(good),), **ONE))
    assert list(plan.chosen) == ["mine"]
    plan = make_plan(Configuration(method_file=(str(good),), **ONE))
    assert {"softmax", "ensemble", "mine"} <= set(plan.chosen)
    with pytest.raises(InputError, match="`method_file` must hold paths"):
        make_plan(Configuration(method_file=("softmax",), **ONE))

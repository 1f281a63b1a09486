"""The methods of each task: what they say of themselves, which are compared by default, and detection for regression."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.compare import Configuration, Recipe, compare
from lightning_uq.compare.environment import command_line
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.compare.planning.plan import choose_methods, make_plan
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.results import make_results
from lightning_uq.data import DiabetesDataModule
from lightning_uq.data.opening import BUILT_IN

TASKS = ("classification", "binary", "multilabel", "segmentation", "regression")


@pytest.mark.parametrize("task", TASKS)
def test_every_method_says_what_it_is(task):
    for method in methods(task).values():
        assert 10 < len(method.about) < 110, method.name
        assert method.link is not None, method.name
        assert method.link.startswith("https://"), method.name
        if method.detects_only:
            assert method.trained_as in methods(task)


def test_detectors_are_compared_by_default_where_there_is_something_to_detect():
    with_outside = choose_methods(Configuration(), make_problem(Configuration(), 0))[0]
    without = choose_methods(Configuration(), make_problem(Configuration(ood_classes=()), 0))[0]
    assert set(with_outside) - set(without) == {"energy", "density", "ddu", "relative_mahalanobis", "knn", "vim"}
    assert (
        "knn"
        in choose_methods(
            Configuration(data="diabetes", methods=("knn",)), make_problem(Configuration(data="diabetes"), 0)
        )[0]
    )


@pytest.mark.parametrize("data", BUILT_IN)
def test_a_configuration_that_was_filled_in_makes_the_same_data(data):
    configuration = Configuration(data=data)
    first = configuration.make_data(3)
    again = configuration.filled(first, ("softmax",)).make_data(3)
    assert torch.equal(first.dataset("train").tensors[0], again.dataset("train").tensors[0])
    assert list(first.ood_dataloaders()) == list(again.ood_dataloaders())


def test_the_rows_of_maps_are_images():
    quick = Configuration(data="shapes", methods=("evidential",), seeds=1, recipe=Recipe(max_epochs=1))
    comparison = compare(quick)
    num = len(comparison.problem.data.dataset("test"))
    for (record,) in comparison.records.values():
        assert {len(score) for score in record.rows.values()} == {num}
    assert all(0 < row["iou"]["mean"] < 1 and "coverage" not in row for row in comparison.rows)


@pytest.mark.parametrize("detector", [name for name, one in methods().items() if one.detects_only])
def test_a_detector_predicts_what_its_network_predicts(detector):
    quick = Configuration(methods=("softmax", detector), seeds=1, recipe=Recipe(max_epochs=1))
    softmax, other = (record[0] for record in compare(quick).records.values())
    assert {name for name, score in softmax.rows.items() if not torch.equal(score, other.rows[name])} == {"ood_score"}


class FarPatients(DiabetesDataModule):
    """Diabetes, and patients with measurements ten times as far from the mean."""

    def ood_dataloaders(self):
        x = self.dataset("test").tensors[0]
        return {"far": DataLoader(TensorDataset(10 * x + 5, torch.zeros(len(x))), batch_size=64)}


def test_regression_detects_where_there_are_inputs_to_detect(monkeypatch):
    def far(configuration, seed):
        data = FarPatients(seed=seed, batch_size=32)
        data.setup()
        return data

    monkeypatch.setattr(Configuration, "make_data", far)
    quick = Configuration(data="diabetes", methods=("gaussian", "knn", "laplace"), seeds=1, recipe=Recipe(max_epochs=3))
    rows = {row["method"]: row for row in compare(quick).rows}
    assert rows["knn"]["nll"] == rows["gaussian"]["nll"]
    assert rows["knn"]["ood_auroc"] != rows["gaussian"]["ood_auroc"]
    assert rows["laplace"]["ood_auroc"]["mean"] > 0.9
    assert all(0 <= row["ood_fpr95"]["mean"] <= 1 for row in rows.values())


@pytest.mark.parametrize(("task", "shape"), [("binary", (300,)), ("multilabel", (300, 3))])
def test_labels_have_columns_and_a_temperature(tmp_path, task, shape):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 4)).astype("float32")
    y = (x[:, : len(shape) * 2 - 1].reshape(shape if len(shape) > 1 else (300,)) + draw.normal(size=shape) > 0).astype(
        "int64"
    )
    np.savez(tmp_path / "labels.npz", x=x, y=y)
    quick = Configuration(
        data=str(tmp_path / "labels.npz"),
        task=task,
        methods=("sigmoid", "temperature"),
        seeds=1,
        recipe=Recipe(max_epochs=3),
    )
    sigmoid, temperature = compare(quick).rows
    keys = {"binary": {"accuracy"}, "multilabel": {"hamming", "subset_accuracy"}}[task]
    for row in (sigmoid, temperature):
        assert keys | {"nll", "brier", "ece", "auroc", "average_precision"} <= set(row)
        assert row["auroc"]["mean"] > 0.6
    assert sigmoid["auroc"] == temperature["auroc"]  # a temperature does not change the order
    assert sigmoid["nll"] != temperature["nll"]


@pytest.mark.parametrize(("data", "epochs"), [("diabetes", (300, 30)), ("digits", (100, 10))])
def test_epochs_that_are_not_given_are_those_of_the_task(data, epochs):
    configuration = Configuration(data=data, methods=("gaussian" if data == "diabetes" else "softmax",), seeds=1)
    plan = make_plan(configuration)
    recipe = make_results(configuration, plan.problem, {}, {})["configuration"]["recipe"]
    assert (plan.epochs, recipe["max_epochs"], recipe["patience"]) == (epochs[0], *epochs)
    given = Configuration(data=data, methods=configuration.methods, seeds=1, recipe=Recipe(max_epochs=100))
    assert make_plan(given).epochs == 100
    assert "--max-epochs 100" in command_line(given)
    assert "--max-epochs" not in command_line(configuration)

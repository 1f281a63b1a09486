"""Each number of the table is that of the package's metric, whatever the batches, and weights count as copies of rows."""

import pytest
import torch

from lightning_uq import metrics
from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.differences import find_differences
from lightning_uq.compare.statistics.measures import MEASURES, find_single_rows, measured
from lightning_uq.tasks import (
    Binary,
    CategoricalRegression,
    Classification,
    EvidentialClassification,
    EvidentialRegression,
    Multilabel,
    PixelRegression,
    Regression,
    Segmentation,
)

NAN = float("nan")
NAMES = {"miou": "iou"}
"""Keys of the table, by the names of the tasks' metrics, where they differ."""
NO_COLUMN = {"joint_log_loss", "unpredicted_classes", "coverage_95", "pinball"}
NUM = 40


def with_missing(target):
    """A target of whose rows one misses some numbers, and another all."""
    target = target.clone()
    target[3] = NAN
    target.flatten(1)[5, 0] = NAN
    return target


def ignoring(labels, value):
    labels = labels.clone()
    labels[2] = value
    labels[4, 1:] = value
    return labels


def quantiles(shape):
    return torch.randn(2, *shape).sort(-1).values


def class_maps():
    return torch.randint(3, (NUM, 4, 5))


def cases():
    torch.manual_seed(0)
    numbers, horizon = torch.randn(NUM, 2), torch.randn(NUM, 3, 2)
    labels = torch.randint(2, (NUM, 3)).float()
    return {
        "classification": (Classification(), 2 * torch.randn(4, NUM, 3), torch.randint(3, (NUM,))),
        "tied classes": (Classification(), torch.zeros(1, NUM, 3), torch.randint(3, (NUM,))),
        "evidential": (EvidentialClassification(), torch.randn(1, NUM, 3), torch.randint(3, (NUM,))),
        "binary": (Binary(), 3 * torch.randn(4, NUM, 1), torch.randint(2, (NUM, 1)).float()),
        "binary, saturated": (Binary(), 40 * torch.randn(1, NUM), torch.randint(2, (NUM,))),
        "multilabel": (Multilabel(), 2 * torch.randn(4, NUM, 3), labels),
        "multilabel, unknown": (Multilabel(ignore_index=-7), torch.randn(1, NUM, 3), ignoring(labels, -7.0)),
        "multilabel, one value": (Multilabel(), torch.randn(1, NUM, 3), labels * torch.tensor([1.0, 0.0, 1.0])),
        "maps": (Segmentation(), torch.randn(2, NUM, 3, 4, 5), class_maps()),
        "maps, ignored": (Segmentation(ignore_index=255), torch.randn(2, NUM, 3, 4, 5), ignoring(class_maps(), 255)),
        "maps, class ignored": (Segmentation(ignore_index=0), torch.randn(1, NUM, 3, 4, 5), class_maps()),
        "evidential maps": (
            EvidentialClassification(ignore_index=255),
            torch.randn(2, NUM, 3, 4, 5),
            ignoring(class_maps(), 255),
        ),
        "mean": (Regression(head="mean"), torch.randn(5, NUM, 2), with_missing(numbers)),
        "one mean": (Regression(head="mean"), torch.randn(1, NUM), torch.randn(NUM)),
        "gaussian": (Regression(target_scale=(3.0, 2.0)), torch.randn(5, NUM, 4), numbers),
        "gaussian, missing": (Regression(), torch.randn(5, NUM, 4), with_missing(numbers)),
        "log-variance": (Regression(head="mean_log_variance"), torch.randn(1, NUM, 2), torch.randn(NUM, 1)),
        "quantiles": (
            Regression(head="quantiles", levels=(0.05, 0.5, 0.95)),
            quantiles((NUM, 6)),
            with_missing(numbers),
        ),
        "student_t": (Regression(head="student_t"), torch.randn(2, NUM, 6), with_missing(numbers)),
        "mixture": (Regression(head="mixture", components=2), torch.randn(2, NUM, 12), numbers),
        "horizon": (Regression(), torch.randn(2, NUM, 3, 4), with_missing(horizon)),
        "evidential numbers": (EvidentialRegression(), torch.randn(2, NUM, 8), with_missing(numbers)),
        "atoms": (CategoricalRegression(atoms=(-1.0, 0.0, 1.0)), torch.randn(2, NUM, 8), with_missing(numbers)),
        "depth": (PixelRegression(), torch.randn(2, NUM, 4, 3, 2), with_missing(torch.randn(NUM, 2, 3, 2))),
        "depth of means": (PixelRegression(head="mean"), torch.randn(2, NUM, 1, 3, 2), torch.randn(NUM, 3, 2)),
    }


def batches(task, outputs, target):
    for rows in torch.arange(len(target)).split(7):
        yield task.predict(outputs[:, rows]), target[rows]


def record_of(pairs, task):
    found = [task.row_scores(prediction, target) for prediction, target in pairs]
    rows = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return Record("method", 0, {}, rows, torch.arange(len(rows[next(iter(rows))])))


def streamed(pairs, task, collection):
    for prediction, target in pairs:
        for metric in collection.values():
            metric.update(*task.rows(prediction, target))
    return {name: float(metric.compute()) for name, metric in collection.items()}


@pytest.mark.parametrize("case", cases())
def test_each_number_is_that_of_the_metric(case):
    task, outputs, target = cases()[case]
    record = record_of(batches(task, outputs, target), task)
    found = measured(record)
    expected = streamed(batches(task, outputs, target), task, task.metrics("test"))
    if isinstance(task, Multilabel):
        assert found["hamming"] == pytest.approx(1 - expected.pop("accuracy"), rel=1e-6)
    for name, value in expected.items():
        if name in NO_COLUMN or name.startswith(("coverage_", "interval_score_")):
            continue
        assert found[NAMES.get(name, name)] == pytest.approx(value, rel=1e-6), name
    assert all(len(scores) == NUM for scores in record.rows.values())


@pytest.mark.parametrize(
    "case", ["gaussian, missing", "quantiles", "student_t", "horizon", "evidential numbers", "depth"]
)
def test_interval_columns_are_those_of_the_metrics_at_90_percent(case):
    task, outputs, target = cases()[case]
    found = measured(record_of(batches(task, outputs, target), task))
    of_level = {
        "coverage_90": metrics.IntervalCoverage(0.9),
        "interval_score": metrics.IntervalScore(0.9),
        "width_90": metrics.Sharpness(0.9),
        "mae": metrics.MAE(),
    }
    expected = streamed(batches(task, outputs, target), task, of_level)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", cases())
def test_weights_count_as_copies_of_rows(case):
    task, outputs, target = cases()[case]
    copies = torch.arange(NUM) % 3
    repeated = torch.arange(NUM).repeat_interleave(copies)
    record = record_of(batches(task, outputs, target), task)
    expected = measured(record_of(batches(task, outputs[:, repeated], target[repeated]), task))
    chosen = [measure for measure in MEASURES if measure.applies(record)]
    assert len(chosen) == len(expected)
    for measure in chosen:
        metric, [vectors] = measure.applied([record])
        value = metric(**vectors, weights=copies.unsqueeze(0).double()).item()
        assert value == pytest.approx(expected[measure.key], rel=1e-6), measure.key


def test_numbers_by_hand():
    task = Multilabel()
    prediction = task.predict(torch.tensor([[[2.0, -1.0], [0.5, 3.0], [-2.0, 1.0]]]))
    target = torch.tensor([[1.0, 0.0], [0.0, NAN], [1.0, 1.0]])
    found = measured(record_of([(prediction, target)], task))
    p, q = torch.tensor([2.0, 0.5, -2.0]).sigmoid(), torch.tensor([-1.0, 1.0]).sigmoid()
    nll = -(p[0].log() + (1 - p[1]).log() + p[2].log() + (1 - q[0]).log() + q[1].log()) / 5
    brier = ((p - torch.tensor([1.0, 0.0, 1.0])).square().sum() + q[0] ** 2 + (1 - q[1]) ** 2) / 5
    ece = ((1 - p[0] + p[1] + (1 - p[2])) / 3 + (q[0] + 1 - q[1]) / 2) / 2  # each row is in a bin of its own
    by_hand = {
        "nll": nll,
        "brier": brier,
        "ece": ece,
        "hamming": 2 / 5,
        "subset_accuracy": 1 / 3,
        "auroc": (0.5 + 1) / 2,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx({k: float(v) for k, v in by_hand.items()})

    task = Segmentation(ignore_index=9)
    logits = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 2.0, 2.0]]], [[[2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]]]])
    maps = torch.tensor([[[0, 1, 0]], [[0, 9, 9]]])
    found = measured(record_of([(task.predict(logits.reshape(1, 2, 2, 1, 3)), maps)], task))
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["iou"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_rows_without_a_target_leave_an_interval_of_the_difference():
    task, outputs, target = cases()["gaussian, missing"]
    records = {
        name: [record_of(batches(task, outputs + shift, target), task) for _ in range(2)]
        for name, shift in (("better", 0.0), ("worse", 1.0), ("diverged", NAN))
    }
    found = find_differences(records, "better", num_train=100)
    assert set(found) == {"nll", "rmse", "mae", "crps", "interval_score"}
    for key, one in found.items():
        assert set(one["to_baseline"]) == {"worse"}, key
        assert one["to_baseline"]["worse"]["lower"] < one["to_baseline"]["worse"]["upper"]
        assert set(one["left_out"]) == {"diverged"}
    rmse = [measured(records[name][0])["rmse"] for name in ("worse", "better")]
    assert found["rmse"]["to_baseline"]["worse"]["difference"] == pytest.approx(rmse[0] - rmse[1])


@pytest.mark.parametrize("case", cases())
def test_a_network_that_diverged_has_no_numbers(case):
    task, outputs, target = cases()[case]
    outputs = outputs.clone()
    outputs[:, 1] = NAN
    found = measured(record_of(batches(task, outputs, target), task))
    wrong_at_least = {"accuracy", "iou", "coverage_90"}  # such a row has no class, and its interval holds no target
    assert {name for name, value in found.items() if value == value} <= wrong_at_least


def test_a_row_that_is_more_than_half_of_a_mean_is_found():
    def record(seed, **rows):
        some = {name: torch.tensor(values) for name, values in rows.items()}
        return Record("a", seed, {}, some, 10 + torch.arange(3))

    even, heavy = {"nll": [-2.0, 1.0, 1.5]}, {"nll": [-9.0, 1.0, 1.0]}
    assert find_single_rows({"a": [record(0, **even)]}) == {}
    assert find_single_rows({"a": [record(0, **heavy)], "b": [record(0, **even)]}) == {"nll": {"a": 10}}
    assert find_single_rows({"a": [record(0, **heavy), record(1, nll=[4.0, 4.0, 4.0])]}) == {}
    assert find_single_rows({"a": [record(0, nll=[float("inf"), 1.0, 1.0])]}) == {}
    # A row weighs as much as the targets that it has; one without any is NaN, and weighs nothing.
    counted = record(0, squared_error=[NAN, 3.0, 2.0], num_targets=[0, 1, 2])
    assert find_single_rows({"a": [counted]}) == {"rmse": {"a": 12}}

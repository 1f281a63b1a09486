"""What every task owes its user: plain data that a checkpoint holds, and one name in YAML."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.losses import clamped_exp
from lightning_uq.modules.arguments import restore_argument, saved_argument
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import is_plain
from lightning_uq.tasks import (
    TASKS,
    Binary,
    CategoricalRegression,
    Classification,
    EvidentialClassification,
    EvidentialRegression,
    Multilabel,
    PixelRegression,
    Regression,
    Segmentation,
    Task,
    describe,
    sums_and_counts,
    task_from_config,
    task_of,
    task_to_config,
)

TASKS_WITH_FIELDS = [
    Binary(),
    Binary(loss="focal", pos_weight=torch.tensor(2.0), label_smoothing=0.1, focal_gamma=1),
    Multilabel(),
    Multilabel(num_labels=2, ignore_index=-1, pos_weight=torch.tensor([1.0, 2.0])),
    Classification(loss="focal", focal_gamma=0.5),
    Classification(),
    Classification(num_classes=3, label_smoothing=0.1, class_weights=torch.tensor([1.0, 0.25, 3.0])),
    Segmentation(),
    Segmentation(num_classes=3, label_smoothing=0.1, class_weights=(1, 2, 3), ignore_index=255),
    Regression(),
    Regression(head="mean", loss="huber"),
    Regression(loss="beta_nll", beta=0.25, target_scale=([1.0], torch.tensor(2.0))),
    Regression(head="mean_log_variance", target_scale=(1, 2)),
    Regression(head="quantiles", levels=[0.05, 0.5, 0.95]),
    Regression(head="student_t"),
    Regression(head="mixture", components=2),
    PixelRegression(head="quantiles", target_scale=(1.0, 2.0)),
    Segmentation(ignore_index=255, class_axis=-1),
    CategoricalRegression([-1.0, 0.0, 1.0]),
    EvidentialRegression(),
    EvidentialRegression("meinert", 0.3),
    EvidentialClassification(),
    EvidentialClassification(evidence="softplus", annealing_epochs=3, max_reg_factor=0.5, ignore_index=-1),
    EvidentialClassification(evidence=clamped_exp, class_weights=[1.0, 2.0]),
    EvidentialClassification(loss="maxnorm", loss_arguments={"p_norm": 2, "fisher": "paper"}),
]
each_task = pytest.mark.parametrize("task", TASKS_WITH_FIELDS, ids=describe)


@each_task
def test_a_checkpoint_holds_it_as_plain_data(task):
    saved = saved_argument(task)
    assert is_plain(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    restored = restore_argument(torch.load(file, weights_only=True), "task")
    assert restored == task
    assert type(restored) is type(task)
    assert restore_argument(task, "task") is task


@each_task
def test_it_is_frozen_equal_and_picklable(task):
    for again in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task), dataclasses.replace(task)):
        assert again == task
        assert describe(again) == describe(task)
    field = dataclasses.fields(task)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(task, field, getattr(task, field))
    others = [other for other in TASKS_WITH_FIELDS if other is not task]
    assert task not in others
    if not getattr(task, "loss_arguments", None):  # a mapping has no hash
        assert hash(task) == hash(copy.deepcopy(task))


def test_a_function_without_a_name_has_to_be_passed_again():
    saved = saved_argument(EvidentialClassification(evidence=lambda x: x.exp()))
    with pytest.raises(InputError, match=r"argument `task`: a .*EvidentialClassification.*task=\.\.\."):
        restore_argument(saved, "task")


def outputs_for(task):
    """Raw outputs [1, 4, ...] and targets."""
    if isinstance(task, Binary | Multilabel):
        labels = task.num_outputs or 2
        return torch.randn(1, 4, labels), (torch.arange(4)[:, None] + torch.arange(labels)) % 2
    axes = (5,) if task.has_positions else ()
    if not task.has_classes:
        indices = 2 if task.needs_members else 1
        return torch.randn(indices, 4, task.outputs_per_target, *axes), torch.randn(4, 1, *axes)
    classes = task.num_outputs or (len(task.class_weights) if task.class_weights else 3)
    outputs = torch.randn(1, 4, classes, *axes)
    return outputs if task.output_axis == 1 else outputs.movedim(2, -1), torch.randint(classes, (4, *axes))


@each_task
def test_what_it_declares_is_so(task):
    outputs, target = outputs_for(task)
    task.check_output(outputs)
    task.check_target(target, outputs)
    assert task.accepts(target) is None
    assert not task.invalid(outputs).any()
    assert task.ood_score in task.score_names
    prediction = task.predict(outputs)
    assert task.score_names == type(prediction).score_names
    assert prediction.score(task.ood_score).shape[0] == 4
    for stage in ("val", "test"):
        metrics = task.metrics(stage)
        assert "loss" not in metrics
        assert task.metric_on_bar in metrics
        for metric in metrics.values():
            metric.update(*task.rows(prediction, target))
            assert metric.compute().isfinite()
    sums, counts = task.sample_losses(outputs[0], target)
    assert sums.shape == counts.shape == (4,)
    assert (counts > 0).all()


@each_task
def test_a_rank_without_rows_has_the_same_metrics(task):
    for stage in ("val", "test"):
        again = task.metrics(stage)
        for name, metric in task.metrics(stage).items():
            assert type(again[name]) is type(metric)
            assert again[name] is not metric


# ---------------------------------------------------------------------- names


def test_a_name_is_the_task_with_its_defaults():
    for name, kind in TASKS.items():
        assert task_of(name) == kind()
        assert DeterministicModule(nn.Linear(2, 4), task=name).task == kind()
    assert all(task_of(task) is task for task in TASKS_WITH_FIELDS)


@pytest.mark.parametrize("value", ["ranking", None, 3, Classification, nn.Linear(1, 1)])
def test_what_is_no_task(value):
    with pytest.raises(
        InputError, match="`task` must be a Task, or one of 'classification', 'binary', 'multilabel', 'segmentation'"
    ):
        task_of(value)


def test_only_fields_that_differ_are_reported():
    assert describe(Classification()) == "Classification()"
    assert describe(Segmentation(num_classes=3, ignore_index=255)) == "Segmentation(num_classes=3, ignore_index=255)"

    assert describe(EvidentialClassification(evidence=clamped_exp)) == "EvidentialClassification(evidence=clamped_exp)"

    class Own(Regression):
        """Not a dataclass of its own."""

    assert describe(Own()) == "Own()"


def test_sums_and_counts():
    losses = torch.arange(12.0).reshape(2, 3, 2)
    sums, counts = sums_and_counts(losses, (losses > 3).float())
    assert sums.tolist() == [15.0, 51.0]
    assert counts.tolist() == [2.0, 6.0]
    sums, counts = sums_and_counts(losses[:, 0, 0])
    assert (sums.tolist(), counts.tolist()) == ([0.0, 6.0], [1.0, 1.0])
    sums, counts = sums_and_counts(torch.ones(1, 300).bfloat16())
    assert sums.dtype == counts.dtype == torch.float32
    assert (sums.item(), counts.item()) == (300, 300)


def test_a_task_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Task()


@pytest.mark.parametrize("task", [*TASKS_WITH_FIELDS, Multilabel(focal_gamma=np.float64(1.5))], ids=describe)
def test_a_file_holds_a_task_of_this_package_as_plain_data(task):
    config = task_to_config(task)
    if getattr(task, "evidence", None) is clamped_exp:
        assert config is None  # a function is code
        return
    file = io.BytesIO()
    torch.save(config, file)
    file.seek(0)
    again = task_from_config(torch.load(file, weights_only=True))
    assert type(again) is type(task)
    assert (
        describe(again) == describe(task) or task.focal_gamma == again.focal_gamma == 1.5
    )  # of another class of numbers


def test_a_file_holds_no_task_of_ones_own_and_names_one_that_is_unknown():
    class Binary(Task):
        """It has the name of ours."""

    Binary.__abstractmethods__ = frozenset()
    assert task_to_config(Binary()) is None
    for config in ({"name": "Counts", "init_args": {}}, {"name": "Binary", "init_args": {"rate": 1}}):
        with pytest.raises(InputError, match="cannot build the task"):
            task_from_config(config)

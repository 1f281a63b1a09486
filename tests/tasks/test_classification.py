"""One label per input: the loss by its definition, the checks, the metrics."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_uq.errors import InputError
from lightning_uq.metrics import Accuracy, BrierScore, ExpectedCalibrationError, JointLogLoss, NegativeLogLikelihood
from lightning_uq.modules.arguments import restore_argument, saved_argument
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import is_plain
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks import Classification, EvidentialClassification, OutputShapeError, Segmentation

LOGITS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 2, 1])
WEIGHTS = (1.0, 0.25, 3.0)


def batch_loss(task, output, target):
    sums, counts = task.sample_losses(output, target)
    assert sums.shape == counts.shape == (len(output),)
    return sums.sum() / counts.sum()


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS, (1.0, 0.0, 3.0)])
def test_the_loss_is_torch_s_with_its_gradient(weights, smoothing):
    task = Classification(class_weights=weights, label_smoothing=smoothing)
    ours, theirs = (LOGITS[0].clone().requires_grad_() for _ in range(2))
    value = batch_loss(task, ours, LABELS)
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(theirs, LABELS, weight, label_smoothing=smoothing)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_loss_by_its_definition():
    task = Classification(class_weights=WEIGHTS, label_smoothing=0.3)
    sums, counts = task.sample_losses(LOGITS[0], LABELS)
    for b, label in enumerate(LABELS.tolist()):
        log_probs = (LOGITS[0, b].double() - LOGITS[0, b].double().exp().sum().log()).tolist()
        expected = -0.7 * WEIGHTS[label] * log_probs[label]
        expected -= sum(0.1 * w * log_prob for w, log_prob in zip(WEIGHTS, log_probs, strict=True))
        assert sums[b].item() == pytest.approx(expected, rel=1e-5)
        assert counts[b].item() == WEIGHTS[label]


@given(seed=st.integers(0, 99), rows=st.integers(1, 6), classes=st.integers(2, 5), smoothing=st.floats(0, 1))
@settings(max_examples=30)
def test_samples_are_independent(seed, rows, classes, smoothing):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    weights = torch.rand(classes, generator=generator).add(0.1).tolist()
    task = Classification(num_classes=classes, class_weights=weights, label_smoothing=smoothing)
    together = task.sample_losses(output, target)
    alone = [task.sample_losses(output[i : i + 1], target[i : i + 1]) for i in range(rows)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))
    shifted = task.sample_losses(output + 7, target)
    torch.testing.assert_close(shifted[0], together[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64])
def test_precision(dtype, labels):
    rounded = LOGITS[0].to(dtype)
    wide = rounded if dtype == torch.float64 else rounded.float()
    sums, counts = Classification(class_weights=WEIGHTS).sample_losses(rounded, LABELS.to(labels))
    assert sums.dtype == counts.dtype == wide.dtype
    weight = torch.tensor(WEIGHTS, dtype=wide.dtype)
    torch.testing.assert_close(sums.sum() / counts.sum(), F.cross_entropy(wide, LABELS, weight))


# ---------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "`num_classes` must be an integer of at least 2, or None, but it is 1"),
        ({"num_classes": "3"}, "`num_classes` must be an integer of at least 2, or None, but it is '3'"),
        ({"num_classes": True}, "`num_classes` must be an integer of at least 2, or None, but it is True"),
        ({"loss": "hinge"}, "`loss` must be one of 'cross_entropy', 'focal'"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` must lie in \[0, 1\], but it is 1.5"),
        ({"label_smoothing": math.nan}, r"`label_smoothing` must lie in \[0, 1\], but it is nan"),
        ({"class_weights": ["a", "b"]}, "`class_weights` must be numbers, one per class"),
        ({"class_weights": 3}, "`class_weights` must be numbers, one per class"),
        ({"class_weights": [1.0, -1.0]}, "`class_weights` must be finite numbers of at least 0, not all 0"),
        ({"class_weights": [0.0, 0.0]}, "`class_weights` must be finite numbers of at least 0, not all 0"),
        ({"class_weights": [1.0, math.inf]}, "`class_weights` must be finite numbers of at least 0, not all 0"),
        ({"class_weights": []}, "`class_weights` must be finite numbers of at least 0, not all 0"),
        ({"num_classes": 3, "class_weights": [1.0, 2.0]}, "`class_weights` must hold 3 numbers, .* but it holds 2"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(InputError, match=message):
        Classification(**fields)


def test_weights_come_as_any_sequence_and_must_fit_the_output():
    tensor = Classification(class_weights=torch.tensor([1.0, 0.25, 3.0]))
    assert tensor == Classification(class_weights=list(WEIGHTS)) == Classification(class_weights=WEIGHTS)
    with pytest.raises(InputError, match="`class_weights` must hold 4 numbers, .* network's output, but it holds 3"):
        tensor.sample_losses(torch.zeros(2, 4), torch.tensor([0, 1]))


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_probabilities_are_noticed_in_every_precision(dtype, classes):
    probs = (3 * torch.randn(1, 64, classes, dtype=torch.float64)).softmax(2).to(dtype)
    with pytest.raises(InputError, match='output="probs"'):
        Classification().check_output(probs)


def test_probabilities_taken_for_logits_are_noticed():
    with pytest.raises(InputError, match='returned probabilities .* instead of logits.*output="probs"'):
        Classification(num_classes=3).check_output(LOGITS.softmax(2))
    Classification(num_classes=3).check_output(LOGITS.log_softmax(2))  # as `output="probs"` reads them
    Classification(num_classes=3).check_output(LOGITS)
    Classification(num_classes=3).check_output(torch.zeros(1, 4, 3))  # a zero-initialised head
    Classification().check_output(torch.zeros(1, 0, 3))


def test_features_are_not_logits():
    with pytest.raises(InputError, match=r"3 logits \(`num_classes` of the task\), but it returned 512"):
        Classification(num_classes=3).check_output(torch.zeros(1, 2, 512))
    for outputs in (torch.zeros(1, 2, 1), torch.zeros(1, 2)):
        with pytest.raises(OutputShapeError, match=r"logits \[B, C\] with C >= 2.*as `output`"):
            Classification().check_output(outputs)


def test_maps_are_named():
    with pytest.raises(OutputShapeError, match=r"returned \[2, 3, 4, 4\], a map of logits.*`task=Segmentation\(\)`"):
        Classification().check_output(torch.zeros(1, 2, 3, 4, 4))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (LABELS.float(), "must be integer class labels, but they are torch.float32"),
        (LABELS == 0, "must be integer class labels, but they are torch.bool"),
        (LABELS + 1, r"class labels in \[0, 3\), but their values go from 1 to 3"),
        (LABELS - 1, r"class labels in \[0, 3\), but their values go from -1 to 1"),
        (LABELS[:, None], r"must have shape \[5\], because the network returns \[5, 3\], but they have \[5, 1\]"),
        (
            LABELS[:4],
            r"must have shape \[5\], .* they have \[4\]. If the network returns features, pass a function",
        ),
        (torch.full((5,), -100), r"class labels in \[0, 3\), but their values go from -100 to -100"),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(InputError, match=message):
        Classification().check_target(target, LOGITS)


def test_values_are_looked_at_on_request():
    Classification().check_target(LABELS, LOGITS)
    Classification().check_target(LABELS + 1, LOGITS, values=False)
    Classification().check_target(LABELS[:0], LOGITS[:, :0])


def test_a_target_alone_is_taken_or_explained():
    assert Classification().accepts(LABELS) is None
    for wrong in (LABELS.float(), LABELS == 0, LABELS - 1):
        assert Classification().accepts(wrong) == "the targets are not class labels"


def test_numbers_that_nothing_can_be_predicted_from():
    outputs = torch.tensor([[[0.0, -math.inf], [math.nan, 0.0], [math.inf, 0.0], [1.0, 2.0]]])
    assert Classification().invalid(outputs).any(-1).tolist() == [[False, True, True, False]]


def test_outputs_that_rule_out_every_class_are_named():
    class Overflowing(nn.Module):
        def forward(self, x):
            return x - math.inf

    with pytest.raises(InputError, match="outputs for 1 of 1 rows hold NaN or infinity"):
        DeterministicModule(Overflowing()).predict(torch.zeros(1, 3))


# ---------------------------------------------------------------------- predictions and metrics


def test_predictions_and_scores():
    task = Classification(num_classes=3)
    prediction = task.predict(LOGITS)
    assert isinstance(prediction, CategoricalPrediction)
    assert torch.equal(prediction.logits, LOGITS)
    assert task.num_outputs == 3
    assert Classification().num_outputs is None
    assert task.ood_score in task.score_names
    assert all(prediction.score(name).shape == (5,) for name in task.score_names)
    rows, target = task.rows(prediction, LABELS)
    assert rows is prediction
    assert target is LABELS


def test_metrics_are_new_every_time():
    task = Classification()
    val, test = task.metrics("val"), task.metrics("test")
    assert {name: type(metric) for name, metric in test.items()} == {
        "accuracy": Accuracy,
        "nll": NegativeLogLikelihood,
        "ece": ExpectedCalibrationError,
        "brier": BrierScore,
        "joint_log_loss": JointLogLoss,
    }
    assert list(val) == ["accuracy", "nll", "ece"]
    assert task.metric_on_bar in val
    assert task.metrics("val")["nll"] is not val["nll"]


def test_a_batch_in_which_no_label_counts_adds_nothing_although_smoothing_does():
    """torch divides by the labels' weights, which are 0 here; the smoothing term is not."""
    task = Classification(class_weights=[0, 1, 1], label_smoothing=0.1)
    module = DeterministicModule(nn.Linear(4, 3), task=task)
    loss = module.training_loss(torch.randn(5, 4), torch.zeros(5, dtype=torch.long), None)
    loss.backward()
    assert loss == 0
    assert module.network.network.weight.grad.eq(0).all()


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_no_label_is_ignored_in_silence(label):
    """Values are looked at on the CPU alone; elsewhere the loss itself must not take -100 for "ignore"."""
    target = torch.tensor([0, 1, label])
    with pytest.raises(InputError, match=r"class labels in \[0, 3\)"):
        Classification().check_target(target, torch.zeros(1, 3, 3))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        Classification().sample_losses(torch.zeros(3, 3), target)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Classification(label_smoothing="a"), "`label_smoothing` must lie in"),
        (lambda: Segmentation(ignore_index=True), "`ignore_index` must be an integer or None, but it is True"),
        (
            lambda: EvidentialClassification(ignore_index="a"),
            "`ignore_index` must be an integer or None, but it is 'a'",
        ),
    ],
)
def test_fields_of_a_wrong_kind_are_named(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_numbers_of_numpy_are_saved_as_plain_ones():
    task = Segmentation(num_classes=np.int64(3), label_smoothing=np.float64(0.1), ignore_index=np.int64(255))
    saved = saved_argument(task)
    assert is_plain(saved)
    assert all(not isinstance(value, np.generic) for value in saved["init_args"].values())
    assert restore_argument(saved, "task") == task


@pytest.mark.parametrize("num_classes", [3, 20])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weights": True}, {"loss": "focal"}])
def test_the_loss_of_few_classes_is_that_of_torch(num_classes, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, num_classes, generator=generator, requires_grad=True)
    labels = torch.randint(num_classes, (9,), generator=generator)
    weights = torch.rand(num_classes, generator=generator)
    given = {"class_weights": weights.tolist()} if "class_weights" in options else options
    sums, counts = Classification(**given).sample_losses(logits, labels)
    expected = F.cross_entropy(
        logits,
        labels,
        weights if "class_weights" in options else None,
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    if "loss" in options:
        expected = expected * (1 - logits.softmax(1)[torch.arange(9), labels]) ** 2
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(counts, weights[labels] if "class_weights" in options else torch.ones(9))
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (sums, expected)))
    names = _operators(lambda: Classification(**given).sample_losses(logits, labels))
    assert ("aten::nll_loss2d_forward" in names) == (num_classes < 16)


def _operators(call):
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.key for event in profiled.key_averages()}

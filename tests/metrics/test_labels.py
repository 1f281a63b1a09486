"""Metrics of labels that are on or off: torchmetrics and scikit-learn where they define the same, else the definition."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multilabel_accuracy, multilabel_auroc

from lightning_uq import metrics
from lightning_uq.errors import InputError
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction
from tests.metrics.cases import Data

DATA = Data()
PROBS, LABELS = torch.sigmoid(DATA.label_logits), DATA.labels
KNOWN = ~LABELS.isnan()
FULL = torch.where(KNOWN, LABELS, 0.0)
ALL = [
    metrics.LabelNLL,
    metrics.LabelBrierScore,
    metrics.LabelAccuracy,
    metrics.LabelCalibrationError,
    metrics.LabelAUROC,
    metrics.LabelAveragePrecision,
]


def value(metric, probs, target):
    for rows in torch.arange(len(target)).split(9):
        metric.update(probs[rows], target[rows])
    return metric.compute()


def by_label(function):
    """The mean over labels of a function of one label's known rows, in numpy."""
    each = [function(FULL[known, i].numpy(), PROBS[known, i].numpy()) for i, known in enumerate(KNOWN.T) if known.any()]
    return np.mean(each)


def test_scikit_learn():
    expected = {
        metrics.LabelAUROC: by_label(roc_auc_score),
        metrics.LabelAveragePrecision: by_label(average_precision_score),
        metrics.LabelNLL: log_loss(FULL[KNOWN].numpy(), PROBS[KNOWN].numpy()),
        metrics.LabelBrierScore: brier_score_loss(FULL[KNOWN].numpy(), PROBS[KNOWN].numpy()),
        metrics.LabelAccuracy: ((PROBS > 0.5) == (FULL == 1))[KNOWN].double().mean().item(),
    }
    for metric, number in expected.items():
        assert value(metric(), PROBS, LABELS).item() == pytest.approx(number, abs=1e-12), metric


def test_torchmetrics():
    args = FULL.long(), FULL.shape[1]
    torch.testing.assert_close(
        value(metrics.LabelAUROC(), PROBS, FULL), multilabel_auroc(PROBS, args[0], args[1]).double()
    )
    micro = multilabel_accuracy(PROBS, *args, average="micro")
    torch.testing.assert_close(value(metrics.LabelAccuracy(), PROBS, FULL), micro.double())
    metric = metrics.LabelCalibrationError(num_bins=10)
    value(metric, PROBS, LABELS)
    for i, known in enumerate(KNOWN.T):
        theirs = binary_calibration_error(PROBS[known, i], LABELS[known, i].long(), n_bins=10)
        torch.testing.assert_close(metric.per_label()[i], theirs.double())


@pytest.mark.parametrize("metric", ALL)
def test_predictions_give_what_their_probabilities_give(metric):
    labels = BernoulliPrediction(DATA.label_logits.unsqueeze(0))
    torch.testing.assert_close(value(metric(), labels, LABELS), value(metric(), PROBS, LABELS))
    logit = DATA.label_logits[:, 0]
    classes = CategoricalPrediction(torch.stack([torch.zeros_like(logit), logit], 1).unsqueeze(0))
    for target in (FULL[:, 0], FULL[:, 0].long(), FULL[:, :1]):
        torch.testing.assert_close(value(metric(), classes, target), value(metric(), PROBS[:, 0], FULL[:, 0]))


@pytest.mark.parametrize("metric", ALL)
def test_an_unknown_label_counts_nothing(metric):
    spoilt = torch.where(KNOWN, PROBS, 0.987)
    torch.testing.assert_close(value(metric(), spoilt, LABELS), value(metric(), PROBS, LABELS), rtol=0, atol=1e-12)
    assert math.isnan(value(metric(), PROBS, torch.full_like(LABELS, math.nan)))


@pytest.mark.parametrize("metric", [metrics.LabelNLL, metrics.LabelBrierScore, metrics.LabelCalibrationError])
def test_soft_targets_are_the_mean_of_hard_ones(metric):
    """A target of 0.25 is one on among three off: the mean of a score that is linear in the target, up to a constant."""
    probs = torch.full((4, 1), 0.3, dtype=torch.float64)
    hard = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    soft = torch.full((4, 1), 0.25, dtype=torch.float64)
    gap = 0.25 * 0.75 if metric is metrics.LabelBrierScore else 0.0
    torch.testing.assert_close(value(metric(), probs, hard) - gap, value(metric(), probs, soft))


@pytest.mark.parametrize("metric", [metrics.LabelAUROC, metrics.LabelAveragePrecision])
def test_a_label_with_one_value_is_left_out(metric):
    target = FULL.clone()
    target[:, 2] = 0
    found = metric()
    value(found, PROBS, target)
    assert found.per_label()[2].isnan()
    torch.testing.assert_close(found.compute(), value(metric(), PROBS[:, :2], target[:, :2]))


def test_saturated_probabilities_do_not_tie_in_a_prediction():
    prediction = BernoulliPrediction(torch.tensor([[[30.0], [40.0], [50.0]]]))
    assert value(metrics.LabelAUROC(), prediction, torch.tensor([[0], [0], [1]])) == 1


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("probs", "target", "message"),
    [
        (PROBS, LABELS[:, :2], "`target` must have shape"),
        (2 * PROBS, LABELS, "`prediction` must hold probabilities in"),
        (PROBS * math.nan, LABELS, "`prediction` must hold probabilities in"),
        (PROBS, LABELS + 1, "`target` must hold labels 0 and 1"),
        (CategoricalPrediction(torch.zeros(1, 4, 3)), torch.zeros(4), "a prediction of two classes"),
    ],
)
def test_bad_input_is_named(metric, probs, target, message):
    with pytest.raises(InputError, match=message):
        metric().update(probs, target)


def test_soft_targets_of_classes():
    log_probs = torch.log_softmax(DATA.logits[0], 1)
    soft = torch.softmax(DATA.logits[1], 1)
    expected = torch.nn.functional.cross_entropy(DATA.logits[0], soft)
    torch.testing.assert_close(value(metrics.NegativeLogLikelihood(), log_probs.exp(), soft), expected)
    expected = (log_probs.exp() - soft).square().sum(1).mean()
    torch.testing.assert_close(value(metrics.BrierScore(), log_probs.exp(), soft), expected)
    hard = torch.nn.functional.one_hot(DATA.target, 3).double()
    for metric in (metrics.NegativeLogLikelihood, metrics.BrierScore):
        torch.testing.assert_close(value(metric(), DATA.probs, hard), value(metric(), DATA.probs, DATA.target))
        with pytest.raises(InputError, match="`target` must have shape"):
            metric().update(DATA.probs, DATA.value)
        with pytest.raises(InputError, match="`target` must hold probabilities in"):
            metric().update(DATA.probs, 2 * soft)

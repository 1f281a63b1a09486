"""Coverage and size of prediction sets and conformal intervals."""

import pytest
import torch

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.metrics import ConformalCoverage, ConformalSize
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction, PointPrediction

NAN = torch.nan
LOWER = torch.tensor([[[0.0], [0.0]], [[0.0], [2.0]], [[0.0], [0.0]]])  # [B, H, D]; one of them is empty
INTERVALS = PointPrediction(LOWER[None]).replace(conformal_lower=LOWER, conformal_upper=torch.ones(3, 2, 1))
TARGET = torch.tensor([[[0.5], [NAN]], [[1.0], [1.5]], [[NAN], [NAN]]])


def value(metric, *args):
    metric.update(*args)
    return metric.compute().item()


def test_each_known_number_counts():
    assert value(ConformalCoverage(), INTERVALS, TARGET) == pytest.approx(2 / 3)
    assert value(ConformalSize(), INTERVALS, TARGET) == pytest.approx(2 / 3)  # an empty interval has no negative width


def test_steps_together_count_an_input_once():
    assert value(ConformalCoverage(simultaneous=True), INTERVALS, TARGET) == 0.5


def test_maps_of_sets():
    sets = torch.tensor([[[True, False]], [[True, True]], [[False, False]]]).movedim(0, 1).reshape(1, 3, 2)
    prediction = CategoricalPrediction(torch.zeros(1, 1, 3, 2)).replace(prediction_set=sets)
    assert value(ConformalCoverage(), prediction, torch.tensor([[1, 2]])) == 0.5
    assert value(ConformalSize(), prediction, torch.tensor([[1, 2]])) == 1.5


@pytest.mark.parametrize("metric", [ConformalCoverage, ConformalSize])
def test_what_carries_nothing_or_does_not_fit_is_refused(metric):
    classes = CategoricalPrediction(torch.zeros(1, 2, 3))
    with pytest.raises(NotFittedError, match="carries no `prediction_set`"):
        metric().update(classes, torch.tensor([0, 1]))
    with pytest.raises(NotFittedError, match="carries no `conformal_lower`"):
        metric().update(PointPrediction(torch.zeros(1, 2, 1)), torch.zeros(2, 1))
    sets = classes.replace(prediction_set=torch.ones(2, 3, dtype=torch.bool))
    for target in (torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])):
        with pytest.raises(InputError, match="`target` must"):
            metric().update(sets, target)
    with pytest.raises(InputError, match="`prediction` must be of classes.* or .*numbers, but it is a str"):
        metric().update("words", torch.zeros(2, 3))


def test_labels_have_a_size_but_no_one_true_class():
    labels = BernoulliPrediction(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="`prediction` must be of classes or of numbers, but it is a Bernoulli"):
        ConformalCoverage().update(labels, torch.zeros(2, 3))
    metric = ConformalSize()
    metric.update(labels.replace(prediction_set=torch.tensor([[True, True, False], [False] * 3])), torch.zeros(2, 3))
    assert metric.compute() == 1

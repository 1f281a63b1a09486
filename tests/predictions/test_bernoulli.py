"""Several labels per input, each on or off."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.predictions import BernoulliPrediction, PooledBernoulliPrediction
from tests.predictions.cases import bernoulli

PREDICTION = bernoulli(6, z=4)


def test_probabilities_are_means_of_sigmoids():
    torch.testing.assert_close(PREDICTION.probs, torch.sigmoid(PREDICTION.logits).mean(0))
    assert torch.equal(PREDICTION.label, (PREDICTION.probs > 0.5).long())
    torch.testing.assert_close(PREDICTION.confidence, torch.maximum(PREDICTION.probs, 1 - PREDICTION.probs))
    assert torch.equal(PREDICTION.labels(0.2), (PREDICTION.probs > 0.2).long())
    each = torch.linspace(0.1, 0.9, PREDICTION.probs.shape[1])
    assert torch.equal(PREDICTION.labels(each), (PREDICTION.probs > each).long())


def test_the_entropy_is_the_sum_of_its_two_parts_label_by_label():
    parts = PREDICTION.expected_entropy + PREDICTION.mutual_information
    torch.testing.assert_close(PREDICTION.predictive_entropy, parts)


@pytest.mark.parametrize("name", ["predictive_entropy", "mutual_information", "expected_entropy"])
def test_a_score_is_the_sum_over_the_labels(name):
    torch.testing.assert_close(PREDICTION.score(name), getattr(PREDICTION, name).sum(1))
    torch.testing.assert_close(PREDICTION.pool().score(name), PREDICTION.score(name))


def test_the_energy_needs_the_members():
    assert torch.equal(PREDICTION.score("energy"), -F.softplus(PREDICTION.logits).sum(2).mean(0))
    with pytest.raises(InputError, match="has no score 'energy'.*return_members"):
        PREDICTION.pool().score("energy")


def test_log_prob_is_torch_s_and_leaves_unknown_labels_out():
    target = (torch.rand(6, 5) < 0.5).float()
    expected = -F.binary_cross_entropy(PREDICTION.probs, target, reduction="none")
    torch.testing.assert_close(PREDICTION.log_prob(target), expected.sum(1))
    assert torch.equal(PREDICTION.log_prob(target.long()), PREDICTION.log_prob(target))
    target[0, 2] = math.nan
    torch.testing.assert_close(PREDICTION.log_prob(target)[0], expected[0, [0, 1, 3, 4]].sum())
    with pytest.raises(InputError, match=r"`target` must have shape \[6, 5\]"):
        PREDICTION.log_prob(target[:, :1])


@pytest.mark.parametrize("temperature", [torch.tensor(2.0), torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])])
def test_a_temperature_acts_on_the_pooled_logit(temperature):
    calibrated = PREDICTION.replace(temperature=temperature)
    pooled = torch.logit(torch.sigmoid(PREDICTION.logits.double()).mean(0))
    torch.testing.assert_close(calibrated.probs, torch.sigmoid(pooled / temperature).float())
    assert torch.equal(calibrated.uncalibrated_mutual_information, PREDICTION.mutual_information)
    torch.testing.assert_close(calibrated.pool().probs, calibrated.probs)
    torch.testing.assert_close(calibrated[2:4].probs, calibrated.probs[2:4])
    joined = BernoulliPrediction.cat([calibrated[:1], calibrated[1:]])
    torch.testing.assert_close(joined.probs, calibrated.probs)


def test_a_label_alone_is_what_it_is_among_others():
    for label in range(5):
        alone = BernoulliPrediction(PREDICTION.logits[:, :, label : label + 1])
        for name, values in alone.to_dict().items():
            torch.testing.assert_close(values, PREDICTION.to_dict()[name][:, label : label + 1])


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match=r"`logits` must have shape \[Z, B, L\], but its shape is \[2, 3\]"):
        BernoulliPrediction(torch.zeros(2, 3))
    with pytest.raises(InputError, match="`uncalibrated_mutual_information` must have shape"):
        PooledBernoulliPrediction(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(InputError, match="return_members"):
        _ = PREDICTION.pool().logits
    with pytest.raises(NotFittedError, match="temperature"):
        _ = PREDICTION.temperature

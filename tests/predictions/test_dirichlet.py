import numpy as np
import pytest
import torch
from scipy import stats

from lightning_uq.errors import InputError
from lightning_uq.functional import SCORES, dirichlet
from lightning_uq.predictions import DirichletPrediction
from tests.predictions.cases import dirichlet as make


def exact(name, value, rtol=1e-12):
    torch.testing.assert_close(name, torch.as_tensor(np.asarray(value)), rtol=rtol, atol=1e-14)


def test_one_network_has_the_closed_forms_of_its_dirichlet():
    prediction = make(z=1)
    alpha = prediction.concentration[0]
    wide = alpha.double()
    assert torch.equal(prediction.mean_log_probs, wide.log() - wide.sum(1, keepdim=True).log())
    assert torch.equal(prediction.expected_entropy, dirichlet.dirichlet_expected_entropy(alpha))
    assert torch.equal(prediction.mutual_information, dirichlet.dirichlet_mutual_information(alpha))
    assert torch.equal(prediction.differential_entropy, dirichlet.dirichlet_differential_entropy(alpha))
    assert torch.equal(prediction.vacuity, 5 / wide.sum(1))
    exact(prediction.differential_entropy, [stats.dirichlet(a).entropy() for a in wide.numpy()])


def test_several_hypotheses_are_a_mixture():
    prediction = make(z=3)
    alpha = prediction.concentration.double()
    parts = [DirichletPrediction(a[None]) for a in prediction.concentration]
    exact(prediction.probs, (alpha / alpha.sum(2, keepdim=True)).mean(0))
    for name in ("expected_entropy", "differential_entropy", "vacuity"):
        exact(getattr(prediction, name), torch.stack([getattr(part, name) for part in parts]).mean(0))
    exact(prediction.mutual_information, prediction.predictive_entropy - prediction.expected_entropy)
    assert (prediction.mutual_information > torch.stack([p.mutual_information for p in parts]).mean(0)).all()
    assert prediction.num_indices == 3


def test_the_mutual_information_is_that_of_label_and_probabilities():
    prediction = make(1, z=2)
    rng = np.random.default_rng(0)
    probs = np.concatenate([rng.dirichlet(a[0], 200_000) for a in prediction.concentration.double().numpy()])
    mean = probs.mean(0)
    expected = -(mean * np.log(mean)).sum() + np.nansum(probs * np.log(np.maximum(probs, 1e-300)), 1).mean()
    assert float(prediction.mutual_information) == pytest.approx(expected, rel=1e-2)


def test_copies_of_a_hypothesis_change_nothing():
    one = make(z=1)
    for name, value in DirichletPrediction(one.concentration.repeat(4, 1, 1)).to_dict().items():
        torch.testing.assert_close(value, one.to_dict()[name], rtol=1e-12, atol=1e-12)


def test_a_prior_is_a_prior_in_the_vacuity():
    alpha = torch.full((1, 2, 3), 0.1)
    assert torch.equal(DirichletPrediction(alpha).prior, torch.tensor(1.0))
    prediction = DirichletPrediction(alpha, prior=torch.tensor(0.1))
    torch.testing.assert_close(prediction.vacuity, torch.ones(2).double())
    both = DirichletPrediction.cat([prediction, prediction])
    torch.testing.assert_close(both.to(torch.float64)[1:].vacuity, torch.ones(3).double())


def test_scores_are_the_dirichlets_and_never_a_softmaxs():
    prediction = make()
    for name in ("vacuity", "mutual_information", "differential_entropy", "predictive_entropy", "expected_entropy"):
        assert torch.equal(prediction.score(name), getattr(prediction, name))
    for name in ("max_softmax", "gen"):
        assert torch.equal(prediction.score(name), SCORES[name](prediction.log_probs[None]))
    torch.testing.assert_close(prediction.score("max_softmax"), 1 - prediction.confidence)
    with pytest.raises(InputError, match="has no score 'energy'"):
        prediction.score("energy")


def test_a_calibration_tempers_the_mean_alone():
    plain, tempered = make(), make(temperature=torch.tensor(2.0))
    torch.testing.assert_close(tempered.probs, (plain.log_probs / 2).softmax(1))
    for name in ("vacuity", "uncalibrated_expected_entropy", "uncalibrated_mutual_information"):
        assert torch.equal(tempered.score(name), plain.score(name))
    assert torch.equal(tempered.calibration_logits, plain.log_probs[None])
    with pytest.raises(
        InputError, match="A DirichletPrediction has no member `logits`. Use its mean .* scope='pooled'"
    ):
        tempered.map_logits(torch.exp)


def test_maps_have_their_classes_at_axis_two():
    prediction = make(3, z=2, shape=(4, 5, 6))
    assert prediction.vacuity.shape == prediction.label.shape == prediction.mutual_information.shape == (3, 5, 6)
    rows = prediction.as_rows()
    assert rows.concentration.shape == (2, 90, 4)
    for name in prediction.score_names:
        torch.testing.assert_close(rows.score(name), prediction.score(name).flatten())


def test_tiny_probabilities_stay_in_log_space():
    prediction = DirichletPrediction(torch.tensor([[[1e30, 1e-30]]], dtype=torch.float64))
    assert float(prediction.log_probs[0, 1]) == pytest.approx(np.log(1e-60))


@pytest.mark.parametrize(
    ("concentration", "message"),
    [
        (torch.ones(2, 3), r"its shape is \[2, 3\]. Add the index axis: `concentration.unsqueeze\(0\)`"),
        (torch.zeros(1, 2, 3), "`concentration` must be positive, but some of its values are not"),
        (torch.full((1, 2, 3), torch.nan), "must be positive"),
    ],
)
def test_bad_arguments(concentration, message):
    with pytest.raises(InputError, match=message):
        DirichletPrediction(concentration)

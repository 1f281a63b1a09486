import copy
import pickle

import pytest
import torch

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional import entropy
from lightning_uq.predictions import (
    CategoricalPrediction,
    DirichletPrediction,
    GaussianMixturePrediction,
    StudentTPrediction,
)


def categorical(b: int = 4, **kwargs) -> CategoricalPrediction:
    return CategoricalPrediction(torch.randn(3, b, 5, generator=torch.Generator().manual_seed(b)), **kwargs)


def mixture(b: int = 4) -> GaussianMixturePrediction:
    generator = torch.Generator().manual_seed(b)
    return GaussianMixturePrediction(
        torch.randn(3, b, 2, generator=generator), torch.rand(3, b, 2, generator=generator) + 0.1
    )


def dirichlet(b: int = 4) -> DirichletPrediction:
    return DirichletPrediction(torch.rand(b, 5, generator=torch.Generator().manual_seed(b)) * 9 + 0.1)


ALL = [categorical, mixture, dirichlet]


@pytest.mark.parametrize("make", ALL)
def test_cat_of_batches_is_the_prediction_of_the_whole(make):
    parts = [make(1), make(3), make(2)]
    whole = type(parts[0]).cat(parts)
    assert len(whole) == 6
    for name, value in whole.to_dict().items():
        torch.testing.assert_close(value, torch.cat([part.to_dict()[name] for part in parts]))


@pytest.mark.parametrize("make", ALL)
def test_to_moves_every_tensor_and_leaves_the_first_as_it_was(make):
    prediction = make()
    moved = prediction.to("cpu", torch.float64)
    assert all(v.dtype == torch.float64 for v in moved.__dict__["_tensors"].values() if v is not None)
    assert any(v.dtype == torch.float32 for v in prediction.__dict__["_tensors"].values() if v is not None)


@pytest.mark.parametrize("make", ALL)
def test_it_is_frozen_pickles_and_copies(make):
    prediction = make()
    with pytest.raises(AttributeError, match="frozen"):
        prediction.probs = torch.zeros(1)
    for twin in (pickle.loads(pickle.dumps(prediction)), copy.deepcopy(prediction)):
        for name, value in prediction.to_dict().items():
            assert torch.equal(twin.to_dict()[name], value)


def test_probabilities_pool_over_members():
    prediction = categorical()
    torch.testing.assert_close(prediction.probs, prediction.logits.softmax(2).mean(0))
    torch.testing.assert_close(prediction.confidence, prediction.probs.amax(1))
    assert torch.equal(prediction.label, prediction.probs.argmax(1))


def test_log_prob_of_a_label():
    prediction = categorical()
    y = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(prediction.log_prob(y), prediction.probs[torch.arange(4), y].log())
    with pytest.raises(InputError, match=r"`target` to be class indices of shape \[4\]"):
        prediction.log_prob(y.unsqueeze(1))


def test_pooling_keeps_every_score_and_says_where_the_logits_went():
    prediction = categorical()
    pooled = prediction.pool()
    for name, value in prediction.to_dict().items():
        torch.testing.assert_close(pooled.to_dict()[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="return_members = True"):
        _ = pooled.logits
    assert len(type(pooled).cat([pooled, pooled])) == 8


def test_a_pooled_temperature_changes_the_mean_and_not_the_members():
    plain = categorical()
    tempered = CategoricalPrediction(plain.logits, temperature=torch.tensor(2.0))
    torch.testing.assert_close(tempered.probs, (plain.log_probs / 2).softmax(1))
    torch.testing.assert_close(tempered.mutual_information, plain.mutual_information)
    torch.testing.assert_close(tempered.expected_entropy, plain.expected_entropy)
    torch.testing.assert_close(tempered.predictive_entropy, entropy.entropy(tempered.log_probs, 1))
    torch.testing.assert_close(tempered.pool().mutual_information, plain.mutual_information, rtol=1e-4, atol=1e-6)


def test_a_class_scaling_calibrates_the_mean_alone():
    plain = categorical()
    scaled = plain.replace(class_scaling=torch.stack([torch.full((5,), 0.5), torch.arange(5.0)]))
    log_probs = plain.log_probs
    expected = (0.5 * (log_probs - log_probs.mean(1, keepdim=True)) + torch.arange(5.0)).softmax(1)
    torch.testing.assert_close(scaled.probs, expected)
    torch.testing.assert_close(scaled.mutual_information, plain.mutual_information)
    with pytest.raises(InputError, match="names among"):
        plain.replace(temprature=torch.tensor(1.0))


def test_a_density_travels_and_its_lack_is_said():
    with pytest.raises(NotFittedError, match="log_density"):
        _ = categorical().log_density
    density = torch.arange(4.0)
    assert torch.equal(categorical(log_density=density).to_dict()["log_density"], density)


def test_cat_refuses_what_does_not_belong_together():
    with pytest.raises(InputError, match="at least one"):
        CategoricalPrediction.cat([])
    with pytest.raises(InputError, match="of one type"):
        CategoricalPrediction.cat([categorical(), dirichlet()])
    with pytest.raises(InputError, match="only some do"):
        CategoricalPrediction.cat([categorical(), categorical(log_density=torch.zeros(4))])
    with pytest.raises(InputError, match="it differs"):
        CategoricalPrediction.cat([categorical(temperature=torch.tensor(t)) for t in (1.0, 2.0)])


def test_wrong_shapes_are_named():
    with pytest.raises(InputError, match=r"`logits` to be \[Z, B, C\]"):
        CategoricalPrediction(torch.zeros(2, 3))
    with pytest.raises(InputError, match="`logits` to be a tensor"):
        CategoricalPrediction([1.0])
    with pytest.raises(InputError, match="positive"):
        DirichletPrediction(torch.zeros(2, 3))
    with pytest.raises(InputError, match="one shape"):
        GaussianMixturePrediction(torch.zeros(1, 2, 3), torch.ones(1, 2, 1))


def test_the_variance_is_the_sum_of_its_parts():
    prediction = mixture()
    torch.testing.assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance)
    torch.testing.assert_close(prediction.aleatoric_variance, prediction.member_variance.mean(0))
    torch.testing.assert_close(prediction.epistemic_variance, prediction.member_mean.var(0, unbiased=False))


def test_the_joint_density_of_two_dimensions_is_not_the_product_of_marginals():
    prediction = mixture()
    y = torch.randn(4, 2)
    normal = torch.distributions.Normal(prediction.member_mean, prediction.member_variance.sqrt())
    expected = normal.log_prob(y).sum(-1).exp().mean(0).log()
    torch.testing.assert_close(prediction.log_prob(y), expected, rtol=1e-4, atol=1e-5)


def test_interval_holds_its_share():
    prediction = mixture()
    lower, upper = prediction.interval(0.9)
    share = prediction.cdf(upper) - prediction.cdf(lower)
    torch.testing.assert_close(share, torch.full_like(share, 0.9), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="`level`"):
        prediction.interval(1.0)


def test_a_target_that_would_broadcast_is_refused():
    with pytest.raises(InputError, match="would broadcast"):
        mixture().log_prob(torch.zeros(4))


def test_segmentation_keeps_its_axes():
    prediction = CategoricalPrediction(torch.randn(2, 3, 4, 5, 6))
    assert prediction.probs.shape == (3, 4, 5, 6)
    assert prediction.label.shape == prediction.mutual_information.shape == (3, 5, 6)
    assert prediction.log_prob(prediction.label).shape == (3, 5, 6)


def test_a_student_t_of_huge_parameters_has_a_scale():
    huge = torch.full((1, 1), 3e38)
    prediction = StudentTPrediction(torch.zeros(1, 1), huge, huge, huge)
    torch.testing.assert_close(prediction.scale, torch.ones(1, 1))


def test_what_several_loaders_gave_is_named():
    one = CategoricalPrediction(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="but it holds a list. Of several loaders"):
        CategoricalPrediction.cat([[one], [one]])

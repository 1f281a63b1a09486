import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional import SCORES, entropy
from lightning_uq.predictions import CategoricalPrediction
from tests.predictions.cases import assert_same, categorical


def test_probabilities_pool_over_members():
    prediction = categorical()
    torch.testing.assert_close(prediction.probs, prediction.logits.softmax(2).mean(0))
    torch.testing.assert_close(prediction.confidence, prediction.probs.amax(1))
    assert torch.equal(prediction.label, prediction.probs.argmax(1))
    assert prediction.num_indices == 3
    assert prediction.has_logits
    assert prediction.calibration_logits is prediction.logits


def test_the_decomposition_is_recomputed():
    prediction = categorical()
    members = prediction.logits.double().softmax(2)
    expected = -(members * members.log()).sum(2).mean(0)
    predictive = -(members.mean(0) * members.mean(0).log()).sum(1)
    torch.testing.assert_close(prediction.expected_entropy.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.predictive_entropy.double(), predictive, rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.mutual_information.double(), predictive - expected, rtol=1e-5, atol=1e-7)


def test_log_prob_of_a_label():
    prediction = categorical()
    y = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(prediction.log_prob(y), prediction.probs[torch.arange(4), y].log())
    for wrong in (y.unsqueeze(1), y.float()):
        with pytest.raises(InputError, match=r"`target` must be class indices of shape \[4\], but it is torch"):
            prediction.log_prob(wrong)


PARTS = {"expected_entropy", "mutual_information"}


def test_a_pooled_temperature_changes_the_mean_and_not_the_members():
    plain = categorical()
    tempered = CategoricalPrediction(plain.logits, temperature=torch.tensor(2.0))
    torch.testing.assert_close(tempered.probs, (plain.log_probs / 2).softmax(1))
    torch.testing.assert_close(tempered.uncalibrated_mutual_information, plain.mutual_information)
    torch.testing.assert_close(tempered.uncalibrated_expected_entropy, plain.expected_entropy)
    torch.testing.assert_close(tempered.predictive_entropy, entropy.entropy(tempered.log_probs, 1))
    torch.testing.assert_close(tempered.mean_log_probs, plain.log_probs)


def test_a_class_scaling_calibrates_the_mean_alone():
    plain = categorical()
    scaled = plain.replace(class_scaling=torch.stack([torch.full((5,), 0.5), torch.arange(5.0)]))
    log_probs = plain.log_probs
    expected = (0.5 * (log_probs - log_probs.mean(1, keepdim=True)) + torch.arange(5.0)).softmax(1)
    torch.testing.assert_close(scaled.probs, expected)
    torch.testing.assert_close(scaled.uncalibrated_mutual_information, plain.mutual_information)


def test_logits_may_go_through_a_function():
    plain = categorical(log_density=torch.zeros(4))
    halved = plain.map_logits(lambda logits: logits / 2)
    assert_same(halved, plain.replace(logits=plain.logits / 2))


@pytest.mark.parametrize("calibration", [{}, {"temperature": torch.tensor(3.0)}])
def test_scores_are_those_of_the_members_and_the_entropy_follows_the_calibration(calibration):
    prediction = categorical(**calibration)
    names = {name: f"uncalibrated_{name}" if calibration and name in PARTS else name for name in SCORES}
    assert prediction.score_names == tuple(names.values())
    for name, function in SCORES.items():
        if name != "predictive_entropy":
            own = names[name]
            assert torch.equal(prediction.score(own), function(prediction.logits))
    assert torch.equal(prediction.score("predictive_entropy"), prediction.predictive_entropy)
    assert torch.equal(categorical().score("predictive_entropy"), SCORES["predictive_entropy"](prediction.logits))


# ---------------------------------------------------------------------- maps


def test_maps_keep_their_axes():
    prediction = categorical(3, z=2, shape=(4, 5, 6))
    assert prediction.map_shape == (5, 6)
    assert prediction.probs.shape == (3, 4, 5, 6)
    assert prediction.label.shape == prediction.mutual_information.shape == (3, 5, 6)
    assert prediction.log_prob(prediction.label).shape == (3, 5, 6)
    assert prediction[1:].probs.shape == (2, 4, 5, 6)
    for name in prediction.score_names:
        assert prediction.score(name).shape == (3, 5, 6)


def test_positions_may_become_rows():
    prediction = categorical(3, z=2, shape=(4, 5, 6), log_density=torch.arange(3.0), temperature=torch.tensor(2.0))
    rows = prediction.as_rows()
    assert rows.logits.shape == (2, 90, 4)
    assert rows.map_shape == ()
    assert rows.as_rows() is rows
    torch.testing.assert_close(rows.probs, prediction.probs.movedim(1, -1).reshape(90, 4))
    for name in prediction.score_names:
        torch.testing.assert_close(rows.score(name), prediction.score(name).flatten())
    assert torch.equal(rows.log_density, torch.arange(3.0).repeat_interleave(30))
    pooled = prediction.pool().as_rows()
    torch.testing.assert_close(pooled.uncalibrated_mutual_information, rows.uncalibrated_mutual_information)
    torch.testing.assert_close(pooled.probs, rows.probs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 3),
            r"`logits` must have shape \[Z, B, C\], but its shape is \[2, 3\]. Add the index axis: `logits.unsqueeze\(0\)`",
        ),
        ((3,), r"must have shape \[Z, B, C\], but its shape is \[3\].$"),
    ],
)
def test_wrong_shapes_are_named(shape, message):
    with pytest.raises(InputError, match=message):
        CategoricalPrediction(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32(dtype):
    prediction = categorical().to(dtype)
    assert prediction.probs.dtype == torch.float32
    torch.testing.assert_close(prediction.probs, prediction.logits.float().softmax(2).mean(0))

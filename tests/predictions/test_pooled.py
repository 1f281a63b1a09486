"""Pooled predictions give the numbers of those they were made of, and name `return_members` for the rest."""

import pytest
import torch

from lightning_uq import DropoutModule
from lightning_uq.errors import InputError
from lightning_uq.predictions import CategoricalPrediction, PooledCategoricalPrediction, PooledRegressionPrediction
from tests.predictions.cases import ALL, WITH_MEMBERS, categorical, dirichlet, gaussian_mixture, tensors
from tests.tolerance import tolerance

CALIBRATIONS = [
    {},
    {"temperature": torch.tensor(2.0)},
    {"class_scaling": torch.stack([torch.full((5,), 0.5), torch.arange(5.0)])},
    {"class_matrix": torch.cat([torch.eye(5) + 0.1, torch.zeros(1, 5), torch.full((1, 5), -9.0), torch.ones(1, 5)])},
    {"class_curves": torch.tensor([[[-3.0, 0.0]] * 5, [[0.1, 0.8]] * 5])},
]


@pytest.mark.parametrize("z", [1, 3])
@pytest.mark.parametrize("make", WITH_MEMBERS)
def test_what_both_have_is_the_same_number(make, z):
    whole = make(z=z, log_density=torch.arange(4.0))
    pooled = whole.pool()
    assert type(pooled) is not type(whole)
    assert pooled.num_indices is None
    assert whole.num_indices == z
    for name, value in pooled.to_dict().items():
        torch.testing.assert_close(value, whole.to_dict()[name], **tolerance(torch.float32))
    for name in pooled.score_names:
        torch.testing.assert_close(pooled.score(name), whole.score(name), rtol=1e-6, atol=1e-7)


UNCALIBRATED = ("uncalibrated_expected_entropy", "uncalibrated_mutual_information")


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("make", [categorical, dirichlet])
def test_a_calibration_stays(make, calibration):
    whole = make(**calibration)
    pooled = whole.pool()
    y = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(pooled.log_prob(y), whole.log_prob(y), **tolerance(torch.float32))
    for name in ("probs", "label", "confidence", "predictive_entropy", *UNCALIBRATED):
        torch.testing.assert_close(getattr(pooled, name), getattr(whole, name), **tolerance(torch.float32))
    assert (set(UNCALIBRATED) < set(pooled.score_names)) is bool(calibration)
    for name in pooled.score_names:
        torch.testing.assert_close(pooled.score(name), whole.score(name), rtol=1e-6, atol=1e-7)
    later = make().pool().replace(**calibration)  # calibrated after it was pooled
    torch.testing.assert_close(later.probs, whole.probs, **tolerance(torch.float32))
    torch.testing.assert_close(pooled.calibration_logits, make().mean_log_probs[None], **tolerance(torch.float32))


@pytest.mark.parametrize("make", [categorical, dirichlet])
def test_maps_are_pooled(make):
    whole = make(2, shape=(4, 5, 6))
    pooled = whole.pool()
    assert pooled.map_shape == (5, 6)
    for name, value in pooled.to_dict().items():
        torch.testing.assert_close(value, whole.to_dict()[name], **tolerance(torch.float32))


@pytest.mark.parametrize("make", ALL)
def test_pooling_twice_is_pooling_once(make):
    pooled = make().pool()
    assert pooled.pool() is pooled


def test_a_thousand_indices_take_no_more_room_than_one():
    whole = gaussian_mixture(8, z=1000, d=1)
    numbers = {name: tensor.numel() for name, tensor in tensors(whole.pool()).items()}
    assert numbers == {"mean": 8, "aleatoric_variance": 8, "epistemic_variance": 8}
    storage = sum(tensor.untyped_storage().nbytes() for tensor in tensors(whole.pool()).values())
    assert storage == 8 * 3 * 4  # 12 bytes per row; the members take 8,000
    pooled = categorical(8, z=1000).pool()
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors(pooled).values()) == 8 * (5 + 2) * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: categorical().pool().logits,
        lambda: categorical().pool().map_logits(torch.exp),
        lambda: categorical().pool().score("energy"),
        lambda: categorical().pool().score("vacuity"),
        lambda: gaussian_mixture().pool().score("inverse_nu"),
        lambda: gaussian_mixture().pool().member_mean,
        lambda: gaussian_mixture().pool().member_variance,
        lambda: gaussian_mixture().pool().log_prob(torch.zeros(4, 2)),
        lambda: gaussian_mixture().pool().quantile(0.5),
        lambda: gaussian_mixture().pool().interval(0.5),
        lambda: gaussian_mixture().pool().cdf(torch.zeros(4, 2)),
        lambda: gaussian_mixture().pool().crps(torch.zeros(4, 2)),
        lambda: gaussian_mixture().pool().to_dict(interval=0.9),
    ],
)
def test_the_rest_names_return_members(call):
    with pytest.raises(InputError, match=r"pooled.*[sS]et `module.return_members = True` to keep them"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PooledCategoricalPrediction(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4)),
            r"`uncalibrated_expected_entropy` must have shape \[4\], but its shape is \[4, 5\]",
        ),
        (
            lambda: PooledCategoricalPrediction(torch.zeros(4), torch.zeros(4), torch.zeros(4)),
            r"`mean_log_probs` must have shape \[B, C\], but its shape is \[4\]",
        ),
        (
            lambda: PooledRegressionPrediction(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4)),
            r"`mean`, `aleatoric_variance`, `epistemic_variance` must have one shape \[B, D\]",
        ),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---------------------------------------------------------------------- the scores that a method promises


def test_a_modules_default_score_is_there_whether_its_prediction_is_pooled_or_not():
    """Above 32 indices a prediction is pooled; a Dirichlet's vacuity and a Student-t's 1 / nu go with it."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    outputs = {"classification": 3, "regression": 2, "evidential_classification": 3, "evidential_regression": 4}
    for task, size in outputs.items():
        network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, size))
        module = DropoutModule(network, task=task, num_eval_samples=40).eval()
        pooled, whole = module.predict(x), module.prediction(module(x))
        assert pooled.num_indices is None
        assert set(pooled.to_dict()) == set(whole.to_dict())
        for name in {module.ood_score, *(set(whole.score_names) & set(pooled.score_names))}:
            torch.testing.assert_close(pooled.score(name), whole.score(name), msg=f"{task}: {name}")
    with pytest.raises(InputError, match="has no score 'vacuity'"):
        CategoricalPrediction(torch.zeros(1, 2, 3)).pool().score("vacuity")

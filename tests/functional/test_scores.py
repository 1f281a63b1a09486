"""Out-of-distribution scores: reference numbers, definitions, and one direction for all."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.functional import SCORES, energy, gen, max_logit, max_softmax, variation_ratio

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "ddu_scores.npz")
NAMES = ["predictive_entropy", "mutual_information", "expected_entropy", "max_softmax", "energy", "max_logit"]


def members(seed, shape=(5, 12, 4)):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_reference_single_network():
    """Row 4 of the reference holds a -inf logit, of which the original's entropy is NaN; ours is not."""
    logits = torch.tensor(REFERENCE["uncertainty_logits/logits"])[None]
    expected = REFERENCE["uncertainty_logits/entropy"]
    assert np.isnan(expected).sum() == 1
    finite = ~np.isnan(expected)
    entropy = SCORES["predictive_entropy"](logits)
    assert not entropy.isnan().any()
    np.testing.assert_allclose(entropy[torch.tensor(finite)], expected[finite], atol=1e-5)
    np.testing.assert_allclose(energy(logits), -REFERENCE["uncertainty_logits/logsumexp"], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(max_softmax(logits), 1 - REFERENCE["uncertainty_logits/confidence"], atol=1e-6)


@pytest.mark.parametrize("case", ["ensemble_M3_C3_sharp", "ensemble_M4_identical"])
def test_reference_ensemble(case):
    """The original takes log(p + 1e-12), hence the tolerance, and may give a negative mutual information."""
    logits = torch.tensor(REFERENCE[f"{case}/member_logits"])
    for name in ("predictive_entropy", "mutual_information", "expected_entropy"):
        np.testing.assert_allclose(SCORES[name](logits), REFERENCE[f"{case}/{name}"], atol=2e-6)
    assert (SCORES["mutual_information"](logits) >= 0).all()
    first = logits[:1]
    np.testing.assert_allclose(SCORES["predictive_entropy"](first), REFERENCE[f"{case}/entropy_member0"], atol=2e-6)
    np.testing.assert_allclose(energy(first), -REFERENCE[f"{case}/logsumexp_member0"], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(max_softmax(first), 1 - REFERENCE[f"{case}/confidence_member0"], atol=1e-6)
    np.testing.assert_allclose(max_softmax(logits), 1 - REFERENCE[f"{case}/mean_prob"].max(1), atol=1e-6)


def test_definitions():
    logits = members(0)
    torch.testing.assert_close(max_softmax(logits), 1 - logits.softmax(2).mean(0).amax(1))
    torch.testing.assert_close(energy(logits), -logits.exp().sum(2).log().mean(0))
    torch.testing.assert_close(max_logit(logits), -logits.mean(0).amax(1))
    labels = logits.argmax(2)
    expected = [1 - max(labels[:, b].tolist().count(c) for c in range(4)) / 5 for b in range(12)]
    torch.testing.assert_close(variation_ratio(logits), torch.tensor(expected))


@pytest.mark.parametrize("name", list(SCORES))
def test_higher_means_more_out_of_distribution(name):
    """A sure and unanimous row scores below one whose members are sure of different classes or know nothing."""
    sure = torch.tensor([[[10.0, 0.0, 0.0]], [[10.0, 0.0, 0.0]]])
    torn = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    assert SCORES[name](sure) < SCORES[name](torn)


@pytest.mark.parametrize("name", list(SCORES))
def test_shapes_dtypes_and_symmetries(name):
    score = SCORES[name]
    logits = members(1)
    value = score(logits)
    assert value.shape == (12,)
    torch.testing.assert_close(score(logits.flip(0)), value)  # members have no order
    torch.testing.assert_close(score(logits.flip(2)), value)  # nor have classes
    torch.testing.assert_close(score(logits.repeat(2, 1, 1)), value)
    assert score(logits.double()).dtype == torch.float64
    half = score(logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, score(logits.bfloat16().float()))
    image = members(2, (3, 2, 4, 5, 6))
    flat = image.permute(0, 1, 3, 4, 2).reshape(3, -1, 4)
    torch.testing.assert_close(score(image), score(flat).reshape(2, 5, 6))
    assert score(logits[:, :0]).shape == (0,)


@pytest.mark.parametrize("name", list(SCORES))
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    assert SCORES[name](logits).isfinite().all()


def test_shift_of_logits():
    """A softmax ignores a constant; the energy and the largest logit do not, and members keep their own."""
    logits = members(3)
    shift = torch.randn(5, 12, 1, generator=torch.Generator().manual_seed(0))
    for name in (
        "predictive_entropy",
        "mutual_information",
        "expected_entropy",
        "max_softmax",
        "variation_ratio",
        "gen",
    ):
        torch.testing.assert_close(SCORES[name](logits + shift), SCORES[name](logits), atol=1e-5, rtol=1e-5)
    for name in ("energy", "max_logit"):
        torch.testing.assert_close(SCORES[name](logits + 2.0), SCORES[name](logits) - 2.0)
    torch.testing.assert_close(energy(logits + shift), energy(logits) - shift.mean(0)[:, 0])


def test_a_confident_row_keeps_its_digits():
    value = max_softmax(torch.tensor([[[20.0, 0.0]]]))
    assert value.item() == pytest.approx(1 / (1 + math.exp(20.0)), rel=1e-5)


def test_names_and_immutability():
    assert set(NAMES) | {"variation_ratio", "gen"} == set(SCORES)
    with pytest.raises(TypeError):
        SCORES["new"] = energy


def test_gen_tells_rows_of_all_but_certain_confidence_apart():
    logits = torch.tensor([[[30.0, 0.0, 0.0], [40.0, 0.0, 0.0], [400.0, 0.0, 0.0]]])
    value = gen(logits)
    assert value[0] > value[1] > value[2] >= 0
    p = 2 * math.exp(-30.0)  # of both others
    assert value[0].item() == pytest.approx(p**0.1 + 2 * (p / 2) ** 0.1, rel=1e-5)


def test_gen_of_one_class_and_of_missing_classes():
    assert gen(torch.zeros(2, 3, 1)).tolist() == [0.0] * 3
    missing = torch.tensor([[[1.0, 0.0, -math.inf]]])
    torch.testing.assert_close(gen(missing), gen(missing[..., :2]))

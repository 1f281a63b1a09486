"""Classification metrics: what `update` takes, what it refuses, and values that a shell over functions could get wrong."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from lightning_uq import functional
from lightning_uq.errors import InputError
from lightning_uq.metrics import (
    AUGRC,
    AURC,
    BrierScore,
    ExpectedCalibrationError,
    MutualInformation,
    NegativeLogLikelihood,
    PredictiveEntropy,
    SmoothCalibrationError,
)
from lightning_uq.predictions import CategoricalPrediction, DirichletPrediction

WITH_TARGET = [ExpectedCalibrationError, SmoothCalibrationError, NegativeLogLikelihood, BrierScore, AURC, AUGRC]
POOLED = [*WITH_TARGET, PredictiveEntropy]


@pytest.fixture
def logits():
    return 2 * torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    return torch.randint(3, (30,), generator=torch.Generator().manual_seed(1))


def value(metric, *arguments):
    metric.update(*arguments)
    return metric.compute().item()


@pytest.mark.parametrize("constructor", POOLED)
def test_logits_probs_and_predictions_agree(constructor, logits, target):
    pooled = logits.softmax(2).mean(0)
    expected = value(constructor(), pooled, target)
    prediction = CategoricalPrediction(logits)
    assert value(constructor(), prediction, target) == pytest.approx(expected, abs=1e-6)
    assert value(constructor(from_logits=True), pooled.log() + 3.0, target) == pytest.approx(expected, abs=1e-6)
    # from_logits is about tensors; an object says itself what it holds
    assert value(constructor(from_logits=True), prediction, target) == pytest.approx(expected, abs=1e-6)
    assert value(constructor(), SimpleNamespace(probs=pooled), target) == pytest.approx(expected, abs=1e-6)
    assert value(constructor(), torch.distributions.Categorical(pooled), target) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("constructor", POOLED)
def test_evidential_prediction(constructor, target):
    concentration = 0.1 + 5 * torch.rand(30, 3, generator=torch.Generator().manual_seed(2))
    expected = value(constructor(), concentration / concentration.sum(1, keepdim=True), target)
    assert value(constructor(), DirichletPrediction(concentration.unsqueeze(0)), target) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("constructor", WITH_TARGET)
def test_segmentation(constructor):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, 5, generator=generator)
    target = torch.randint(3, (2, 4, 5), generator=generator)
    flat = logits.permute(0, 1, 3, 4, 2).reshape(2, -1, 3)
    probs = logits.softmax(2).mean(0)
    expected = value(constructor(), flat.softmax(2).mean(0), target.reshape(-1))
    assert value(constructor(), probs, target) == pytest.approx(expected, abs=1e-6)
    assert value(constructor(), CategoricalPrediction(logits), target) == pytest.approx(expected, abs=1e-6)
    assert value(constructor(from_logits=True), probs.log(), target) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("constructor", POOLED)
def test_logits_in_the_unit_interval_are_not_taken_for_probabilities(constructor):
    """torchmetrics guesses from the values, batch by batch."""
    logits = torch.tensor([[0.9, 0.1, 0.4]], dtype=torch.float64)
    target = torch.tensor([0])
    metric = constructor()
    with pytest.raises(
        InputError, match=r"`probs` must sum to one over the class axis .*, but a sum is .*`from_logits=True`"
    ):
        metric.update(logits, target)
    expected = value(constructor(), logits.softmax(1), target)
    assert value(constructor(from_logits=True), logits, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constructor", POOLED)
@pytest.mark.parametrize("prediction", [None, [[0.5, 0.5]], SimpleNamespace(), SimpleNamespace(probs=[0.5, 0.5])])
def test_neither_tensor_nor_prediction(constructor, prediction, target):
    with pytest.raises(
        InputError, match=r"`prediction` must be a tensor \[B, C\] or a prediction with `probs`, but it is a"
    ):
        constructor().update(prediction, target)


@pytest.mark.parametrize("constructor", WITH_TARGET)
def test_bad_batches(constructor, target):
    probs = torch.full((30, 3), 1 / 3)
    for from_logits in (False, True):
        metric = constructor(from_logits=from_logits)
        with pytest.raises(InputError, match=r"class indices in \[0, 3\), but it holds 9"):
            metric.update(probs, torch.where(target == 0, 9, target))
        with pytest.raises(InputError, match=r"`target` must have shape \[30\], but its shape is \[29\]"):
            metric.update(probs, target[1:])
        with pytest.raises(InputError, match=r"integer dtype, but its dtype is torch\.float32"):
            metric.update(probs, target.float())
        with pytest.raises(InputError, match="NaN"):
            metric.update(torch.where(probs > 1, probs, torch.nan), target)
        with pytest.raises(InputError, match=re.escape("[B, C, ...], but it is torch.float32 of shape [30]")):
            metric.update(probs[:, 0], target)
        metric.update(probs, target)  # a refused batch leaves nothing behind
        assert metric.compute().item() == pytest.approx(value(constructor(from_logits=from_logits), probs, target))
    with pytest.raises(InputError, match="`from_logits` must be True or False, but it is 'yes'"):
        constructor(from_logits="yes")
    with pytest.raises(InputError, match=r"class indices in \[0, 3\), but it holds 3"):
        constructor().update(CategoricalPrediction(torch.zeros(2, 30, 3)), target + 3 * (target == 0))


def test_nll_of_a_prediction_stays_in_log_space():
    """A probability of exp(-200) is 0 in float32; its logarithm is not lost."""
    logits, target = torch.tensor([[[200.0, 0.0]]]), torch.tensor([1])
    assert value(NegativeLogLikelihood(), CategoricalPrediction(logits), target) == 200
    assert value(NegativeLogLikelihood(from_logits=True), logits[0], target) == 200
    assert value(NegativeLogLikelihood(), logits[0].softmax(1), target) == torch.inf


def test_temperature_of_a_prediction_counts(logits, target):
    tempered = CategoricalPrediction(logits, temperature=torch.tensor(2.0))
    pooled = logits.softmax(2).mean(0)
    expected = value(NegativeLogLikelihood(from_logits=True), pooled.log() / 2, target)
    assert value(NegativeLogLikelihood(), tempered, target) == pytest.approx(expected, abs=1e-6)


def test_against_torchmetrics_where_it_is_right(logits, target):
    """Without a confidence of exactly 1 or on an edge, the two agree; at 1.0 its version 1.9 does not hold (0.525)."""
    probs = logits[0].softmax(1)
    for norm in ("l1", "l2", "max"):
        theirs = MulticlassCalibrationError(3, 15, norm)
        theirs.update(probs, target)
        ours = value(ExpectedCalibrationError(norm=norm), probs, target)
        assert ours == pytest.approx(theirs.compute().item(), abs=1e-6)
    saturated = torch.tensor([[1.0, 0.0], [0.95, 0.05], [1.0, 0.0], [0.95, 0.05]])
    ece = value(ExpectedCalibrationError(num_bins=10), saturated, torch.tensor([1, 0, 0, 1]))
    assert ece == pytest.approx(0.475, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 0}, "`num_bins` must be an integer of at least 1, but it is 0"),
        ({"norm": "l1", "debiased": True}, "the debiased estimator exists only for 'l2'"),
        ({"norm": "max", "debiased": True}, "`debiased` must be False with norm='max'"),
        ({"norm": "l4"}, "`norm` must be one of"),
        ({"binning": "none"}, "`binning` must be one of"),
        ({"classwise": "all"}, "`classwise` must be True or False, but it is 'all'"),
        ({"debiased": 1, "norm": "l2"}, "`debiased` must be True or False, but it is 1"),
    ],
)
def test_bad_calibration_options(options, message):
    with pytest.raises(InputError, match=message):
        ExpectedCalibrationError(**options)


@pytest.mark.parametrize("binning", ["uniform", "adaptive"])
def test_number_of_classes_must_not_change(binning):
    metric = ExpectedCalibrationError(classwise=True, binning=binning)
    metric.update(torch.full((2, 3), 1 / 3), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="`prediction` must have 3 classes as before, but it has 4"):
        metric.update(torch.full((2, 4), 1 / 4), torch.tensor([0, 1]))


def test_uniform_state_does_not_grow(logits, target):
    metric = ExpectedCalibrationError(num_bins=15)
    for _ in range(5):
        metric.update(logits[0].softmax(1), target)
    assert metric.bins.shape == (3, 1, 15)
    assert metric.bins[0].sum() == 150


def test_many_rows_are_counted_in_float64():
    """Past 2^24 rows a float32 count stands still."""
    metric = NegativeLogLikelihood()
    metric.count += 2**24
    metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    assert metric.count == 2**24 + 1


def test_mutual_information(logits):
    expected = functional.mutual_information(logits).double().mean().item()
    assert value(MutualInformation(), logits.softmax(2)) == pytest.approx(expected, abs=1e-6)
    assert value(MutualInformation(from_logits=True), logits) == pytest.approx(expected, abs=1e-6)
    prediction = CategoricalPrediction(logits)
    assert value(MutualInformation(), prediction) == pytest.approx(expected, abs=1e-6)
    assert value(MutualInformation(), prediction.pool()) == pytest.approx(expected, abs=1e-6)
    assert value(MutualInformation(), SimpleNamespace(logits=logits)) == pytest.approx(expected, abs=1e-6)
    assert value(MutualInformation(), logits[:1].softmax(2)) == pytest.approx(0, abs=1e-7)
    spread = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # zeros among the probabilities
    assert value(MutualInformation(), spread) == pytest.approx(0.693147, abs=1e-6)


def test_mutual_information_bad_input(logits):
    metric = MutualInformation()
    with pytest.raises(InputError, match=r"`probs` must be a floating-point tensor \[Z, B, C, ...\]"):
        metric.update(logits[0].softmax(1))
    with pytest.raises(InputError, match="`probs` must hold probabilities in"):
        metric.update(logits)
    with pytest.raises(InputError, match=r"`mutual_information` or member `logits`.* it is a SimpleNamespace"):
        metric.update(SimpleNamespace(logits=logits[0]))
    with pytest.raises(InputError, match="NaN"):
        MutualInformation(from_logits=True).update(logits * torch.nan)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `nbins`"):
        ExpectedCalibrationError(nbins=10)


REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "logits" / "nncal_densenet40_cifar10.npz"


@pytest.mark.skipif(not REAL.exists(), reason="the saved logits of a real network are not here")
@pytest.mark.parametrize(("temperature", "ece", "nll"), [(1.0, 0.05500, 0.43006), (2.883, 0.00946, 0.22509)])
def test_known_answer_of_a_real_network(temperature, ece, nll):
    """DenseNet-40 on CIFAR-10, 10,000 test images, before and after its temperature."""
    data = np.load(REAL)
    logits = torch.tensor(data["test_logits"]) / temperature
    target = torch.tensor(data["test_labels"].astype(np.int64))
    assert value(ExpectedCalibrationError(from_logits=True), logits, target) == pytest.approx(ece, abs=2e-5)
    assert value(NegativeLogLikelihood(from_logits=True), logits, target) == pytest.approx(nll, abs=2e-5)
    assert value(SmoothCalibrationError(from_logits=True), logits, target) == pytest.approx(ece, abs=0.01)


@pytest.mark.parametrize("metric", [AURC, AUGRC])
@pytest.mark.parametrize("kind", ["logits", "bfloat16", "prediction", "ensemble", "map"])
def test_sure_rows_are_ranked(metric, kind):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(1000, 5, generator=generator), torch.randint(5, (1000,), generator=generator)
    logits[torch.arange(1000), target] += 6 * torch.rand(1000, generator=generator)
    spread = 0.1 * torch.randn(3 if kind == "ensemble" else 1, 1000, 5, generator=generator)
    logits = (10 * (logits + spread)).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    probs = logits.double().softmax(2).mean(0)
    label = probs.argmax(1)
    doubt = probs.scatter(1, label[:, None], 0.0).sum(1)  # 1 - the largest, with its digits
    function = {AURC: functional.aurc, AUGRC: functional.augrc}[metric]
    expected = function(-doubt, label != target).item()
    if kind in ("prediction", "ensemble"):
        found = value(metric(), CategoricalPrediction(logits), target)
    elif kind == "map":
        found = value(metric(from_logits=True), logits[0].reshape(10, 100, 5).movedim(2, 1), target.reshape(10, 100))
    else:
        found = value(metric(from_logits=True), logits[0], target)
    assert found == pytest.approx(expected, rel=1e-6)
    rounded = probs.float().amax(1)
    assert (rounded == 1).sum() > 200
    assert abs(function(rounded, label != target).item() - expected) > 1e-3 * expected


def test_probabilities_rank_by_the_largest():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    target = torch.tensor([0, 1, 0, 1])
    for metric, function in ((AURC, functional.aurc), (AUGRC, functional.augrc)):
        expected = function(probs.amax(1), target != 0).item()
        assert value(metric(), probs, target) == pytest.approx(expected, rel=1e-12)

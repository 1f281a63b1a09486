"""Acquisition scores: ENN's numbers, their definitions, and where the original's are NaN."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq import CategoricalPrediction, DirichletPrediction, GaussianMixturePrediction, InputError
from lightning_uq.active_learning import ACQUISITION_SCORES, acquire, score, select
from lightning_uq.active_learning.scores import LABELLED
from lightning_uq.functional import SCORES

with np.load(Path(__file__).parents[1] / "reference" / "enn_active_learning.npz") as file:
    DATA = {name: torch.from_numpy(file[name]) for name in file.files}
LOGITS, LABELS, CLASS_VALUES = DATA["logits"], DATA["labels"].squeeze(1).long(), DATA["class_values"]
NAMES = sorted(ACQUISITION_SCORES)
ENN_NAMES = {"predictive_entropy": "entropy", "mutual_information": "bald", "max_softmax": "var_ratios"}
VALUED = ("ucb", "scaled_mean", "scaled_std")


def of(name, outputs, labels=None, **options):
    if name == "uniform":
        options["generator"] = torch.Generator().manual_seed(0)
    if labels is None:
        labels = torch.zeros(outputs.shape[1], dtype=torch.long)
    return score(name, outputs, labels, **options)


# ------------------------------------------------------------------ the original's numbers


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_scores_of_enn(name):
    torch.testing.assert_close(of(name, LOGITS, LABELS), DATA[ENN_NAMES.get(name, name)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "array", "options"),
    [
        ("ucb", "ucb2_cv", {"factor": 2.0}),
        ("scaled_mean", "scaled_mean_cv", {}),
        ("scaled_std", "scaled_std_cv", {}),
    ],
)
def test_scores_of_enn_with_class_values(name, array, options):
    ours = score(name, LOGITS, class_values=CLASS_VALUES, **options)
    torch.testing.assert_close(ours, DATA[array], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(name, LOGITS, class_values=CLASS_VALUES.tolist(), **options), ours)


def test_the_batcher_of_enn():
    """It gives its four in ascending order of the score; ours are the highest first."""
    selected = acquire("mutual_information", LOGITS, DATA["bald_selected"].numel())
    assert selected.flip(0).tolist() == DATA["bald_selected"].tolist()
    assert select(DATA["bald"], 4).flip(0).tolist() == DATA["bald_selected"].tolist()


def test_uniform_is_enns_distribution():
    """Its draws come from another generator: theirs and ours are uniform on [0, 1), and ours follow a seed."""
    theirs, ours = DATA["uniform"], of("uniform", torch.zeros(1, 20_000, 2))
    assert theirs.shape == (12,)
    assert theirs.dtype == ours.dtype == torch.float32
    assert 0 <= theirs.min() <= theirs.max() < 1
    assert 0 <= ours.min() <= ours.max() < 1
    quantiles = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(ours.quantile(quantiles), quantiles, rtol=0, atol=0.02)
    assert torch.equal(ours, of("uniform", torch.zeros(1, 20_000, 2)))
    assert not torch.equal(score("uniform", LOGITS), score("uniform", LOGITS))


# ------------------------------------------------------------------ definitions


def definitions(logits, labels):
    """Every score from plain probabilities, in float64."""
    p = torch.softmax(logits.double(), 2)
    mean = p.mean(0)
    top = mean.sort(1, descending=True).values
    rows = torch.arange(len(labels))
    h = lambda q: -torch.special.xlogy(q, q).sum(-1)  # noqa: E731
    return {
        "variance": ((p - mean) ** 2).mean(0).sum(1),
        "nll": -mean[rows, labels].log(),
        "joint_nll": -10 * p[:, rows, labels].log().mean(0),
        "predictive_entropy": h(mean),
        "margin": top[:, 1] - top[:, 0],
        "mutual_information": h(mean) - h(p).mean(0),
        "max_softmax": 1 - top[:, 0],
        "ucb": p[..., 0].mean(0) + p[..., 0].std(0, correction=0),
        "scaled_mean": p[..., 0].mean(0),
        "scaled_std": p[..., 0].std(0, correction=0),
    }


@st.composite
def cases(draw):
    z, b, c = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = draw(st.sampled_from([0.1, 1.0, 5.0])) * torch.randn(z, b, c, generator=generator, dtype=torch.float64)
    return logits, torch.randint(c, (b,), generator=generator)


@settings(max_examples=40)
@given(cases())
def test_definitions(case):
    for name, expected in definitions(*case).items():
        ours = of(name, *case)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10, msg=name)


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**31))
def test_order_of_members_and_constants_of_logits_do_not_matter(case, seed):
    logits, labels = case
    generator = torch.Generator().manual_seed(seed)
    permuted = logits[torch.randperm(len(logits), generator=generator)]
    shifted = logits + 100 * torch.randn(*logits.shape[:2], 1, generator=generator, dtype=torch.float64)
    doubled = torch.cat([logits, logits])
    for name in NAMES:
        expected = of(name, logits, labels)
        for other in (permuted, shifted, doubled):
            torch.testing.assert_close(of(name, other, labels), expected, rtol=1e-7, atol=1e-9, msg=name)


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**31))
def test_order_of_classes_matters_to_none_but_the_valued(case, seed):
    logits, labels = case
    order = torch.randperm(logits.shape[2], generator=torch.Generator().manual_seed(seed))
    for name in NAMES:
        values = torch.arange(len(order), dtype=torch.float64)
        before, after = ({"class_values": v} if name in VALUED else {} for v in (values, values[order]))
        ours = of(name, logits[..., order], order.argsort()[labels], **after)
        torch.testing.assert_close(ours, of(name, logits, labels, **before), rtol=1e-7, atol=1e-9, msg=name)


@settings(max_examples=25)
@given(cases(), st.floats(-3, 3))
def test_ucb_is_mean_and_deviation_of_the_values(case, factor):
    values = torch.linspace(-1, 2, case[0].shape[2], dtype=torch.float64)
    both = score("scaled_mean", case[0], class_values=values) + factor * score(
        "scaled_std", case[0], class_values=values
    )
    torch.testing.assert_close(score("ucb", case[0], class_values=values, factor=factor), both)


@settings(max_examples=25)
@given(cases())
def test_the_joint_nll_bounds_that_of_copies(case):
    logits, labels = case
    log_probs = logits.log_softmax(2)[:, torch.arange(len(labels)), labels]
    joint = -((10 * log_probs).logsumexp(0) - np.log(len(logits)))
    assert bool((of("joint_nll", logits, labels) >= joint - 1e-9).all())


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_where_probabilities_underflow(name, dtype):
    """p log p of ENN is 0 * -inf there, hence its entropy and BALD are NaN: a defect that is not carried over."""
    sure = torch.tensor([[[2e4, -2e4, 0.0], [0.0, 0.0, 0.0]], [[-2e4, 2e4, 0.0], [0.0, 0.0, 0.0]]], dtype=dtype)
    probs = sure[0, :1].softmax(1)
    assert bool((-probs * probs.log()).sum(1).isnan().all())  # as the original has it
    ours = of(name, sure, torch.tensor([0, 0]))
    assert ours.shape == (2,)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) or name == "uniform"
    assert bool(ours.isfinite().all())
    ln2 = float(np.log(2))
    known = {
        "predictive_entropy": ln2,
        "mutual_information": ln2,
        "variance": 0.5,
        "max_softmax": 0.5,
        "margin": 0.0,
        "nll": ln2,
        "ucb": 1.0,
    }
    if name in known:
        assert ours[0].item() == pytest.approx(known[name], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_may_be_ruled_out(name):
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]], [[1.0, 0.0, -torch.inf]]])
    far = torch.where(logits.isinf(), -1e4, logits)
    torch.testing.assert_close(of(name, logits), of(name, far))


def test_an_impossible_label_comes_first():
    logits = torch.tensor([[[0.0, -torch.inf], [0.0, 0.0]]])
    for name in LABELLED:
        assert acquire(name, logits, 1, torch.tensor([1, 1])).tolist() == [0]
        assert score(name, logits, torch.tensor([1, 1]))[0] == torch.inf


def test_sure_inputs_are_distinct():
    """1 - max p would be 0 for both in float32."""
    logits = torch.tensor([[[20.0, 0.0], [30.0, 0.0]]])
    values = score("max_softmax", logits)
    assert values[0] > values[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_input_has_no_score(name):
    assert of(name, torch.zeros(3, 0, 2)).shape == (0,)


def test_one_hypothesis_disagrees_with_none():
    logits = torch.randn(1, 5, 3)
    for name in ("variance", "mutual_information", "scaled_std"):
        torch.testing.assert_close(score(name, logits), torch.zeros(5))


# ------------------------------------------------------------------ selection


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_selection_is_the_highest_and_of_equal_ones_the_first(values, data):
    num = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:num]
    assert select(torch.tensor(values).float(), num).tolist() == expected


def test_infinite_scores_are_ordered():
    assert select(torch.tensor([-torch.inf, 1.0, torch.inf]), 3).tolist() == [2, 1, 0]


# ------------------------------------------------------------------ predictions


@pytest.mark.parametrize("name", NAMES)
def test_predictions_have_the_scores_of_their_logits(name):
    torch.testing.assert_close(of(name, CategoricalPrediction(LOGITS), LABELS), of(name, LOGITS, LABELS))


def test_what_needs_no_members_works_without_them():
    pooled = CategoricalPrediction(LOGITS).pool()
    for name in ("nll", "predictive_entropy", "margin", "max_softmax", "scaled_mean", "mutual_information"):
        torch.testing.assert_close(score(name, pooled, LABELS), score(name, LOGITS, LABELS), rtol=1e-4, atol=1e-6)
    assert score("uniform", pooled).shape == (12,)
    for name in ("variance", "joint_nll", "ucb", "scaled_std"):
        with pytest.raises(InputError, match="return_members"):
            score(name, pooled, LABELS)


def test_a_calibrated_prediction_is_read_as_such():
    hot = CategoricalPrediction(LOGITS, temperature=torch.tensor(4.0))
    torch.testing.assert_close(score("predictive_entropy", hot), hot.predictive_entropy)
    torch.testing.assert_close(score("nll", hot, LABELS), -hot.log_prob(LABELS))
    assert bool((score("predictive_entropy", hot) > score("predictive_entropy", LOGITS)).all())


def test_an_evidential_prediction_has_those_of_its_mean():
    prediction = DirichletPrediction(torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]))
    torch.testing.assert_close(score("mutual_information", prediction), prediction.mutual_information)
    torch.testing.assert_close(score("max_softmax", prediction), torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert acquire("predictive_entropy", prediction, 1).tolist() == [1]
    with pytest.raises(InputError, match="A DirichletPrediction has no member `logits`"):
        score("variance", prediction)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score("bold", LOGITS), "`name` must be one of uniform, .*, but it is 'bold'"),
        (lambda: score("nll", LOGITS), "The score 'nll' needs `labels`, but they are None"),
        (
            lambda: score("ucb", LOGITS, factors=2.0),
            r"options of 'ucb' must be among \['class_values', 'factor'\], but they are \['f",
        ),
        (
            lambda: score("predictive_entropy", LOGITS, logits=LOGITS),
            r"options of 'predictive_entropy' must be among \[\], but they are \['logits'\]",
        ),
        (lambda: score("predictive_entropy", LOGITS[0]), r"`logits` must be a floating-point tensor \[Z, B, C\]"),
        (lambda: score("predictive_entropy", LOGITS[..., :1]), r"C of at least 2, but its shape is \[7, 12, 1\]"),
        (lambda: score("predictive_entropy", LOGITS[:0]), r"Z of at least 1 .* but its shape is \[0, 12, 4\]"),
        (lambda: score("predictive_entropy", LOGITS.unsqueeze(3)), r"but its shape is \[7, 12, 4, 1\]"),
        (lambda: score("predictive_entropy", LOGITS * torch.nan), "`logits` must be finite"),
        (lambda: score("predictive_entropy", torch.full((1, 1, 2), -torch.inf)), "`logits` must be finite"),
        (lambda: score("predictive_entropy", LOGITS.long()), "floating-point"),
        (
            lambda: score("nll", LOGITS, LABELS.unsqueeze(1)),
            r"`target` must have shape \[12\], but its shape is \[12, 1\]",
        ),
        (lambda: score("nll", LOGITS, LABELS + 1), r"`target` must hold class indices in \[0, 4\), but it holds 4"),
        (lambda: score("joint_nll", LOGITS, LABELS, tau=0), "`tau` must be an integer of at least 1, but it is 0"),
        (lambda: score("ucb", LOGITS, factor=torch.inf), "`factor` must be finite, but it is inf"),
        (lambda: score("ucb", LOGITS, class_values=[1.0, 2.0]), "`class_values` must be 4 finite numbers"),
        (
            lambda: score("ucb", LOGITS, class_values=[1.0, 2.0, 3.0, torch.nan]),
            "`class_values` must be 4 finite numbers",
        ),
        (
            lambda: score("predictive_entropy", GaussianMixturePrediction(*2 * [torch.ones(1, 1, 1)])),
            "GaussianMixturePrediction",
        ),
        (lambda: select(torch.ones(3), 4), r"`scores` must hold at least 4 numbers \[B\], but its shape is \[3\]"),
        (lambda: select(torch.ones(3), 0), "`num` must be an integer of at least 1, but it is 0"),
        (lambda: select(torch.ones(3, 3), 1), r"but its shape is \[3, 3\]"),
        (lambda: select(torch.tensor([0.0, torch.nan]), 1), "`scores` must hold numbers, but 1 are NaN"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_score_has_one_name():
    """Acquisition and detection scores of one name are one function."""
    shared = ACQUISITION_SCORES.keys() & SCORES.keys()
    assert shared == {"predictive_entropy", "mutual_information", "max_softmax"}
    assert all(ACQUISITION_SCORES[name] is SCORES[name] for name in shared)
    assert not {"entropy", "bald", "var_ratios"} & (ACQUISITION_SCORES.keys() | SCORES.keys())


@pytest.mark.parametrize("name", sorted(set(ACQUISITION_SCORES) - {"nll", "joint_nll", "uniform"}))
def test_a_map_scores_as_the_mean_of_its_positions(name):
    logits = torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    found = score(name, CategoricalPrediction(logits))
    rows = score(name, logits.movedim(2, -1).reshape(3, -1, 2))
    torch.testing.assert_close(found, rows.reshape(4, -1).mean(1))
    with pytest.raises(InputError, match=r"must be \[Z, B, C\]"):
        score("nll", CategoricalPrediction(logits), torch.zeros(4, dtype=torch.long))

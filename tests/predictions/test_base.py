"""What holds for every type: a frozen set of tensors that moves, slices, concatenates, copies and names its scores."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_uq import predictions
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.predictions import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    PointPrediction,
    Prediction,
    QuantilePrediction,
    StudentTMixturePrediction,
    StudentTPrediction,
)
from lightning_uq.predictions.fields import Field
from tests.predictions.cases import (
    ALL,
    WITH_MEMBERS,
    assert_same,
    bernoulli,
    categorical,
    dirichlet,
    gaussian_mixture,
    student_t,
    tensors,
)
from tests.tolerance import tolerance

# ---------------------------------------------------------------------- construction


def test_a_type_declares_its_tensors_once():
    logits = torch.zeros(1, 2, 3)
    calibrations = ["temperature", "class_scaling", "class_matrix", "class_curves"]
    assert list(CategoricalPrediction._fields) == [
        "logits",
        "log_density",
        "ood_score",
        "score_summary",
        "ood_p_value",
        "ood_alarm",
        "prior_precision",
        "prediction_set",
        "answered",
        "member_temperature",
        *calibrations,
    ]
    assert_same(CategoricalPrediction(logits=logits), CategoricalPrediction(logits))
    assert str(inspect.signature(CategoricalPrediction)).startswith("(logits: torch.Tensor, *, log_density: ")
    assert isinstance(CategoricalPrediction.logits, Field)
    assert CategoricalPrediction.logits.__doc__.startswith("Raw logits [Z, B, C, ...]")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CategoricalPrediction(), "missing a required argument: 'logits'"),
        (lambda: CategoricalPrediction(torch.zeros(1, 2, 3), torch.zeros(())), "too many positional arguments"),
        (lambda: CategoricalPrediction(torch.zeros(1, 2, 3), logits=torch.zeros(1, 2, 3)), "multiple values"),
        (lambda: CategoricalPrediction(torch.zeros(1, 2, 3), temprature=torch.ones(())), "unexpected keyword"),
    ],
)
def test_wrong_arguments_are_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CategoricalPrediction([1.0]), "`logits` must be a tensor, but it is a list"),
        (lambda: CategoricalPrediction(None), "`logits` must be a tensor, but it is a NoneType"),
        (
            lambda: categorical(log_density=torch.zeros(3)),
            "`log_density` must have as many rows as `logits`: 4, but it has 3",
        ),
        (lambda: categorical().replace(log_density=torch.zeros(3)), "`log_density` must have as many rows"),
        (lambda: categorical(log_density=torch.zeros(())), r"must have its batch in axis 0, but its shape is \[\]"),
        (lambda: categorical().replace(logits=None), "`logits` must be a tensor"),
        (
            lambda: categorical().replace(temprature=torch.ones(())),
            r"has no tensors \['temprature'\]. It has logits, log",
        ),
        (lambda: dirichlet().replace(concentration=torch.zeros(1, 4, 5)), "must be positive"),
    ],
)
def test_wrong_tensors_are_input_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_values_are_looked_at_once(monkeypatch):
    looks = []
    for make in (dirichlet, student_t):
        prediction = make()
        monkeypatch.setattr(type(prediction), "_check_values", lambda self: looks.append(type(self)))
        prediction[1:].replace(log_density=torch.zeros(3)).to(torch.float64).cat([prediction, prediction])
        assert not looks
        type(prediction)(**tensors(prediction))
        assert looks.pop() is type(prediction)


# ---------------------------------------------------------------------- a frozen set of tensors


@pytest.mark.parametrize("make", ALL)
def test_it_is_frozen_pickles_and_copies(make):
    prediction = make()
    with pytest.raises(AttributeError, match="frozen"):
        prediction.probs = torch.zeros(1)
    prediction.to_dict()  # what was computed is not copied
    for twin in (pickle.loads(pickle.dumps(prediction)), copy.deepcopy(prediction), copy.copy(prediction)):
        assert_same(twin, prediction)
        assert "_kept" not in vars(twin)
        assert twin != prediction
    assert prediction == prediction
    assert len({prediction, make()}) == 2


def test_its_repr_shows_shapes():
    assert repr(categorical(log_density=torch.zeros(4))) == "CategoricalPrediction(logits=[3, 4, 5], log_density=[4])"


@pytest.mark.parametrize("make", ALL)
def test_to_moves_every_tensor_and_leaves_the_first_as_it_was(make):
    prediction = make()
    before = {name: tensor.dtype for name, tensor in tensors(prediction).items()}
    moved = prediction.to("cpu", torch.float64)
    assert {tensor.dtype for tensor in tensors(moved).values()} == {torch.float64}
    assert {name: tensor.dtype for name, tensor in tensors(prediction).items()} == before


def test_replace_adds_changes_and_removes():
    density = torch.arange(4.0)
    with_density = categorical().replace(log_density=density)
    assert torch.equal(with_density.log_density, density)
    assert_same(with_density.replace(log_density=None), categorical())
    assert with_density.replace(logits=torch.zeros(1, 4, 2)).num_indices == 1


@pytest.mark.parametrize("make", ALL)
def test_a_density_travels_and_its_lack_is_said(make):
    with pytest.raises(NotFittedError, match="carries no `log_density`: no feature density was fitted"):
        _ = make().log_density
    density = torch.arange(4.0)
    prediction = make(log_density=density)
    assert torch.equal(prediction.to_dict()["log_density"], density)
    assert torch.equal(prediction.pool().log_density, density)


def test_an_uncalibrated_prediction_has_no_temperature():
    with pytest.raises(NotFittedError, match="carries no `temperature`"):
        _ = categorical().temperature


def test_what_was_computed_is_kept_per_autograd_mode():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    prediction = CategoricalPrediction(logits)
    with torch.no_grad():
        assert not prediction.log_probs.requires_grad
    with torch.inference_mode():
        assert prediction.log_probs.is_inference()
    assert prediction.log_probs.requires_grad
    assert prediction.log_probs is prediction.log_probs
    (gradient,) = torch.autograd.grad(prediction.predictive_entropy.sum(), logits)
    assert gradient.abs().sum() > 0


def test_an_evaluation_pools_the_members_once(monkeypatch):
    from lightning_uq.functional import entropy

    calls = []
    pooled = entropy.mean_log_probs
    monkeypatch.setattr(entropy, "mean_log_probs", lambda logits: calls.append(1) or pooled(logits))
    prediction = categorical(temperature=torch.tensor(2.0))
    _ = prediction.probs, prediction.label, prediction.confidence, prediction.predictive_entropy
    prediction.log_prob(torch.zeros(4, dtype=torch.long))
    assert calls == [1]


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("make", ALL)
def test_rows_are_those_of_every_tensor(make):
    whole = make(6, log_density=torch.arange(6.0))
    assert len(whole) == len(list(whole)) == 6
    for index in (slice(1, 4), [1, 2, 3], torch.tensor([1, 2, 3]), np.array([1, 2, 3]), torch.tensor([1, -4, 3])):
        part = whole[index]
        assert part.log_density.tolist() == [1, 2, 3]
        for name, values in whole.to_dict().items():
            torch.testing.assert_close(part.to_dict()[name], values[1:4], **tolerance(torch.float32))
    mask = whole.log_density > 2.5
    for index in (mask, mask.numpy(), mask.tolist(), slice(3, None), slice(-3, None)):
        assert_same(whole[index], whole[[3, 4, 5]])
    for index in (4, -2, np.int64(4), torch.tensor(4)):
        assert_same(whole[index], whole[4:5])
    assert_same(whole[::-2], whole[[5, 3, 1]])
    assert_same(whole[::2], whole[[0, 2, 4]])
    for empty in ([], slice(2, 2), ~mask & mask, np.array([], dtype=int)):
        assert len(whole[empty]) == 0
    assert [int(row.log_density) for row in whole] == list(range(6))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (4, IndexError, "Row 4 is out of range: the prediction has 4 rows"),
        (-5, IndexError, "Row -5 is out of range"),
        ([0, 4], IndexError, "Row 4 is out of range"),
        (torch.tensor([-5, 0]), IndexError, "Row -5 is out of range"),
        (1.5, InputError, r"an integer, a slice, a mask \[B\] or positions \[N\], but the index is a float: 1.5"),
        ([0.0, 1.0], InputError, "Positions of rows must be integers, but they are torch.float64"),
        (np.array([1.0]), InputError, "they are torch.float64"),
        ((0, 1), InputError, "the index is a tuple"),
        (None, InputError, "the index is a NoneType"),
        (True, InputError, "the index is a bool"),
        ("logits", InputError, "the index is a str: 'logits'"),
        (["a"], InputError, "the index is a list"),
        ([True, False, True], InputError, "A mask must have one value per row: 4, but it has 3"),
        (torch.ones(4, 5, dtype=torch.bool), InputError, r"must have one axis, but its shape is \[4, 5\]"),
    ],
)
def test_other_indices_are_named(index, error, message):
    with pytest.raises(error, match=message):
        _ = categorical()[index]


@given(st.data())
def test_cat_puts_slices_together_again(data):
    make = data.draw(st.sampled_from(ALL))
    b = data.draw(st.integers(1, 6))
    whole = make(b, log_density=torch.arange(float(b)))
    cuts = sorted(data.draw(st.lists(st.integers(0, b), max_size=3)))
    parts = [whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, b], strict=True)]
    assert_same(type(whole).cat(parts), whole)
    order = data.draw(st.permutations(range(b)))
    assert_same(whole[order][np.argsort(order)], whole)
    mask = data.draw(st.lists(st.booleans(), min_size=b, max_size=b))
    kept = whole[mask]
    assert len(kept) == sum(mask)
    for name in whole.score_names:
        torch.testing.assert_close(kept.score(name), whole.score(name)[torch.tensor(mask)], **tolerance(torch.float32))


@pytest.mark.parametrize("make", ALL)
def test_cat_of_batches_is_the_prediction_of_the_whole(make):
    parts = [make(1), make(3), make(2)]
    whole = Prediction.cat(parts)
    assert len(whole) == 6
    for name, value in whole.to_dict().items():
        torch.testing.assert_close(value, torch.cat([part.to_dict()[name] for part in parts]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (list, "must hold at least one prediction, but it is empty"),
        (lambda: [categorical(), dirichlet()], "of one type, but it holds CategoricalPrediction, DirichletPrediction"),
        (
            lambda: [categorical(), categorical(log_density=torch.zeros(4))],
            "All or none .* `log_density`, but only some do",
        ),
        (lambda: [categorical(temperature=torch.tensor(t)) for t in (1.0, 2.0)], "`temperature` must be the same"),
        (
            lambda: [categorical(z=2), categorical(z=3)],
            r"`logits` may differ only in axis 1 .* \[2, 4, 5\] and \[3, 4, 5\]",
        ),
        (lambda: [[categorical()], [categorical()]], "but it holds a list. With several loaders"),
    ],
)
def test_cat_refuses_what_does_not_belong_together(parts, message):
    with pytest.raises(InputError, match=message):
        CategoricalPrediction.cat(parts())


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("make", ALL)
def test_every_named_score_has_one_number_per_row(make):
    prediction = make()
    assert prediction.score_names
    for name in prediction.score_names:
        score = prediction.score(name)
        assert score.shape == (4,)
        assert score.isfinite().all()
    with pytest.raises(
        InputError, match=f"has no score 'surprise'. Its scores are {', '.join(prediction.score_names)}."
    ):
        prediction.score("surprise")


@pytest.mark.parametrize("make", ALL)
def test_a_low_density_is_a_high_score(make):
    density = torch.tensor([-3.0, 0.0, 2.0, 1.0])
    prediction = make(log_density=density)
    assert torch.equal(prediction.score("log_density"), -density)
    with pytest.raises(InputError, match=r"has no score 'surprise'. Its scores are .*, log_density, ood_score\."):
        prediction.score("surprise")
    with pytest.raises(NotFittedError, match="carries no `log_density`: no feature density was fitted"):
        make().score("log_density")


def test_a_prediction_of_numbers_has_no_logits():
    prediction = gaussian_mixture()
    assert not prediction.has_logits
    with pytest.raises(InputError, match="A GaussianMixturePrediction has no member `logits`"):
        _ = prediction.logits
    with pytest.raises(InputError, match="A GaussianMixturePrediction has no member `logits`"):
        prediction.map_logits(torch.exp)


# ---------------------------------------------------------------------- somebody's own type


def test_somebodys_own_type_is_a_few_lines():
    class Poisson(Prediction):
        score_names = ("rate",)
        rate = Field("Rates [B].", batch_axis=0)

        def log_prob(self, target):
            return torch.distributions.Poisson(self.rate).log_prob(target)

        def to_dict(self, interval=None):
            return {"rate": self.rate, **self._density()}

    prediction = Poisson(torch.tensor([1.0, 2.0, 3.0]))
    assert prediction[[True, False, True]].score("rate").tolist() == [1, 3]
    assert len(Poisson.cat([prediction, prediction[0]])) == 4
    assert prediction.pool() is prediction
    assert prediction.num_indices is None
    assert prediction.map_shape == ()


@pytest.mark.parametrize(
    "index",
    [np.array([3, 1])[::-1], range(1, 4, 2), np.array([1, 3], dtype=np.uint16)],
    ids=["reversed", "range", "uint16"],
)
def test_rows_are_taken_in_any_order_that_numpy_gives(index):
    prediction = CategoricalPrediction(torch.arange(30.0).reshape(2, 5, 3))
    expected = prediction.logits[:, list(index)]
    assert torch.equal(prediction[index].logits, expected)


def test_values_known_to_be_in_range_are_not_looked_at_again():
    bad = -torch.ones(1, 2, 3)
    assert DirichletPrediction.of_checked(concentration=bad).concentration is bad
    with pytest.raises(InputError, match="must be positive"):
        DirichletPrediction(bad)
    with pytest.raises(InputError, match=r"shape \[Z, B, C\]"):
        DirichletPrediction.of_checked(concentration=bad[0])


@pytest.mark.parametrize("make", ALL)
def test_a_table_filtered_by_a_score_finds_the_rows_that_have_none(make):
    """``score > threshold`` is False for NaN, so that the row without an answer would pass as a sure one."""
    whole = make(4, log_density=torch.tensor([-1.0, -torch.inf, -3.0, -2.0]))
    tensors = {}
    for name, tensor, axis in whole._present():
        tensors[name] = tensor.clone()
        if name != "log_density" and axis is not None:
            tensors[name].select(axis, 1).fill_(torch.nan)
    found, clean = type(whole).of_checked(**tensors).to_dict(), whole.to_dict()
    assert torch.equal(found["ood_score"], torch.tensor([1.0, torch.inf, 3.0, 2.0]))
    bad = torch.arange(4) == 1
    scores = [name for name in found if name in (*whole.score_names, "mutual_information", "expected_entropy")]
    assert scores
    for name, values in found.items():
        torch.testing.assert_close(values[~bad], clean[name][~bad])
        if name in scores:
            assert bool((values[bad] == torch.inf).all()), name
        elif name == "label":
            assert bool((values[bad] == -1).all())
        elif name not in ("log_density", "ood_score"):
            assert bool(values[bad].isnan().all()), name


def spread(kind):
    """Types of numbers that no other file makes, with Z x 4 rows."""

    def make(*, z, **kwargs):
        part = torch.randn(z, 4, 2, 3, generator=torch.Generator().manual_seed(z))
        mean = part[..., 0]
        return {
            PointPrediction: lambda: PointPrediction(mean, **kwargs),
            QuantilePrediction: lambda: QuantilePrediction(
                part.sort(-1).values, torch.tensor([0.1, 0.5, 0.9]), **kwargs
            ),
            MixtureDensityPrediction: lambda: MixtureDensityPrediction(part, part, part.exp(), **kwargs),
            StudentTMixturePrediction: lambda: StudentTMixturePrediction(mean, mean.exp(), 3 + mean.exp(), **kwargs),
        }[kind]()

    return make


MAKERS = {
    CategoricalPrediction: categorical,
    BernoulliPrediction: bernoulli,
    DirichletPrediction: dirichlet,
    GaussianMixturePrediction: gaussian_mixture,
    StudentTPrediction: student_t,
    **{
        kind: spread(kind)
        for kind in (PointPrediction, QuantilePrediction, MixtureDensityPrediction, StudentTMixturePrediction)
    },
}
CALIBRATIONS = {
    "temperature": torch.tensor(2.0),
    "class_scaling": torch.tensor([[1.0, 2, 3, 1, 1], [0, 1, 0, 0, 0]]),
    "class_matrix": torch.cat(
        [torch.eye(5) + 0.1, torch.zeros(1, 5), torch.full((1, 5), -9.0), torch.full((1, 5), 0.5)]
    ),
    "class_curves": torch.tensor([[[-3.0, 0.0]] * 5, [[0.1, 0.8]] * 5]),
}


def test_every_type_is_made_here():
    kinds = {type(make(z=2).pool()) for make in MAKERS.values()} | MAKERS.keys()
    concrete = {one for one in vars(predictions).values() if inspect.isclass(one) and not inspect.isabstract(one)}
    assert kinds == {one for one in concrete if issubclass(one, Prediction)}


@given(
    kind=st.sampled_from(list(MAKERS)),
    z=st.integers(1, 3),
    calibration=st.sampled_from([None, *CALIBRATIONS]),
    when_pooled=st.sampled_from([None, "before", "after"]),
    density=st.booleans(),
)
def test_every_listed_score_exists(kind, z, calibration, when_pooled, density):
    """Whatever a calibration, or the pooling, leaves of a prediction: each name that it lists is a score."""
    prediction = MAKERS[kind](z=z, **({"log_density": torch.arange(4.0)} if density else {}))
    if when_pooled == "before":
        prediction = prediction.pool()
    if calibration in type(prediction)._fields:
        prediction = prediction.replace(**{calibration: CALIBRATIONS[calibration]})
    if when_pooled == "after":
        prediction = prediction.pool()
    assert len(set(prediction.score_names)) == len(prediction.score_names)
    for name in prediction.score_names:
        assert prediction.score(name).shape == (4,), name


@pytest.mark.parametrize("make", [*WITH_MEMBERS, *(spread(kind) for kind in (PointPrediction, QuantilePrediction))])
def test_what_a_density_added_stays_in_every_form(make):
    density, score = torch.arange(4.0), 9 + torch.arange(4.0)
    whole = make(z=3, log_density=density, ood_score=score)
    for form in (whole, whole.pool(), whole[torch.arange(4)], type(whole).cat([whole[:2], whole[2:]]), whole.to("cpu")):
        assert torch.equal(form.log_density, density)
        assert torch.equal(form.ood_score, score)
        assert torch.equal(form.score("ood_score"), score)

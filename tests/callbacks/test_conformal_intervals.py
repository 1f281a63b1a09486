"""Conformal intervals: their coverage, their equality with another library's, and what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq import ConformalIntervals, DeterministicModule, EnsembleModule
from lightning_uq.callbacks import PredictionWriter, read_predictions
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.predictions import (
    CategoricalPrediction,
    GaussianMixturePrediction,
    PointPrediction,
    QuantilePrediction,
)
from lightning_uq.tasks import Regression
from tests.callbacks.conformal import pairs, resplit
from tests.contract import cases

NUM = 1500
REFERENCE = {
    key: torch.from_numpy(value)
    for key, value in np.load(Path(__file__).parents[1] / "reference/conformal.npz").items()
}


def rows(method, num=NUM, shape=(1,)):
    """Predictions, with errors that are larger than they say, and targets."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(num, *shape, generator=generator)
    spread = 0.2 + torch.rand(num, *shape, generator=generator)
    target = mean + 2 * spread * torch.randn(mean.shape, generator=generator)
    if method == "absolute":
        return PointPrediction(mean[None]), target
    if method == "normalized":
        return GaussianMixturePrediction(mean[None], spread[None] ** 2), target
    quantiles = mean[..., None] + spread[..., None] * torch.tensor([-2.0, 0.0, 1.0])
    return QuantilePrediction(quantiles[None], torch.tensor([0.05, 0.5, 0.95])), target


def inside(bounds, target):
    lower, upper = bounds
    return (lower <= target) & (target <= upper)


def fitted_on(conformal, reduced, fitted):
    """Fit some of the rows that were reduced once."""
    conformal._set(conformal.fit_rows(*(part[fitted] for part in reduced)), None)
    return conformal


# ---------------------------------------------------------------------- coverage


@pytest.mark.parametrize("method", ["absolute", "normalized", "cqr"])
def test_coverage_over_a_thousand_resplits(method):
    prediction, target = rows(method)
    conformal = ConformalIntervals(method=method)
    reduced = conformal.rows(prediction, target)

    def covered(fitted, others):
        return (reduced[0][others] <= fitted_on(conformal, reduced, fitted).margin).double().mean()

    assert resplit(NUM, covered).mean().item() == pytest.approx(0.9, abs=0.003)
    # The intervals hold exactly the targets with such scores, and come from predictions alone.
    one = ConformalIntervals(method=method).fit_predictions(prediction[:499], target[:499])
    found = inside(one.intervals(prediction[499:]), target[499:])
    assert torch.equal(found, reduced[0][499:] <= one.margin)
    changed = one.change(prediction[499:])
    assert torch.equal(changed.conformal_lower, one.intervals(prediction[499:])[0])


def test_coverage_within_each_group():
    prediction, target = rows("absolute")
    group = torch.arange(NUM) % 3
    target = prediction.mean + (target - prediction.mean) * (1 + group)[:, None]
    conformal, marginal = ConformalIntervals(groups=torch.ones_like), ConformalIntervals()
    reduced = conformal.rows(prediction, target, groups=group)

    def covered(fitted, others):
        within = reduced[0][others] <= fitted_on(conformal, reduced, fitted).margin[group[others]]
        over_all = reduced[0][others] <= fitted_on(marginal, reduced[:1], fitted).margin
        return torch.stack(
            [torch.stack([one[group[others] == g].double().mean() for g in range(3)]) for one in (within, over_all)]
        )

    found, over_all = resplit(NUM, covered).mean(0)
    assert float(found.min()) > 0.897
    assert float(found.max()) < 0.9 + 1 / 120  # a group has some 166 rows: one rank more
    assert float(over_all.max() - over_all.min()) > 0.05  # else nothing was shown


@pytest.mark.parametrize("simultaneous", [False, True])
def test_coverage_of_a_horizon_with_two_targets(simultaneous):
    prediction, target = rows("absolute", shape=(4, 2))
    conformal = ConformalIntervals(simultaneous=simultaneous)
    reduced = conformal.rows(prediction, target)

    def covered(fitted, others):
        fitted_on(conformal, reduced, fitted)
        found = inside(conformal.intervals(prediction[others]), target[others])
        return (found.all(1) if simultaneous else found).double().mean(0)

    found = resplit(NUM, covered, times=400).mean(0)
    assert conformal.margin.shape == found.shape == ((2,) if simultaneous else (4, 2))
    torch.testing.assert_close(found, torch.full_like(found, 0.9), rtol=0, atol=0.004)


@pytest.mark.parametrize("simultaneous", [False, True])
def test_missing_steps_are_left_out(simultaneous):
    prediction, target = rows("absolute", num=200, shape=(3, 2))
    target[::3, 1, 0] = torch.nan
    known = ~target.isnan()
    conformal = ConformalIntervals(simultaneous=simultaneous).fit_predictions(prediction, target)
    error = (target.double() - prediction.mean.double()).abs()
    if simultaneous:
        whole = known.all(1)
        expected = torch.stack(
            [
                error.amax(1)[whole[:, d], d].sort().values[int(np.ceil(0.9 * (int(whole[:, d].sum()) + 1))) - 1]
                for d in range(2)
            ]
        )
    else:
        expected = torch.stack(
            [
                error[:, h, d][known[:, h, d]].sort().values[int(np.ceil(0.9 * (int(known[:, h, d].sum()) + 1))) - 1]
                for h in range(3)
                for d in range(2)
            ]
        ).reshape(3, 2)
    torch.testing.assert_close(conformal.margin, expected)
    lower, upper = conformal.intervals(prediction)
    assert lower.shape == upper.shape == (200, 3, 2)
    with pytest.raises(InputError, match="a known number for each target and step, but one of them is NaN in all rows"):
        ConformalIntervals().fit_predictions(prediction, target.index_fill(1, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize("shape", [(1,), (3, 2)])
def test_coverage_under_a_known_covariate_shift(shape):
    """Inputs move from N(0, 1) to N(1, 1), where the noise is larger."""
    generator = torch.Generator().manual_seed(0)

    def draw(num, shift):
        x = torch.randn(num, generator=generator) + shift
        noise = torch.where(x > 0, 3.0, 0.5).reshape(-1, *[1] * len(shape)) * torch.randn(
            num, *shape, generator=generator
        )
        return (x - 0.5).exp(), PointPrediction(torch.zeros(1, num, *shape)), noise

    found = []
    for _ in range(100):
        (weights, prediction, y), (new_weights, new, new_y) = draw(500, 0.0), draw(200, 1.0)
        weighted = ConformalIntervals(density_ratio=torch.ones_like).fit_predictions(prediction, y, weights=weights)
        plain = ConformalIntervals().fit_predictions(prediction, y)
        bounds = weighted.intervals(new, weights=new_weights), plain.intervals(new)
        found.append([inside(one, new_y).double().mean() for one in bounds])
    of_weighted, of_plain = torch.tensor(found).mean(0).tolist()
    assert 0.89 < of_weighted < 0.925
    assert of_plain < 0.87  # else nothing was shown


@pytest.mark.parametrize("alpha", [0.2, 0.25, 0.3, 0.4, 0.5])
def test_a_target_on_the_bound_is_inside_whatever_the_rounding(alpha):
    """Targets in float64 that take few values, and predictions in float32: bounds are rounded to the outside."""
    target = torch.arange(-9, 10, dtype=torch.float64).repeat(100) / 10
    for offset in (0.0, 0.3):
        prediction = PointPrediction(torch.full((1, len(target), 1), offset))
        conformal = ConformalIntervals(alpha=alpha).fit_predictions(prediction, target)
        lower, upper = conformal.intervals(prediction)
        assert lower.dtype == torch.float32
        assert inside((lower, upper), target[:, None]).double().mean() >= 1 - alpha
        assert ((upper - lower).double() / 2 - conformal.margin).abs().max() < 1e-6


def test_a_variance_of_zero_is_a_number_like_any_other():
    prediction, target = rows("normalized", num=200)
    variance = prediction.variance.clone()
    variance[::50] = 0.0
    sure = GaussianMixturePrediction(prediction.mean[None], variance[None])
    conformal = ConformalIntervals(method="normalized").fit_predictions(sure, target)
    lower, upper = conformal.intervals(sure)
    assert inside((lower, upper), target).double().mean() >= 0.9
    assert bool((upper - lower)[::50].max() < 1e-5)


# ---------------------------------------------------------------------- equal to others


@pytest.mark.parametrize("method", ["absolute", "cqr"])
def test_intervals_are_those_of_mapie(method):
    mean, low, high = REFERENCE["outputs"].T
    if method == "absolute":
        prediction = PointPrediction(mean[None, :, None])
    else:
        levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        prediction = QuantilePrediction(torch.stack([low, mean, high], 1)[None, :, None], levels)
    conformal = ConformalIntervals(alpha=0.2, method=method)
    conformal.fit_predictions(prediction[:80], REFERENCE["regression_target"][:80])
    found = torch.cat(conformal.intervals(prediction[80:]), 1)
    torch.testing.assert_close(found, REFERENCE[method], rtol=0, atol=1e-14)


# ---------------------------------------------------------------------- tasks

ADAM = cases.OPTIMIZERS["regression"]
KINDS = {
    "mean": ("regression", cases.mean_network, Regression(head="mean"), "absolute", (2,)),
    "gaussian": ("regression", cases.gaussian_network, "regression", "normalized", (2,)),
    "quantiles": ("regression", cases.quantile_network, Regression(head="quantiles"), "cqr", (2,)),
    "student_t": ("regression", cases.student_t_network, Regression(head="student_t"), "cqr", (2,)),
    "mixture": ("regression", cases.mixture_network, Regression(head="mixture", components=2), "normalized", (2,)),
    "maps": ("pixel_regression", cases.gaussian_map_network, "pixel_regression", "normalized", (1, 2, 2)),
    "horizon": ("horizon", cases.horizon_network, cases.HORIZON, "normalized", (3, 2)),
}


@pytest.mark.parametrize(
    "make", [DeterministicModule, partial(EnsembleModule, num_members=33, seed=0)], ids=["one", "pooled"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_and_head_has_intervals(make_trainer, tmp_path, kind, make):
    data, network, task, method, shape = KINDS[kind]
    if make is not DeterministicModule and kind not in ("mean", "gaussian", "maps"):
        pytest.skip("one code path")
    module = make(network, task=task, optimizer=ADAM)
    conformal = ConformalIntervals(alpha=0.2, method=method)
    trainer = make_trainer(callbacks=[conformal, PredictionWriter(tmp_path / "p", format="npz", interval=None)])
    trainer.fit(module, cases.loader(data, 40), cases.loader(data, 61, 1))
    (tested,) = trainer.test(module, cases.loader(data, 61, 1), verbose=False)  # the fitted rows themselves
    assert tested["uq/test_coverage"] >= 0.8
    found = trainer.predict(module, cases.loader(data, 27, 2))
    prediction = type(found[0]).cat(found)
    assert prediction.conformal_lower.shape == prediction.conformal_upper.shape == (27, *shape)
    assert bool((prediction.conformal_lower < prediction.conformal_upper).all())
    written = read_predictions(tmp_path / "p")
    assert np.array_equal(written["conformal_upper"], prediction.conformal_upper.numpy())


def test_maps_are_rows_of_one_position_each():
    data = cases.dataset("pixel_regression", 61, 1)
    module = DeterministicModule(cases.gaussian_map_network, task="pixel_regression")
    x, y = data.tensors
    prediction = module.prediction(module(x))
    direct = ConformalIntervals().fit_predictions(prediction.as_rows(), y.flatten()[:, None])
    conformal = ConformalIntervals().fit(module, pairs(x, y))
    torch.testing.assert_close(conformal.margin, direct.margin)
    maps = module.predict(x)
    torch.testing.assert_close(maps.as_rows().conformal_lower, direct.intervals(prediction.as_rows())[0])
    with pytest.raises(InputError, match=r"Pass `prediction.as_rows\(\)`"):
        conformal.fit_predictions(prediction, y)
    few = [ConformalIntervals(max_rows=50).fit(module, pairs(x, y, batch_size=size)) for size in (8, 61)]
    torch.testing.assert_close(few[0].state["scores"], few[1].state["scores"])  # one sample in any batches


@pytest.mark.parametrize("kind", ["mean", "gaussian", "quantiles", "horizon"])
def test_an_input_that_is_not_finite_gets_all_numbers(kind):
    data, network, task, method, _ = KINDS[kind]
    module = DeterministicModule(network, task=task)
    module.nonfinite = "inf"
    ConformalIntervals(alpha=0.2, method=method, density_ratio=lambda x: x[:, 0].exp()).fit(
        module, cases.loader(data, 61, 1)
    )
    x, _ = cases.rows(4)
    x[1], x[3] = torch.nan, torch.inf
    prediction = module.predict(x)
    assert bool((prediction.conformal_lower[[1, 3]] == -torch.inf).all())
    assert bool((prediction.conformal_upper[[1, 3]] == torch.inf).all())
    assert bool(prediction.conformal_lower[[0, 2]].isfinite().all())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.0}, "`alpha` must"),
        ({"alpha": 1.5}, "`alpha` must"),
        ({"method": "lac"}, "`method` must be"),
        ({"simultaneous": "yes"}, "`simultaneous` must"),
        (
            {"groups": torch.ones_like, "density_ratio": torch.ones_like},
            "`groups` and `density_ratio` cannot be combined",
        ),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        ConformalIntervals(**kwargs)


PREDICTION, TARGET = rows("absolute", num=40)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (PREDICTION[:0], TARGET[:0], "at least one row"),
        (PREDICTION, TARGET[:5], "`target` must"),
        (PREDICTION, TARGET.squeeze(1)[None], "`target` must"),
        (PREDICTION, TARGET * torch.nan, "one of them is NaN in all rows"),
        (PREDICTION, TARGET / 0, "`target` must be finite"),
        (
            CategoricalPrediction(torch.zeros(1, 40, 3)),
            torch.zeros(40).long(),
            "must predict numbers, but it is a Categorical",
        ),
    ],
)
def test_predictions_that_cannot_be_fitted(prediction, target, message):
    with pytest.raises(InputError, match=message):
        ConformalIntervals().fit_predictions(prediction, target)


@pytest.mark.parametrize(
    ("method", "network", "head", "message"),
    [
        (
            "normalized",
            cases.mean_network,
            "mean",
            "method='normalized' cannot be used .* no `variance`.*use a head with a variance",
        ),
        ("normalized", cases.quantile_network, "quantiles", "method='normalized' cannot be used .* no `variance`"),
        ("cqr", cases.mean_network, "mean", "method='cqr' cannot be used .* no `interval`"),
        (
            "cqr",
            cases.quantile_network,
            "quantiles",
            "The quantile at level 0.025 lies outside .* Predict more `levels`",
        ),
    ],
)
def test_methods_that_do_not_suit_the_head_are_refused_before_the_training(
    make_trainer, method, network, head, message
):
    module = DeterministicModule(network, task=Regression(head=head), optimizer=ADAM)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(InputError, match=message):
        make_trainer(callbacks=[ConformalIntervals(alpha=0.05, method=method)]).fit(
            module, cases.loader("regression", 40), cases.loader("regression", 61, 1)
        )
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def raises(x):
    raise ZeroDivisionError("a function of the user's own")


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (lambda x: [0] * len(x), InputError, "`groups` must be a tensor with one number per row, .* but it is a list"),
        (lambda x: torch.zeros(3).long(), InputError, r"one number per row, \[8\], but its shape is \[3\]"),
        (lambda x: x[:, 0], InputError, "`groups` must be integers, but their dtype is torch.float32"),
        (lambda x: -torch.ones(len(x)).long(), InputError, "`groups` must be numbered from 0"),
        (lambda x: torch.full((len(x),), 10**10), InputError, "`groups` must be numbered from 0 and at most"),
        (raises, ZeroDivisionError, "a function of the user's own"),
    ],
)
def test_functions_that_give_no_groups_are_refused_before_the_training(make_trainer, groups, error, message):
    module = cases.UsersRegressor()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(error, match=message):
        make_trainer(callbacks=[ConformalIntervals(groups=groups)]).fit(
            module, cases.loader("regression", 40), cases.loader("regression", 61, 1)
        )
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_groups_and_density_ratios_must_be_where_they_belong():
    by_group = ConformalIntervals(groups=torch.ones_like)
    with pytest.raises(InputError, match="`groups` is missing: ConformalIntervals has a function"):
        by_group.fit_predictions(PREDICTION, TARGET)
    groups = torch.arange(40) % 2
    with pytest.raises(InputError, match="`weights` must be a floating-point tensor"):
        ConformalIntervals().fit_predictions(PREDICTION, TARGET, weights=groups)  # they are no groups
    with pytest.raises(InputError, match="`groups` and `weights` exclude each other"):
        ConformalIntervals().fit_predictions(PREDICTION, TARGET, weights=torch.ones(40), groups=groups)
    with pytest.raises(InputError, match="`density_ratio` must be positive for some of the fitted rows"):
        ConformalIntervals().fit_predictions(PREDICTION, TARGET, weights=torch.zeros(40))
    by_group.fit_predictions(PREDICTION, TARGET, groups=groups)
    with pytest.raises(
        InputError, match="`groups` of ConformalIntervals depends on the input, which `change` does not get"
    ):
        by_group.change(PREDICTION)
    with pytest.raises(InputError, match="`groups` of the new rows are missing"):
        by_group.intervals(PREDICTION)
    lower, upper = by_group.intervals(PREDICTION[:3], groups=torch.tensor([0, 1, 7]))
    torch.testing.assert_close(upper[:2] - lower[:2], (2 * by_group.margin).float())
    assert upper[2] == torch.inf  # nobody has seen this group
    two = ConformalIntervals(groups=torch.ones_like).fit_predictions(PREDICTION, TARGET, groups=groups.bool())
    assert torch.equal(two.margin, by_group.margin)


def test_too_few_rows_give_infinite_intervals_and_a_warning():
    with pytest.warns(
        UserWarning, match="gives infinite intervals: alpha=0.1 needs 9 rows with a target, but there are 8"
    ):
        few = ConformalIntervals().fit_predictions(PREDICTION[:8], TARGET[:8])
    lower, upper = few.intervals(PREDICTION)
    assert bool((lower == -torch.inf).all() and (upper == torch.inf).all())
    groups = torch.where(torch.arange(40) < 5, 900, 2)
    with pytest.warns(UserWarning, match=r"gives groups \[900\] infinite intervals"):
        ConformalIntervals(groups=torch.ones_like).fit_predictions(PREDICTION, TARGET, groups=groups)


def test_quantiles_are_fitted_for_one_level():
    prediction, target = rows("cqr", num=200)
    conformal = ConformalIntervals(method="cqr").fit_predictions(prediction, target)
    with pytest.raises(InputError, match="With method='cqr', the fit holds only for alpha=0.1"):
        conformal.intervals(prediction, alpha=0.2)
    conformal.alpha = 0.2
    with pytest.raises(InputError, match="With method='cqr', the fit holds only for alpha=0.1"):
        conformal.change(prediction)
    conformal.alpha = 0.1
    with pytest.raises(InputError, match="alpha"):
        ConformalIntervals(method="cqr", alpha=0.2).load_state_dict(conformal.state_dict())
    absolute = ConformalIntervals().fit_predictions(PREDICTION, TARGET)
    other = ConformalIntervals(alpha=0.2)
    other.load_state_dict(absolute.state_dict())
    assert torch.equal(other.margin, ConformalIntervals(alpha=0.2).fit_predictions(PREDICTION, TARGET).margin)
    assert torch.equal(absolute.intervals(PREDICTION, alpha=0.2)[0], other.intervals(PREDICTION)[0])


def test_bands_need_steps_and_intervals_a_fit():
    with pytest.raises(InputError, match=r"`simultaneous` is for the steps of a horizon \[B, H, D\]"):
        ConformalIntervals(simultaneous=True).fit_predictions(PREDICTION, TARGET)
    steps = PointPrediction(torch.zeros(1, 40, 3, 1))
    with pytest.raises(InputError, match="`simultaneous` needs rows whose steps are all known"):
        ConformalIntervals(simultaneous=True).fit_predictions(steps, torch.full((40, 3, 1), torch.nan))
    for use in (
        lambda c: c.intervals(PREDICTION),
        lambda c: c.margin,
        lambda c: c.change(PREDICTION),
        lambda c: c.stream(),
    ):
        with pytest.raises(NotFittedError, match="ConformalIntervals is not fitted"):
            use(ConformalIntervals())

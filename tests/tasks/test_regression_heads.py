"""The heads of a regression: their losses, shapes, units, missing targets and errors."""

import math
import warnings

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.losses import (
    beta_nll_loss,
    faithful_gaussian_loss,
    gaussian_crps_loss,
    gaussian_nll_loss,
    mixture_nll_loss,
    pinball_loss,
    point_loss,
    split_gaussian,
    split_log_gaussian,
    split_mixture,
    split_quantiles,
    split_student_t,
    student_t_nll_loss,
)
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    MixtureDensityPrediction,
    PointPrediction,
    QuantilePrediction,
    StudentTMixturePrediction,
)
from lightning_uq.tasks import (
    CategoricalRegression,
    EvidentialRegression,
    OutputShapeError,
    Regression,
    RegressionTask,
    describe,
)

NAN = math.nan


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


HEADS = {
    "mean": PointPrediction,
    "mean_variance": GaussianMixturePrediction,
    "mean_log_variance": GaussianMixturePrediction,
    "quantiles": QuantilePrediction,
    "student_t": StudentTMixturePrediction,
    "mixture": MixtureDensityPrediction,
}
TASKS = [
    *(Regression(head=head, loss=loss) for head, losses in {
        "mean": ("mse", "l1", "huber"),
        "mean_variance": ("gaussian_nll", "beta_nll", "faithful", "crps"),
        "mean_log_variance": (None, "beta_nll", "faithful", "crps"),
        "quantiles": (None, "pinball"),
        "student_t": (None,),
        "mixture": (None,),
    }.items() for loss in losses),
    Regression(head="quantiles", levels=(0.05, 0.95)),
    Regression(head="mixture", components=2),
]  # fmt: skip
EVERY = [*TASKS, EvidentialRegression(), EvidentialRegression("meinert"), CategoricalRegression((-1.0, 0.0, 1.0))]
each_task = pytest.mark.parametrize("task", TASKS, ids=describe)
each = pytest.mark.parametrize("task", EVERY, ids=describe)


def outputs(task: RegressionTask, *shape, z=3, seed=0):
    """Raw outputs [Z, B, ..., k D] for targets of a shape [B, ..., D]."""
    return randn(z, *shape[:-1], task.outputs_per_target * shape[-1], seed=seed)


@pytest.mark.parametrize(("head", "kind"), HEADS.items())
def test_each_head_has_its_prediction(head, kind):
    task = Regression(head=head)
    prediction = task.predict(outputs(task, 5, 2))
    assert type(prediction) is kind
    assert prediction.target_shape == (5, 2)
    assert task.score_names == kind.score_names
    assert prediction.score(task.ood_score).shape == (5,)


def test_the_losses_are_those_of_the_losses_room():
    y = randn(5, 2, seed=9)
    expected = {
        Regression(head="mean", loss="l1"): lambda o: point_loss(o, y, "l1"),
        Regression(): lambda o: gaussian_nll_loss(*split_gaussian(o), y),
        Regression(loss="beta_nll", beta=0.3): lambda o: beta_nll_loss(*split_gaussian(o), y, 0.3),
        Regression(loss="faithful"): lambda o: faithful_gaussian_loss(*split_gaussian(o), y),
        Regression(loss="crps"): lambda o: gaussian_crps_loss(*split_gaussian(o), y),
        Regression(head="mean_log_variance"): lambda o: gaussian_nll_loss(*split_log_gaussian(o), y),
        Regression(head="quantiles", levels=(0.2, 0.9)): lambda o: pinball_loss(split_quantiles(o, 2), y, (0.2, 0.9)),
        Regression(head="student_t"): lambda o: student_t_nll_loss(*split_student_t(o), y),
        Regression(head="mixture", components=3): lambda o: mixture_nll_loss(*split_mixture(o, 3), y),
    }
    for task, loss in expected.items():
        output = outputs(task, 5, 2)[0]
        sums, counts = task.sample_losses(output, y)
        torch.testing.assert_close(sums.sum() / counts.sum(), loss(output), msg=describe(task))
        assert counts.tolist() == [2] * 5


@each
def test_a_horizon_is_as_many_rows(task):
    output, y = outputs(task, 4, 3, 2), randn(4, 3, 2, seed=5)
    task.check_output(output)
    task.check_target(y, output)
    sums, counts = task.sample_losses(output[0], y)
    rows, _ = task.sample_losses(output[0].flatten(0, 1), y.flatten(0, 1))
    torch.testing.assert_close(sums, rows.reshape(4, 3).sum(1))
    assert counts.tolist() == [6] * 4
    prediction = task.predict(output)
    assert prediction.target_shape == (4, 3, 2)
    for metric in task.metrics("test").values():
        metric.update(*task.rows(prediction, y))
        assert metric.compute().isfinite()


@each
@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 1)])
def test_a_target_may_lack_its_last_axis(task, shape):
    output, y = outputs(task, *shape), randn(*shape, seed=5)
    task.check_target(y.squeeze(-1), output)
    found, expected = task.sample_losses(output[0], y.squeeze(-1)), task.sample_losses(output[0], y)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    prediction, rows = task.rows(task.predict(output), y.squeeze(-1))
    assert torch.equal(rows, y)


def test_one_number_per_input_may_lack_its_axis():
    task, output, y = Regression(head="mean"), randn(3, 5), randn(5, seed=1)
    task.check_output(output)
    for target in (y, y.unsqueeze(1)):
        task.check_target(target, output)
        sums, counts = task.sample_losses(output[0], target)
        torch.testing.assert_close(sums, (output[0] - y).square())
        assert counts.tolist() == [1] * 5
    assert task.predict(output).mean.shape == (5, 1)
    with pytest.raises(InputError, match=r"must have shape \[5, 1\], .* but they have \[5, 2\]"):
        task.check_target(randn(5, 2), output)


# ---------------------------------------------------------------------- missing targets


@each
def test_missing_targets_count_nowhere(task):
    """Their rows and columns change neither the loss, nor its gradient, nor a metric."""
    output, y = outputs(task, 6, 2), randn(6, 2, seed=5)
    y[1, 0], y[3, 1], y[4:] = NAN, NAN, NAN
    task.check_target(y, output)
    first = output[0].clone().requires_grad_()
    sums, counts = task.sample_losses(first, y)
    assert counts.tolist() == [2, 1, 2, 1, 0, 0]
    assert sums[4:].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(sums.sum(), first)
    assert gradient.isfinite().all()
    assert (gradient[4:] == 0).all()
    other, _ = task.sample_losses(output[0], torch.where(y.isnan(), 0.7, y))
    torch.testing.assert_close(sums[[0, 2]], other[[0, 2]])
    prediction = task.predict(output)
    for name, metric in task.metrics("test").items():
        metric.update(*task.rows(prediction, y))
        known = task.metrics("test")[name]
        known.update(*task.rows(prediction[:4], y[:4]))
        torch.testing.assert_close(metric.compute(), known.compute())
        assert metric.compute().isfinite()


def test_a_batch_without_targets_warns():
    task, output = Regression(), randn(1, 5, 4)
    with pytest.warns(UserWarning, match="All targets of a batch are NaN, which marks them as missing"):
        task.check_target(torch.full((5, 2), NAN), output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.check_target(torch.full((5, 2), NAN), output, values=False)
        task.check_target(torch.zeros(0, 2), output[:, :0])
    with pytest.raises(InputError, match="finite, or NaN if they are missing, but they hold infinity"):
        task.check_target(torch.full((5, 2), math.inf), output)


# ---------------------------------------------------------------------- units


@each_task
@pytest.mark.parametrize("scale", [(10.0, 3.0), ((10.0, -5.0), (3.0, 0.5))])
def test_predictions_are_in_the_user_s_units(task, scale):
    """The task standardises targets for the loss, and takes its predictions back: y -> mean + std y."""
    fields = {"head": task.head, "loss": task.loss, "levels": task.levels, "components": task.components}
    scaled = Regression(**fields, target_scale=scale)
    mean, std = (torch.tensor(part).double() for part in scale)
    output, y = outputs(task, 5, 2), randn(5, 2, seed=3)
    units = mean + std * y
    found, expected = scaled.sample_losses(output[0], units), task.sample_losses(output[0], y)
    torch.testing.assert_close(found, expected)
    ours, plain = scaled.predict(output), task.predict(output)
    torch.testing.assert_close(ours.epistemic_variance, std.square() * plain.epistemic_variance)
    if isinstance(plain, PointPrediction):
        torch.testing.assert_close(ours.mean, mean + std * plain.mean)
        return
    for one, other in zip(ours.interval(0.8), plain.interval(0.8), strict=True):
        torch.testing.assert_close(one, mean + std * other, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.covered(units, 0.8), plain.covered(y, 0.8))
    if not isinstance(plain, QuantilePrediction):
        torch.testing.assert_close(ours.mean, mean + std * plain.mean)
        torch.testing.assert_close(ours.variance, std.square() * plain.variance)
        torch.testing.assert_close(ours.crps(units), (std * plain.crps(y)).double(), rtol=1e-5, atol=1e-6)
        jacobian = std.log().expand(2).sum()
        torch.testing.assert_close(ours.log_prob(units), plain.log_prob(y) - jacobian)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (3.0, r"must be \(mean, std\)"),
        ((1.0, 2.0, 3.0), r"must be \(mean, std\)"),
        (("a", 1.0), r"must be \(mean, std\)"),
        ((0.0, 0.0), "std in `target_scale` must be positive and finite"),
        ((0.0, (1.0, -1.0)), "std in `target_scale` must be positive and finite"),
        ((NAN, 1.0), "mean in `target_scale` must be finite"),
    ],
)
def test_bad_units(scale, message):
    with pytest.raises(InputError, match=message):
        Regression(target_scale=scale)


def test_units_are_plain_numbers_and_fit_the_targets():
    task = Regression(target_scale=(torch.tensor([1.0, 2.0]), [3, 4]))
    assert task == Regression(target_scale=((1.0, 2.0), (3.0, 4.0)))
    assert hash(task) == hash(Regression(target_scale=((1.0, 2.0), (3.0, 4.0))))
    task.check_output(randn(1, 5, 4))
    with pytest.raises(InputError, match="`target_scale` must hold single numbers, or 3 of each"):
        task.check_output(randn(1, 5, 6))


# ---------------------------------------------------------------------- quantiles


def test_quantiles_that_cross_are_sorted_in_predictions_alone():
    task = Regression(head="quantiles")
    raw = torch.tensor([[[2.0, 1.0, 3.0]]])
    assert task.predict(raw).member_quantiles.tolist() == [[[[1.0, 2.0, 3.0]]]]
    sums, _ = task.sample_losses(raw[0], torch.tensor([[0.0]]))
    assert sums.item() == pytest.approx((0.9 * 2 + 0.5 * 1 + 0.1 * 3) / 3)


def test_metrics_of_quantiles_are_those_that_their_levels_allow():
    assert list(Regression(head="quantiles").metrics("test")) == [
        "pinball",
        "mae",
        "coverage_80",
        "interval_score_80",
    ]
    assert list(Regression(head="quantiles", levels=(0.05, 0.9)).metrics("test"))[2:] == [
        "coverage_80",
        "interval_score_80",
    ]
    assert list(Regression(head="quantiles", levels=(0.6, 0.9)).metrics("test")) == ["pinball"]
    assert list(Regression(head="quantiles", levels=(0.0125, 0.9875)).metrics("test"))[2] == "coverage_97_5"
    assert list(Regression(head="mean").metrics("test")) == ["rmse", "mae"]


# ---------------------------------------------------------------------- errors


def test_losses_belong_to_heads():
    with pytest.raises(InputError, match="`loss` must be one of 'mse', 'l1', 'huber', but it is 'pinball'"):
        Regression(head="mean", loss="pinball")
    for fields, name in (({"levels": (0.5,)}, "levels"), ({"components": 2}, "components"), ({"beta": 0.1}, "beta")):
        with pytest.raises(InputError, match=f"`{name}` belongs to"):
            Regression(**fields)
    assert [task.has_likelihood for task in (Regression(), Regression(loss="beta_nll"), Regression(head="mean"))] == [
        True,
        False,
        False,
    ]


def test_a_network_of_means_under_the_default_head_is_told_its_task():
    for shape in ((1, 5, 3), (1, 5, 1), (1, 5)):
        with pytest.raises(
            OutputShapeError, match=r"If it returns only the D means, pass `task=Regression\(head='mean'\)`"
        ):
            Regression().check_output(torch.zeros(shape))
    with pytest.raises(InputError, match=r"\[5, 1\], .* \[5, 2\]; .* pass `task=Regression\(head='mean'\)`\."):
        Regression().check_target(torch.zeros(5, 2), torch.zeros(1, 5, 2))
    with pytest.raises(InputError, match=r"torch.int64. If they are class labels, pass `task=Classification\(\)`"):
        Regression(head="mean").check_target(torch.zeros(5, 2).long(), torch.zeros(1, 5, 2))


@each_task
def test_an_empty_batch(task):
    output = outputs(task, 0, 2)
    task.check_output(output)
    task.check_target(torch.zeros(0, 2), output)
    sums, counts = task.sample_losses(output[0], torch.zeros(0, 2))
    assert sums.shape == counts.shape == (0,)
    assert len(task.predict(output)) == 0


@each_task
def test_a_row_alone_is_the_row_in_a_batch(task):
    output = outputs(task, 5, 2)
    whole, alone = task.predict(output), task.predict(output[:, 2:3])
    for name, tensor in alone.to_dict(0.8).items():
        torch.testing.assert_close(whole.to_dict(0.8)[name][2:3], tensor)


@each_task
def test_outputs_of_half_precision_are_read_as_float32(task):
    output = outputs(task, 5, 2).bfloat16()
    expected = task.predict(output.float())
    for name, tensor in task.predict(output).to_dict(0.8).items():
        assert tensor.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(tensor, expected.to_dict(0.8)[name])

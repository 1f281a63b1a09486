"""Numbers at each position of a map: a regression whose rows are the positions."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, EpinetModule
from lightning_uq.callbacks import FitGMM, FitKNN, OODDetection, PredictionWriter, read_predictions
from lightning_uq.errors import InputError
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.tasks import OutputShapeError, PixelRegression, Regression

HEADS = {
    "mean": {},
    "mean_variance": {},
    "mean_log_variance": {"loss": "beta_nll"},
    "quantiles": {"levels": (0.1, 0.5, 0.9)},
    "student_t": {},
    "mixture": {"components": 2},
}
MAPS = [(5,), (3, 4), (2, 3, 2)]


def tasks(head, **kwargs):
    return PixelRegression(head=head, **HEADS[head], **kwargs), Regression(head=head, **HEADS[head], **kwargs)


def problem(task, axes, dims=2, rows=4, indices=3, seed=0):
    """Outputs [Z, B, k D, *P] and targets [B, D, *P], some of which are missing."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(indices, rows, task.outputs_per_target * dims, *axes, generator=generator)
    target = torch.randn(rows, dims, *axes, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = math.nan
    return outputs, target


@pytest.mark.parametrize("scale", [None, (1.0, 2.0), ((0.0, 1.0), (1.0, 3.0))])
@pytest.mark.parametrize("axes", MAPS)
@pytest.mark.parametrize("head", HEADS)
def test_positions_are_rows_of_a_regression(head, axes, scale):
    maps, rows = tasks(head, target_scale=scale)
    outputs, target = problem(maps, axes)
    maps.check_output(outputs)
    maps.check_target(target, outputs)
    flat_outputs = outputs.movedim(2, -1).reshape(3, -1, outputs.shape[2])
    flat_target = target.movedim(1, -1).reshape(-1, 2)

    sums, counts = maps.sample_losses(outputs[0], target)
    assert sums.shape == counts.shape == (4,)
    row_sums, row_counts = rows.sample_losses(flat_outputs[0], flat_target)
    torch.testing.assert_close(sums.sum(), row_sums.sum())
    assert counts.sum() == row_counts.sum() == (~target.isnan()).sum()

    prediction, of_rows = maps.predict(outputs), rows.predict(flat_outputs)
    assert prediction.map_shape == axes
    assert prediction.point.shape == target.shape
    as_rows, row_target = maps.rows(prediction, target)
    torch.testing.assert_close(row_target, flat_target, equal_nan=True)
    assert type(as_rows) is type(of_rows)
    for (name, found, _), (_, expected, _) in zip(as_rows._present(), of_rows._present(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    for name in prediction.score_names:
        score = prediction.score(name)
        assert score.shape == (4, *axes)
        torch.testing.assert_close(score.reshape(-1), of_rows.score(name))
    for name, value in maps.metrics("test").items():
        other = rows.metrics("test")[name]
        value.update(as_rows, row_target)
        other.update(of_rows, flat_target)
        torch.testing.assert_close(value.compute(), other.compute(), msg=name)


def test_maps_are_sliced_moved_and_pooled_as_rows_are():
    task = PixelRegression()
    outputs, target = problem(task, (3, 4))
    whole = task.predict(outputs)
    parts = type(whole).cat([whole[:1], whole[1:]]).to(torch.float64).to(torch.float32)
    assert parts.map_shape == (3, 4)
    assert torch.equal(parts.mean, whole.mean)
    pooled = whole.pool()
    assert pooled.map_shape == (3, 4)
    torch.testing.assert_close(pooled.score("epistemic_variance"), whole.score("epistemic_variance"))
    dense = whole.replace(log_density=torch.arange(4.0)).as_rows()
    assert dense.log_density.tolist() == [float(b) for b in range(4) for _ in range(12)]
    lower, upper = whole.interval(0.9)
    assert lower.shape == upper.shape == target.shape
    one = task.predict(outputs[:, :, :2])
    torch.testing.assert_close(one.crps(target[:, 0].nan_to_num()), one.crps(target[:, :1].nan_to_num()))
    with pytest.raises(InputError, match="may differ only in axis 1 between `predictions`"):
        type(whole).cat([whole, task.predict(problem(task, (4, 4))[0])])


@pytest.mark.parametrize("head", HEADS)
def test_one_channel_may_be_missing_from_targets(head):
    task, _ = tasks(head)
    outputs, target = problem(task, (3, 3), dims=1)
    task.check_target(target[:, 0], outputs)
    with_axis, without = (task.sample_losses(outputs[0], y) for y in (target, target[:, 0]))
    assert torch.equal(with_axis[0], without[0])
    assert torch.equal(with_axis[1], without[1])
    prediction = task.predict(outputs)
    assert all(
        torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(task.rows(prediction, target)[1:], task.rows(prediction, target[:, 0])[1:], strict=True)
    )


def test_what_does_not_fit_is_named():
    task = PixelRegression()
    outputs, target = problem(task, (3, 4))
    with pytest.raises(
        OutputShapeError, match=r"maps \[B, 2 D, ...\], the means .* \[4, 6\]. Pass `task=Regression\(\)`"
    ):
        task.check_output(torch.zeros(1, 4, 6))
    with pytest.raises(
        OutputShapeError, match=r"returned shape \[4, 3, 5, 5\]. .*`task=PixelRegression\(head='mean'\)`"
    ):
        task.check_output(torch.zeros(1, 4, 3, 5, 5))
    with pytest.raises(
        InputError, match=r"must have shape \[4, 2, 3, 4\], because .* \[4, 4, 3, 4\], .* have \[4, 3, 4\]"
    ):
        task.check_target(target[:, 0], outputs)
    with pytest.raises(InputError, match=r"must have shape \[4, 1, 3, 4\] or \[4, 3, 4\], .* have \[4, 2, 3, 4\]"):
        task.check_target(target, outputs[:, :, :2])
    with pytest.raises(InputError, match="must be floating-point numbers, but they are torch.int64"):
        task.check_target(target.nan_to_num().long(), outputs)
    with pytest.raises(InputError, match="must hold single numbers, or 2 of each"):
        PixelRegression(target_scale=((0.0,) * 3, (1.0,) * 3)).check_output(outputs)


# ---------------------------------------------------------------------- under a Trainer


def depth(num=10, seed=0):
    """Blurred noise, and a depth that follows it, missing at the border."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 1, 6, 5, generator=generator)
    y = 2 * x[:, 0] + 10 + 0.1 * torch.randn(num, 6, 5, generator=generator)
    y[:, 0] = math.nan
    return x, y


def network(out=2):
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, out, 1))


SCALED = {"target_scale": (10.0, 2.0)}
MODULES = {
    "deterministic": lambda: DeterministicModule(network, task=PixelRegression(**SCALED)),
    "quantiles": lambda: DeterministicModule(network(3), task=PixelRegression(head="quantiles", **SCALED)),
    "means": lambda: EnsembleModule(lambda: network(1), num_members=2, seed=0, task=PixelRegression("mean", **SCALED)),
    "dropout": lambda: DropoutModule(network(), task=PixelRegression(**SCALED), num_eval_samples=3),
    "pooled": lambda: DropoutModule(
        network(), task=PixelRegression(**SCALED), num_eval_samples=3, return_members=False
    ),
    "epinet": lambda: EpinetModule(
        network(), head=EpinetHead(hidden_sizes=(4,)), task=PixelRegression(**SCALED), num_eval_samples=3
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_depth_is_trained_tested_and_predicted(make_trainer, tmp_path, name):
    x, y = depth()
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    module, writer = MODULES[name](), PredictionWriter(tmp_path / "maps", "npz", interval=None)
    trainer = make_trainer(callbacks=[writer], max_epochs=2)
    trainer.fit(module, data, data)
    (tested,) = trainer.test(module, data, verbose=False)
    with torch.no_grad():
        prediction = module.predict(x)
    known = ~y.isnan()
    if "test_rmse" in tested:
        error = (prediction.mean.detach()[:, 0] - y)[known].double()
        assert tested["test_rmse"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
    assert all(math.isfinite(value) for value in tested.values())
    trainer.predict(module, data, return_predictions=False)
    arrays = read_predictions(tmp_path / "maps")
    torch.testing.assert_close(
        torch.from_numpy(next(iter(v for n, v in arrays.items() if n != "index"))),
        next(iter(prediction.to_dict().values())),
        rtol=1e-4,
        atol=1e-4,
    )


def test_scores_of_depth_by_image_and_by_pixel(make_trainer):
    x, y = depth()
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    far = {"far": DataLoader(30 * x[:5], batch_size=2)}
    module = EnsembleModule(network, num_members=2, seed=0, task=PixelRegression(**SCALED))
    gmm, knn = FitGMM(pool="positions", regularization=1e-3), FitKNN(k=2, pool="positions")
    callbacks = [knn, gmm, OODDetection(far), OODDetection(far, "epistemic_variance", level="pixel")]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1)
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    names = (
        "epistemic_variance/mean",
        "epistemic_variance/max",
        "epistemic_variance/pixel",
        "density/mean",
        "knn/max",
    )
    for name in names:
        assert tested[f"ood_auroc/far/{name}"] > 0.6
    assert module.predict(x).log_density.shape == (10, 6, 5)


def test_the_mean_over_pixels_is_not_the_mean_over_images(make_trainer):
    """Images with many missing pixels weigh less."""
    task = PixelRegression("mean")
    module = DeterministicModule(nn.Identity(), task=task)
    x, y = torch.zeros(2, 1, 2, 2), torch.ones(2, 2, 2)
    y[0, 0], y[0, 1, 0], y[1] = math.nan, math.nan, 3.0
    expected = (1.0 + 4 * 9.0) / 5
    assert float(module.index_losses(x[None], y)[0].detach()) == pytest.approx(expected)

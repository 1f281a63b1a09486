"""VarianceScaling and QuantileRecalibration: what the contract asks of callbacks that calibrate predictions of numbers."""

import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.conformal_intervals import ConformalIntervals
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.prediction_files import read_predictions
from lightning_uq.callbacks.prediction_writer import PredictionWriter
from lightning_uq.callbacks.quantile_recalibration import QuantileRecalibration
from lightning_uq.callbacks.variance_scaling import VarianceScaling
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.quantile_recalibration import fit_recalibration
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.evidential_regression import EvidentialRegressionModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import (
    GaussianMixturePrediction,
    NumberPrediction,
    PointPrediction,
    PooledRegressionPrediction,
    QuantilePrediction,
    RecalibratedPrediction,
)
from lightning_uq.tasks import PixelRegression, Regression

# A network that was hardly trained may be wrong by a large factor.
pytestmark = pytest.mark.filterwarnings("ignore:.*lie where predicted probabilities round to 0 or 1")

GENERATOR = torch.Generator().manual_seed(1)
ADAM = Factory("torch.optim.Adam", {"lr": 0.01})
BOTH = [VarianceScaling, QuantileRecalibration]
TENSORS = {VarianceScaling: "variance_scale", QuantileRecalibration: "recalibration"}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def loader(num: int, *shape: int, missing: bool = False) -> DataLoader:
    """Inputs with targets of a shape, of which some may be missing."""
    shape = shape or (2,)
    x = noise(num, 4)
    scale = torch.tensor([1.0, 3.0]) if shape[-1] == 2 else 1.0
    y = x[:, :1].reshape(-1, *[1] * len(shape)) * scale + 0.5 * noise(num, *shape)
    if missing:
        y = torch.where(torch.rand(y.shape, generator=GENERATOR) < 0.2, math.nan, y)
    return DataLoader(TensorDataset(x, y), batch_size=8)


TRAIN, VAL, TEST = loader(40), loader(45), loader(31)


class UsersRegressor(LightningModule):
    """Two means, by somebody who has never heard of variances."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def network(out: int) -> Factory:
    return Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": out, "hidden_sizes": [8]})


def of_head(head: str, outputs: int, **kwargs) -> DeterministicModule:
    return DeterministicModule(network(outputs), task=Regression(head=head, **kwargs), optimizer=ADAM)


def gaussian() -> DeterministicModule:
    return of_head("mean_variance", 4)


class Maps(nn.Module):
    """A mean and a raw variance of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 2, 2))


def horizon_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 4)))


@torch.no_grad()
def predicted(module: LightningModule, x: torch.Tensor) -> NumberPrediction:
    return module.predict(x)


@pytest.mark.parametrize("make", BOTH)
def test_trainer_calibrates_a_gaussian(make_trainer, tmp_path, make):
    callback, module = make(), gaussian()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(max_epochs=2, callbacks=[callback, best], enable_checkpointing=True)
    trainer.fit(module, TRAIN, VAL)
    (tested,) = trainer.test(module, TEST, ckpt_path="best", verbose=False)
    prediction = NumberPrediction.cat(trainer.predict(module, TEST, ckpt_path="best"))

    callback.handle.remove()
    x, y = VAL.dataset.tensors
    raw = predicted(module, x)
    if make is VarianceScaling:
        expected = ((y - raw.mean).double().square() / raw.variance.double()).mean(0)
    else:
        expected = fit_recalibration(raw.to(torch.float64).cdf(y.double()))
    torch.testing.assert_close(callback.state[TENSORS[make]], expected, rtol=1e-5, atol=1e-7)
    x, y = TEST.dataset.tensors
    raw = predicted(module, x)
    assert isinstance(prediction, GaussianMixturePrediction)
    for name, one in (("", raw), ("_calibrated", prediction)):
        assert tested[f"uq/test_nll{name}"] == pytest.approx(-float(one.log_prob(y).mean()), rel=1e-5)
        assert tested[f"uq/test_crps{name}"] == pytest.approx(float(one.crps(y).mean()), rel=1e-5)
        assert tested[f"uq/test_coverage_95{name}"] == pytest.approx(float(one.covered(y, 0.95).float().mean()))
    assert tested["uq/test_nll"] > tested["uq/test_nll_calibrated"]
    # The module's own metrics are those of the predictions that it gives.
    assert tested["test_nll"] == pytest.approx(tested["uq/test_nll_calibrated"])

    other = make()
    make_trainer(callbacks=[other]).test(module, TEST, ckpt_path=callback.uq_ckpt_path, verbose=False)
    assert torch.equal(other.state[TENSORS[make]], callback.state[TENSORS[make]])
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(NotFittedError, match="has no state that was fitted on the weights in memory"):
        make_trainer(callbacks=[other]).predict(module, TEST)


@pytest.mark.parametrize("make", BOTH)
def test_without_a_trainer(make):
    module = gaussian()
    callback = make().fit(module, VAL)
    x, y = TEST.dataset.tensors
    changed = predicted(module, x)
    callback.handle.remove()
    own_x, own_y = VAL.dataset.tensors
    again = make().fit_predictions(predicted(module, own_x), own_y)
    torch.testing.assert_close(again.state[TENSORS[make]], callback.state[TENSORS[make]], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again.change(predicted(module, x)).cdf(y), changed.cdf(y))


@pytest.mark.parametrize("make", BOTH)
def test_the_likelihood_of_the_fitted_rows_never_falls(make):
    for seed in range(4):
        torch.manual_seed(seed)
        prediction = GaussianMixturePrediction(torch.randn(1, 300, 1), 0.1 + torch.rand(1, 300, 1))
        y = 2 * torch.randn(300, 1)
        changed = make().fit_predictions(prediction, y).change(prediction)
        assert changed.log_prob(y).mean() >= prediction.log_prob(y).mean()


def many_members() -> EnsembleModule:
    return EnsembleModule(network(4), num_members=3, seed=0, task="regression", optimizer=ADAM, return_members=False)


MODULES = {
    "mean": lambda: of_head("mean", 2),
    "Gaussian": gaussian,
    "Student-t": lambda: of_head("student_t", 6),
    "mixture": lambda: of_head("mixture", 12, components=2),
    "quantiles": lambda: of_head("quantiles", 6),
    "evidential": lambda: EvidentialRegressionModule(network(8), optimizer=ADAM),
    "ensemble": lambda: EnsembleModule(network(4), num_members=3, seed=0, task="regression", optimizer=ADAM),
    "ensemble of means": lambda: EnsembleModule(
        network(2), num_members=3, seed=0, task=Regression(head="mean"), optimizer=ADAM
    ),
    "pooled": many_members,
    "horizon": lambda: DeterministicModule(horizon_network, task="regression", optimizer=ADAM),
    "maps": lambda: DeterministicModule(Maps, task=PixelRegression(), optimizer=ADAM),
}
SHAPES = {"horizon": (3, 2), "maps": (1, 2, 2)}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("make", [*BOTH, "both"])
def test_every_head_is_trained_tested_and_predicted(make_trainer, kind, make):
    callbacks = [one() for one in BOTH] if make == "both" else [make()]
    shape = SHAPES.get(kind, (2,))
    train, val, test = (loader(num, *shape, missing=True) for num in (40, 45, 31))
    module = MODULES[kind]()
    trainer = make_trainer(max_epochs=1, callbacks=callbacks)
    if make is QuantileRecalibration and "mean" in kind:
        with pytest.raises(InputError, match="Put VarianceScaling before it"):
            trainer.fit(module, train, val)
        return
    trainer.fit(module, train, val)
    fitted = set(trainer.callback_metrics)
    (tested,) = trainer.test(module, test, verbose=False)
    prediction = NumberPrediction.cat(trainer.predict(module, test))
    assert all(math.isfinite(value) for value in tested.values())
    score = "pinball" if kind == "quantiles" else "nll"
    for callback in callbacks:
        name = f"{type(callback).__name__}/" if make == "both" else ""
        assert f"uq/{name}test_{score}_calibrated" in tested or kind == "pooled"
        assert {f"uq/{name}{number}" for number in callback.fitted_numbers} <= fitted
    if make == "both" and "mean" not in kind:  # one calibrates what the other gives
        before, after = (
            tested[f"uq/QuantileRecalibration/test_{score}"],
            tested[f"uq/VarianceScaling/test_{score}_calibrated"],
        )
        assert before == pytest.approx(after)
    for callback in callbacks:
        found = prediction.calibrations[TENSORS[type(callback)]]
        torch.testing.assert_close(found.double(), callback.state[TENSORS[type(callback)]], rtol=1e-6, atol=1e-7)
    read = prediction.quantile(0.3) if kind != "pooled" else prediction.variance
    assert read.shape == test.dataset.tensors[1].shape
    assert bool(read.isfinite().all())


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(make_trainer, make, precision):
    callback, module = make(), gaussian()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    data = [
        DataLoader(TensorDataset(*(t.to(dtype) for t in one.dataset.tensors)), batch_size=8) for one in (TRAIN, VAL)
    ]
    trainer = make_trainer(max_epochs=1, callbacks=[callback], precision=precision)
    trainer.fit(module, *data)
    prediction = NumberPrediction.cat(trainer.predict(module, data[1]))
    y = data[1].dataset.tensors[1]
    assert callback.state[TENSORS[make]].dtype == torch.float64
    # Whatever the precision, the fitted rows have the variance, or the frequencies, that they were fitted to.
    if make is VarianceScaling:
        ratio = ((y - prediction.mean).double().square() / prediction.variance.double()).mean(0)
        torch.testing.assert_close(ratio, torch.ones(2, dtype=torch.float64), rtol=0.05, atol=0)
    else:
        below = (y <= prediction.quantile(0.5)).double().mean(0)
        torch.testing.assert_close(below, torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.06)


# ---------------------------------------------------------------------- modules that are not ours, and the other callbacks


def test_an_unmodified_module_gets_intervals_and_files(make_trainer, tmp_path):
    task = Regression(head="mean")
    ours = [VarianceScaling(attach=True, task=task), QuantileRecalibration(attach=True, task=task)]
    conformal = ConformalIntervals(attach=True, task=task, method="normalized")
    writer = PredictionWriter(tmp_path / "predictions", "csv", interval=0.9)
    module = UsersRegressor()
    trainer = make_trainer(max_epochs=2, callbacks=[*ours, conformal, writer])
    trainer.fit(module, TRAIN, VAL)
    prediction = NumberPrediction.cat(trainer.predict(module, TEST))
    assert isinstance(prediction, RecalibratedPrediction)
    x, y = TEST.dataset.tensors
    with torch.no_grad():
        mean = module(x)
    torch.testing.assert_close(prediction.raw.mean, mean)
    with torch.no_grad():
        errors = (VAL.dataset.tensors[1] - module(VAL.dataset.tensors[0])).double()
    torch.testing.assert_close(ours[0].variance_scale, errors.square().mean(0), rtol=1e-5, atol=0)
    assert bool((prediction.conformal_lower < prediction.conformal_upper).all())
    table = read_predictions(tmp_path / "predictions")
    assert {"mean_0", "variance_1", "lower_0", "upper_1", "conformal_lower_0"} <= set(table)
    assert prediction.covered(y, 0.9).shape == y.shape


def test_outputs_of_an_unmodified_module_stay_without_attach(make_trainer):
    callback, module = VarianceScaling(), UsersRegressor()
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, TRAIN, VAL)
    (tested,) = trainer.test(module, TEST, verbose=False)
    assert all(isinstance(one, torch.Tensor) for one in trainer.predict(module, TEST))
    # Means have no likelihood before the scaling.
    assert {name for name in tested if name.startswith("uq/")} == {
        "uq/test_nll_calibrated",
        "uq/test_crps_calibrated",
        "uq/test_coverage_95_calibrated",
    }


def test_what_is_fitted_behind_a_calibration_refuses_other_predictions():
    prediction = GaussianMixturePrediction(noise(1, 60, 2), torch.ones(1, 60, 2))
    y = 3 * noise(60, 2)
    scaling = VarianceScaling().fit_predictions(prediction, y)
    scaled = scaling.change(prediction)
    recalibration = QuantileRecalibration().fit_predictions(scaled, y)
    recalibrated = recalibration.change(scaled)
    conformal = ConformalIntervals().fit_predictions(recalibrated, y)
    conformal.intervals(recalibrated)
    with pytest.raises(
        InputError, match="fitted to predictions with a variance scale, but this one has no variance scale"
    ):
        recalibration.change(prediction)
    with pytest.raises(InputError, match="with a recalibration, but this one has no recalibration"):
        conformal.intervals(scaled)
    with pytest.raises(InputError, match="with no variance scale, but this one has a variance scale"):
        scaling.change(scaled)


def test_a_chain_is_fitted_again_in_its_order(make_trainer):
    """The first one must not read predictions that the second one changes, with a map of the weights before."""
    chain = [VarianceScaling(dataloader=VAL), QuantileRecalibration(dataloader=VAL)]
    module = gaussian()
    make_trainer(max_epochs=1, callbacks=chain).fit(module, TRAIN, VAL)
    with torch.no_grad():
        module.network.network[-1].bias.add_(0.5)
    with pytest.warns(UserWarning, match="it was fitted again"):
        make_trainer(callbacks=chain).test(module, TEST, verbose=False)
    module.prediction_transforms.clear()
    alone = [make().fit(module, VAL) for make in BOTH]
    for again, expected in zip(chain, alone, strict=True):
        name = TENSORS[type(again)]
        torch.testing.assert_close(again.state[name], expected.state[name])


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_second_one_takes_the_place_of_the_first(make_trainer, make, is_ours):
    task = {} if is_ours else {"task": Regression(head="mean_variance")}
    one, two = (make(name=name, attach=True, **task) for name in ("one", "two"))
    module = gaussian() if is_ours else UsersRegressor()
    data = TRAIN, VAL
    if not is_ours:  # a mean and a variance of one target
        data = [DataLoader(TensorDataset(x, y[:, :1]), batch_size=8) for x, y in (d.dataset.tensors for d in data)]
        module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()
        module.validation_step = lambda batch, batch_idx: None
    make_trainer(max_epochs=1, callbacks=[one, two]).fit(module, *data)
    torch.testing.assert_close(two.state[TENSORS[make]], one.state[TENSORS[make]])
    assert not two.carried().has_calibration


def test_a_density_is_carried_on(make_trainer):
    module = gaussian()
    callbacks = [FitGMM(), VarianceScaling(), QuantileRecalibration()]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks)
    trainer.fit(module, TRAIN, VAL)
    prediction = NumberPrediction.cat(trainer.predict(module, TEST))
    assert prediction.log_density.shape == (31,)
    assert {"variance_scale", "recalibration"} <= set(prediction.calibrations)


def test_pooled_members_carry_scaled_moments():
    module = many_members()
    raw = predicted(module, TEST.dataset.tensors[0])
    assert isinstance(raw, PooledRegressionPrediction)
    scaling = VarianceScaling().fit(module, VAL)
    prediction = predicted(module, TEST.dataset.tensors[0])
    torch.testing.assert_close(prediction.epistemic_variance, raw.epistemic_variance * scaling.variance_scale.float())
    torch.testing.assert_close(prediction.variance, raw.variance * scaling.variance_scale.float())


TWO_RANKS = """
import json, sys, warnings
import torch
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.callbacks.variance_scaling import VarianceScaling
from lightning_uq.callbacks.quantile_recalibration import QuantileRecalibration
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import Regression
torch.manual_seed(0)
x = torch.randn(61, 4).double()  # two ranks have other batches than one, so everything is in float64
y = torch.where(torch.rand(61, 2) < 0.2, torch.nan, 3 * torch.randn(61, 2)).double()
loader = DataLoader(TensorDataset(x, y), batch_size=4)
few = DataLoader(TensorDataset(x[:1], torch.ones(1, 2).double()), batch_size=4)  # the second rank has none
net = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 6, "hidden_sizes": [8]})
make = lambda: [VarianceScaling(weights="last"), QuantileRecalibration(weights="last"),
                VarianceScaling(weights="last", dataloader=few, name="few")]
def main():
    gaps, factors = [], []
    warnings.simplefilter("ignore")
    for i in range(3):
        callback = make()[i]
        module = EnsembleModule(net, num_members=2, seed=0, task=Regression(head="student_t"),
                                optimizer=Factory("torch.optim.SGD", {"lr": 0.001}))
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=1, precision="64-true",
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                          default_root_dir=".", callbacks=[callback])
        trainer.fit(module, loader, loader)
        (name,) = [n for n in callback.state if not n.startswith("carried")]
        mine, everyones = callback.state[name], [None, None]
        torch.distributed.all_gather_object(everyones, mine)
        own = module.prediction_transforms.clear() or make()[i].fit(module.double(), few if i == 2 else loader).state[name]
        gaps += [float((own - theirs).abs().max()) for theirs in everyones]
        factors.append(own.flatten().tolist())
    if trainer.is_global_zero:
        json.dump({"gaps": gaps, "factors": factors}, open(out, "w"))
if __name__ == "__main__":
    main()
"""


def test_two_ranks_give_what_one_gives(run_script):
    result = run_script(TWO_RANKS)
    assert len(result["gaps"]) == 6
    assert max(result["gaps"]) < 1e-6
    assert abs(result["factors"][0][0] - 1) > 0.05


# ---------------------------------------------------------------------- what is refused, and when


class Spy(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, *args):
        self.batches += 1


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("module", "loaders", "match"),
    [
        (
            lambda: DeterministicModule(nn.Linear(4, 3)),
            [DataLoader(TensorDataset(noise(8, 4), torch.arange(8) % 3), batch_size=8)] * 2,
            "calibrates predictions of numbers, which Classification.*Use TemperatureScaling for classes",
        ),
        (gaussian, [TRAIN], "needs exactly one validation loader"),
        (gaussian, [TRAIN, DataLoader(noise(8, 4), batch_size=8)], "must have targets, but a batch has none"),
        (gaussian, [TRAIN, loader(8, 3)], "must have shape"),
        (
            gaussian,
            [TRAIN, DataLoader(TensorDataset(noise(0, 4), noise(0, 2)), batch_size=8)],
            "fitting data are empty",
        ),
        (lambda: of_head("quantiles", 2, levels=(0.7,)), [TRAIN, VAL], "level 0.5 lies outside|at two levels or more"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_the_training(make_trainer, make, module, loaders, match):
    spy = Spy()
    trainer = make_trainer(max_epochs=1, callbacks=[make(), spy])
    with pytest.raises(InputError, match=match):
        trainer.fit(module(), *loaders)
    assert spy.batches == 0


@pytest.mark.parametrize("module", [gaussian, lambda: of_head("mean", 2)])
def test_a_wrong_order_is_refused_before_the_training(make_trainer, module):
    spy = Spy()
    trainer = make_trainer(max_epochs=1, callbacks=[QuantileRecalibration(), VarianceScaling(), spy])
    with pytest.raises(InputError, match="Put VarianceScaling before"):
        trainer.fit(module(), TRAIN, VAL)
    assert spy.batches == 0


@pytest.mark.parametrize("make", BOTH)
def test_rows_that_are_none_are_refused(make):
    prediction = GaussianMixturePrediction(torch.zeros(1, 4, 2), torch.ones(1, 4, 2))
    for kind, y, match in (
        (prediction, torch.full((4, 2), math.inf), "must be finite"),
        (prediction, torch.full((4, 2), math.nan), "must hold a known number for each target dimension"),
        (prediction, torch.zeros(4, 3), "`target` must have shape"),
        (prediction[:0], torch.zeros(0, 2), "must hold|at least one row"),
        (prediction.replace(member_mean=torch.full((1, 4, 2), math.nan)), torch.zeros(4, 2), "must be finite"),
        (
            GaussianMixturePrediction(torch.zeros(1, 4, 3, 3, 2), torch.ones(1, 4, 3, 3, 2)).as_maps(),
            torch.zeros(4, 2, 3, 3),
            r"Pass `prediction.as_rows\(\)`",
        ),
        (prediction.pool(), torch.zeros(4, 2), "needs the members, which were pooled"),
    ):
        with pytest.raises(InputError, match=match):
            make().fit_predictions(kind, y)
    with pytest.raises(NotFittedError, match="is not fitted"):
        make().change(prediction)
    y = noise(4, 2)
    with pytest.warns(UserWarning, match="changes nothing") if make is QuantileRecalibration else nullcontext():
        changed = make().fit_predictions(prediction, y).change(prediction)
    with pytest.raises(InputError, match="was already (scaled|recalibrated)"):
        make().fit_predictions(changed, y)


@pytest.mark.parametrize("make", BOTH)
def test_a_state_of_the_other_is_refused(make):
    prediction = GaussianMixturePrediction(torch.zeros(1, 40, 2), torch.ones(1, 40, 2))
    (other,) = [one for one in BOTH if one is not make]
    state = other(max_rows=7).fit_predictions(prediction, noise(40, 2)).state_dict()
    with pytest.raises(InputError):
        make(max_rows=7).load_state_dict(state)


def test_one_row_scales_and_few_rows_change_no_map():
    prediction = GaussianMixturePrediction(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    scaling = VarianceScaling().fit_predictions(prediction, torch.tensor([[3.0]]))
    assert scaling.variance_scale.tolist() == [9.0]
    with pytest.warns(
        UserWarning, match="QuantileRecalibration changes nothing: it needs 20 rows per target, but there are 1"
    ):
        recalibration = QuantileRecalibration().fit_predictions(prediction, torch.tensor([[3.0]]))
    y = torch.tensor([[0.4]])
    torch.testing.assert_close(recalibration.change(prediction).cdf(y), prediction.cdf(y))


def test_predictions_that_are_far_too_narrow_are_told():
    prediction = GaussianMixturePrediction(torch.zeros(1, 100, 1), torch.ones(1, 100, 1))
    with pytest.warns(
        UserWarning, match="lie where predicted probabilities round to 0 or 1. Put VarianceScaling before it"
    ):
        QuantileRecalibration().fit_predictions(prediction, 100 * noise(100, 1))


def test_a_sample_of_the_rows_is_read():
    module = gaussian()
    full, part = (VarianceScaling(max_rows=num).fit(module, VAL).variance_scale for num in (None, 20))
    assert not torch.equal(full, part)
    with pytest.raises(InputError, match="`max_rows` must be"):
        VarianceScaling(max_rows=0)


def test_calibrated_predictions_need_no_factor_and_no_map():
    n = 20_000
    mean, variance = noise(1, n, 1), noise(1, n, 1).exp()
    prediction = GaussianMixturePrediction(mean, variance)
    y = mean[0] + variance[0].sqrt() * noise(n, 1)
    assert VarianceScaling().fit_predictions(prediction, y).variance_scale.item() == pytest.approx(1, abs=0.03)
    assert QuantileRecalibration().fit_predictions(prediction, y).fitted_numbers["calibration_distance"] < 0.015


def test_a_map_needs_no_median():
    quantiles = QuantilePrediction(noise(1, 2000, 2, 2).sort(-1).values, torch.tensor([0.6, 0.9]))
    y = 2 * noise(2000, 2)
    changed = QuantileRecalibration().fit_predictions(quantiles, y).change(quantiles)
    for level in (0.6, 0.9):
        share = (y <= changed.quantile(level)).double().mean(0)
        torch.testing.assert_close(share, torch.full((2,), level).double(), atol=0.04, rtol=0)
    with pytest.raises(InputError, match="level 0.5 lies outside"):
        VarianceScaling().fit_predictions(quantiles, y)


def test_means_and_quantiles_keep_their_types():
    y = noise(50, 2)
    points = PointPrediction(noise(3, 50, 2))
    assert isinstance(VarianceScaling().fit_predictions(points, y).change(points), GaussianMixturePrediction)
    quantiles = QuantilePrediction(noise(2, 50, 2, 3).sort(-1).values, torch.tensor([0.1, 0.5, 0.9]))
    for make in BOTH:
        assert type(make().fit_predictions(quantiles, 2 * y).change(quantiles)) is QuantilePrediction

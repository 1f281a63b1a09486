"""Calibration under the Trainer: what is fitted, on which weights, and what of a prediction changes and what stays.

Nothing here assumes that the held-out likelihood improves: on few rows it need not.
"""

import math
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.isotonic import IsotonicScaling
from lightning_uq.callbacks.matrix_scaling import MatrixScaling
from lightning_uq.callbacks.ood import OODDetection
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.vector_scaling import VectorScaling
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.calibration import expected_calibration_error
from lightning_uq.functional.entropy import mutual_information
from lightning_uq.functional.isotonic import apply_isotonic
from lightning_uq.functional.matrix_scaling import apply_matrix_scaling
from lightning_uq.functional.temperature import fit_ensemble_temperature, fit_temperature
from lightning_uq.functional.vector_scaling import apply_vector_scaling, fit_vector_scaling
from lightning_uq.metrics import JointLogLoss
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.modules.evidential import EvidentialModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import CategoricalPrediction, DirichletPrediction

NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 3, "hidden_sizes": [8]})
SGD = Factory("torch.optim.SGD", {"lr": 1.0})
GENERATOR = torch.Generator().manual_seed(1)
X, VAL_X, TEST_X = (torch.randn(n, 4, generator=GENERATOR) for n in (40, 45, 31))


def labels(x: torch.Tensor) -> torch.Tensor:
    """Three classes, a fifth of them at random, so that a finite temperature exists."""
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    noisy = torch.rand(len(x), generator=GENERATOR) < 0.2
    return torch.where(noisy, torch.randint(3, (len(x),), generator=GENERATOR), y)


Y, VAL_Y, TEST_Y = labels(X), labels(VAL_X), labels(TEST_X)


def loader(x=X, y=Y, **kwargs) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=8, **kwargs)


def val_loader(**kwargs) -> DataLoader:
    return loader(VAL_X, VAL_Y, **kwargs)


def held_out() -> DataLoader:
    return loader(TEST_X, TEST_Y)


@pytest.fixture
def make_trainer(make_trainer):
    """A Trainer of enough epochs for a finite temperature, whatever the random numbers."""
    return lambda **kwargs: make_trainer(**{"max_epochs": 6, **kwargs})


class UsersModule(LightningModule):
    """As somebody writes it who has never heard of calibration."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.training_batches = 0

    def forward(self, x):
        return 3 * self.net(x)

    def training_step(self, batch, batch_idx):
        self.training_batches += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def deterministic() -> DeterministicModule:
    return DeterministicModule(NETWORK, optimizer=SGD)


def ensemble() -> EnsembleModule:
    return EnsembleModule(NETWORK, num_members=4, seed=0, optimizer=SGD)


def trained(module: LightningModule) -> LightningModule:
    """After a few steps, without a Trainer: better than chance, so that every member has a temperature."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X).flatten(0, 1), Y.repeat(len(module(X)))).backward()
        optimizer.step()
    return module


@torch.no_grad()
def logits_of(module: LightningModule, x: torch.Tensor) -> torch.Tensor:
    """Untouched logits [Z, B, C] of a module in evaluation mode."""
    modes = {m: m.training for m in module.modules()}
    logits = module.eval()(x)
    for child, mode in modes.items():
        child.training = mode
    return logits if logits.ndim == 3 else logits[None]


def assert_close(one, other, tol=1e-5):
    torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol)


# ---------------------------------------------------------------------- what is fitted


def test_the_temperature_is_the_one_of_the_validation_logits(make_trainer):
    module, scaling = UsersModule(), TemperatureScaling(weights="last")
    make_trainer(callbacks=[scaling]).fit(module, loader(shuffle=True), val_loader())
    expected = fit_temperature(logits_of(module, VAL_X)[0], VAL_Y)
    assert scaling.temperature.dtype == torch.float64
    assert_close(scaling.temperature, expected)
    assert abs(expected - 1) > 0.05  # else nothing was shown
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [UsersModule, ensemble])
def test_in_every_precision_the_fit_is_that_of_its_own_logits_in_float64(make_trainer, precision, make):
    module = make()
    scaling = TemperatureScaling(weights="last", scope="shared")
    trainer = make_trainer(callbacks=[scaling], precision=precision)
    trainer.fit(module, loader(), val_loader())
    parts = trainer.predict(module, val_loader())
    if isinstance(parts[0], CategoricalPrediction):
        logits = CategoricalPrediction.cat(parts).logits.double() * scaling.temperature
    else:
        logits = torch.cat(parts)[None].double()
    expected = fit_ensemble_temperature(logits, VAL_Y, "shared")
    assert scaling.temperature.dtype == torch.float64
    assert abs(scaling.temperature - expected) < 1e-3 * expected


@pytest.mark.parametrize("scope", ["pooled", "shared", "member"])
def test_without_a_trainer_it_is_the_same(scope):
    module, direct = trained(ensemble()), TemperatureScaling(scope=scope)
    scaling = TemperatureScaling(scope=scope).fit(module, val_loader(shuffle=True, drop_last=True))
    direct.fit_logits(logits_of(module, VAL_X), VAL_Y)
    assert_close(scaling.temperature, direct.temperature)
    assert scaling.temperature.shape == ((4,) if scope == "member" else ())


def test_best_and_last_weights(make_trainer, tmp_path):
    module = UsersModule()
    best = TemperatureScaling()
    last = TemperatureScaling(weights="last", name="last")
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss", mode="max")
    trainer = make_trainer(callbacks=[best, last, keep], max_epochs=6, enable_checkpointing=True)
    trainer.fit(module, loader(), val_loader())
    assert_close(last.temperature, fit_temperature(logits_of(module, VAL_X)[0], VAL_Y))
    loaded = UsersModule.load_from_checkpoint(keep.best_model_path, weights_only=True)
    assert_close(best.temperature, fit_temperature(logits_of(loaded, VAL_X)[0], VAL_Y))
    assert abs(best.temperature - last.temperature) > 1e-3
    assert set(fitted_states(best.uq_ckpt_path)) == {"TemperatureScaling"}
    assert set(fitted_states(last.uq_ckpt_path)) == {last.state_key}


def test_the_grid_and_the_calibration_error(make_trainer):
    module, scaling = UsersModule(), TemperatureScaling(objective="ece", method="grid", weights="last")
    make_trainer(callbacks=[scaling]).fit(module, loader(), val_loader())
    assert_close(scaling.temperature, fit_temperature(logits_of(module, VAL_X)[0], VAL_Y, "ece", "grid"))
    with pytest.raises(InputError, match="`method` must be 'grid'"):
        TemperatureScaling(objective="ece")


def test_a_dataloader_of_ones_own_and_limit_val_batches(make_trainer):
    own = TemperatureScaling(weights="last", dataloader=loader(VAL_X[:20], VAL_Y[:20]))
    limited = TemperatureScaling(weights="last", name="limited")
    module = UsersModule()
    make_trainer(callbacks=[own, limited], limit_val_batches=3).fit(module, loader(), val_loader())
    logits = logits_of(module, VAL_X)[0]
    assert_close(own.temperature, fit_temperature(logits[:20], VAL_Y[:20]))
    assert_close(limited.temperature, fit_temperature(logits[:24], VAL_Y[:24]))


@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class")
def test_vector_scaling_and_rows_in_any_order(make_trainer):
    module, scaling = UsersModule(), VectorScaling(weights="last")
    make_trainer(callbacks=[scaling]).fit(module, loader(), val_loader())
    assert_close(scaling.class_scaling, VectorScaling().fit_logits(logits_of(module, VAL_X)[0], VAL_Y).class_scaling)

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    target = (logits + 2 * torch.randn(50, 3, generator=generator) + torch.tensor([4.0, 0, 0])).argmax(1)
    orders = [torch.randperm(50, generator=generator) for _ in range(8)]
    assert len({fit_vector_scaling(logits[order], target[order]).strength for order in orders}) > 1
    fits = [VectorScaling().fit_logits(logits[order], target[order]).class_scaling for order in orders]
    for fit in fits[1:]:
        assert_close(fit, fits[0])
    assert fits[0][1].abs().max() > 0.1  # it is no temperature


def test_matrix_and_isotonic_scalings_of_rows_in_any_order():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 3, generator=generator, dtype=torch.float64)
    target = (logits + 2 * torch.randn(300, 3, generator=generator) + torch.tensor([2.0, 0, 0])).argmax(1)
    for scaling in (MatrixScaling(), IsotonicScaling()):
        fits = []
        for _ in range(3):
            order = torch.randperm(300, generator=generator)
            fits.append(scaling.fit_logits(logits[order], target[order]).state_dict()["tensors"][scaling.tensor_name])
        assert_close(fits[1], fits[0])
        assert_close(fits[2], fits[0])
    assert MatrixScaling().fit_logits(logits, target).fitted_numbers["temperature"] == pytest.approx(
        fit_temperature(logits, target).item()
    )


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled", "ignore:.*no finite positive temperature")
def test_the_random_state_and_a_loaders_generator_are_left_alone(make_trainer):
    after = []
    for callbacks in (
        [],
        [TemperatureScaling(), VectorScaling(dataloader=loader(VAL_X.repeat(2, 1), VAL_Y.repeat(2)))],
    ):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5)
        shuffled = val_loader(shuffle=True, generator=generator)
        make_trainer(callbacks=callbacks, num_sanity_val_steps=0).fit(UsersModule(), loader(shuffle=True), shuffled)
        after.append(torch.cat([torch.rand(1), torch.rand(1, generator=generator)]))
    assert torch.equal(*after)


# ---------------------------------------------------------------------- a module that is not ours


def test_an_unmodified_module_is_left_alone(make_trainer):
    module, scaling = UsersModule(), TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling])
    trainer.fit(module, loader(), val_loader())
    outputs = trainer.predict(module, held_out())
    assert all(isinstance(out, torch.Tensor) for out in outputs)
    assert_close(torch.cat(outputs), logits_of(module, TEST_X)[0])
    (tested,) = trainer.test(module, held_out(), verbose=False)
    raw = nn.functional.cross_entropy(logits_of(module, TEST_X)[0], TEST_Y)
    assert tested["test_loss"] == pytest.approx(raw.item(), rel=1e-5)
    assert not {"forward", "prediction", "predict_step"} & set(vars(module))


@pytest.mark.parametrize("scope", ["pooled", "member"])
def test_attach_calibrates_its_predictions(make_trainer, scope):
    module, scaling = UsersModule(), TemperatureScaling(weights="last", attach=True, scope=scope)
    trainer = make_trainer(callbacks=[FitGMM(weights="last"), scaling])
    trainer.fit(module, loader(), val_loader())
    whole = CategoricalPrediction.cat(trainer.predict(module, held_out()))
    assert_close(whole.probs, (logits_of(module, TEST_X)[0] / scaling.temperature).softmax(1))
    assert isinstance(module.predict_step((TEST_X, TEST_Y), 0), torch.Tensor)


# ---------------------------------------------------------------------- our modules: what changes, and what stays


def predictions_and_tests(make_trainer, module, scaling):
    """Predictions and test results without and with a calibration, of the same weights."""
    trainer = make_trainer(callbacks=[scaling], max_epochs=4)
    trainer.fit(module, loader(), val_loader())
    scaling.handle.remove()
    results = []
    for callbacks in ([], [scaling]):
        trainer = make_trainer(callbacks=callbacks)
        (tested,) = trainer.test(module, held_out(), verbose=False)
        results.append((CategoricalPrediction.cat(trainer.predict(module, held_out())), tested))
    return results


def recomputed(log_probs: torch.Tensor) -> dict[str, float]:
    log_probs = log_probs.double()
    nll = nn.functional.nll_loss(log_probs, TEST_Y)
    ece = expected_calibration_error(log_probs.exp(), TEST_Y)
    return {"test_nll": nll.item(), "test_ece": ece.item()}


@pytest.mark.parametrize("make", [deterministic, ensemble])
def test_pooled_changes_the_mean_alone(make_trainer, make):
    module, scaling = make(), TemperatureScaling(weights="last")
    (plain, before), (calibrated, after) = predictions_and_tests(make_trainer, module, scaling)
    T = scaling.temperature
    mean = logits_of(module, TEST_X).double().softmax(2).mean(0).log()
    expected = torch.log_softmax(mean / T, 1)
    assert abs(T - 1) > 1e-2
    assert_close(calibrated.log_probs, expected)
    assert_close(calibrated.confidence, expected.exp().amax(1))
    assert_close(calibrated.predictive_entropy, -(expected.exp() * expected).sum(1))
    for name in ("logits", "uncalibrated_mutual_information", "uncalibrated_expected_entropy", "label"):
        assert torch.equal(getattr(calibrated, name), getattr(plain, name))
    assert {k: after[k] for k in ("test_nll", "test_ece")} == pytest.approx(recomputed(expected), rel=1e-5, abs=1e-7)
    assert {k: before[k] for k in ("test_nll", "test_ece")} == pytest.approx(recomputed(mean), rel=1e-5, abs=1e-7)
    for name in ("test_accuracy", "test_loss"):
        assert after[name] == before[name]
    # Of several hypotheses the mean alone is calibrated; a single one is its mean.
    assert (after["test_joint_log_loss"] == before["test_joint_log_loss"]) == (module.network.num_indices > 1)


@pytest.mark.parametrize("scope", ["shared", "member"])
def test_inside_the_members_joint_metrics_follow(make_trainer, scope):
    module, scaling = ensemble(), TemperatureScaling(weights="last", scope=scope)
    (plain, before), (calibrated, after) = predictions_and_tests(make_trainer, module, scaling)
    T = scaling.temperature
    assert T.shape == (() if scope == "shared" else (4,))
    expected = logits_of(module, TEST_X).double() / T.reshape(-1, 1, 1)
    assert_close(calibrated.logits, expected)
    assert_close(calibrated.mutual_information, mutual_information(expected))
    assert not torch.allclose(calibrated.mutual_information, plain.mutual_information)
    log_probs = expected.softmax(2).mean(0).log()
    assert {k: after[k] for k in ("test_nll", "test_ece")} == pytest.approx(recomputed(log_probs), rel=1e-5, abs=1e-7)
    joint = JointLogLoss()
    joint.update(expected.float(), TEST_Y, torch.arange(31))
    assert after["test_joint_log_loss"] == pytest.approx(joint.compute().item(), rel=1e-5)
    assert after["test_joint_log_loss"] != before["test_joint_log_loss"]
    assert "forward" not in vars(module)


def test_for_one_network_the_three_scopes_are_one():
    module = trained(deterministic())
    fits = [TemperatureScaling(scope=scope).fit(module, val_loader()) for scope in ("pooled", "shared", "member")]
    for fit in fits[1:]:
        assert_close(fit.temperature.reshape(()), fits[0].temperature)


def test_a_class_scaling_is_carried(make_trainer):
    module = ensemble()
    data = loader(VAL_X.repeat(2, 1), VAL_Y.repeat(2))  # 90 rows of 3 classes: no warning
    scaling = VectorScaling(weights="last", dataloader=data)
    (plain, _), (calibrated, after) = predictions_and_tests(make_trainer, module, scaling)
    scale, bias = scaling.class_scaling
    mean = logits_of(module, TEST_X).double().softmax(2).mean(0).log()
    expected = torch.log_softmax(apply_vector_scaling(mean, scale, bias), 1)
    assert_close(calibrated.log_probs, expected)
    assert {k: after[k] for k in ("test_nll", "test_ece")} == pytest.approx(recomputed(expected), rel=1e-5, abs=1e-7)
    assert torch.equal(calibrated.uncalibrated_mutual_information, plain.mutual_information)


CALIBRATIONS = [
    TemperatureScaling(),
    TemperatureScaling(scope="shared"),
    VectorScaling(),
    MatrixScaling(),
    IsotonicScaling(),
]


@pytest.mark.parametrize("fitted", CALIBRATIONS, ids=lambda one: type(one).__name__)
def test_a_prediction_in_float64_is_calibrated_in_float64(fitted):
    """A temperature that is rounded to float32 moves probabilities by 1e-8."""
    logits = 3 * torch.randn(1, 90, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calibration = fitted.fit_logits(logits[0], (logits[0] + torch.randn(90, 3).mul(3)).argmax(1))
    mean = logits[0].log_softmax(1)
    match calibration:
        case VectorScaling():
            expected = apply_vector_scaling(mean, *calibration.class_scaling)
        case MatrixScaling():
            expected = apply_matrix_scaling(mean, calibration.class_matrix)
        case IsotonicScaling():
            expected = apply_isotonic(mean, calibration.class_curves)
        case _:
            expected = mean / calibration.temperature
    found = calibration.calibrate(CategoricalPrediction(logits)).probs
    torch.testing.assert_close(found, expected.softmax(1), rtol=1e-12, atol=1e-12)
    assert calibration.calibrate(CategoricalPrediction(logits.float())).probs.dtype == torch.float32


def test_validations_of_a_training_are_not_calibrated_and_trainer_validate_is(make_trainer):
    module, scaling = deterministic(), TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling], max_epochs=3)
    trainer.fit(module, loader(), val_loader())
    raw = nn.functional.cross_entropy(logits_of(module, VAL_X)[0], VAL_Y).item()
    assert trainer.callback_metrics["val_nll"].item() == pytest.approx(raw, rel=1e-5)
    (validated,) = trainer.validate(module, val_loader(), verbose=False)
    tempered = logits_of(module, VAL_X)[0].double() / scaling.temperature
    assert validated["val_nll"] == pytest.approx(nn.functional.cross_entropy(tempered, VAL_Y).item(), rel=1e-5)
    assert "prediction" not in vars(module)
    trainer = make_trainer(callbacks=[scaling], max_epochs=1)  # the second training, whose state is cleared at first
    trainer.fit(module, loader(), val_loader())
    raw = nn.functional.cross_entropy(logits_of(module, VAL_X)[0], VAL_Y).item()
    assert trainer.callback_metrics["val_nll"].item() == pytest.approx(raw, rel=1e-5)


class Evidential(DeterministicModule):
    """A Dirichlet whose concentration is 1 + exp(output)."""

    def prediction(self, output):
        return DirichletPrediction(1 + output.float().exp())


def test_of_a_dirichlet_the_mean_alone_is_tempered(make_trainer):
    module = Evidential(NETWORK, optimizer=SGD)
    scaling = TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling], max_epochs=4)
    trainer.fit(module, loader(), val_loader())

    def log_mean(x):
        alpha = 1 + logits_of(module, x)[0].double().exp()
        return (alpha / alpha.sum(1, keepdim=True)).log()

    assert_close(scaling.temperature, fit_temperature(log_mean(VAL_X), VAL_Y), 1e-4)
    calibrated = DirichletPrediction.cat(trainer.predict(module, held_out()))
    scaling.handle.remove()
    plain = DirichletPrediction.cat(make_trainer().predict(module, held_out()))
    assert_close(calibrated.probs, (log_mean(TEST_X) / scaling.temperature).softmax(1))
    for name in ("concentration", "vacuity", "uncalibrated_mutual_information", "uncalibrated_expected_entropy"):
        assert torch.equal(getattr(calibrated, name), getattr(plain, name))
    with pytest.raises(InputError, match="A DirichletPrediction has no member `logits`.*scope='pooled'"):
        TemperatureScaling(scope="shared").fit(module, val_loader())
    with pytest.raises(InputError, match="has no member `logits`"):
        TemperatureScaling(scope="member").fit_logits(log_mean(VAL_X), VAL_Y).calibrate(plain)


def test_the_real_evidential_module(make_trainer):
    module = EvidentialModule(NETWORK, optimizer=SGD, loss="re_edl")
    scaling = TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling], max_epochs=6)
    trainer.fit(module, loader(), val_loader())
    with torch.no_grad():
        log_mean = module.eval().predict(VAL_X).replace(temperature=None).log_probs
    assert_close(scaling.temperature, fit_temperature(log_mean, VAL_Y), 1e-4)
    calibrated = DirichletPrediction.cat(trainer.predict(module, held_out()))
    scaling.handle.remove()
    plain = DirichletPrediction.cat(make_trainer().predict(module, held_out()))
    assert_close(calibrated.log_probs, torch.log_softmax(plain.log_probs / scaling.temperature, 1))
    assert torch.equal(calibrated.vacuity, plain.vacuity)


@pytest.mark.parametrize("scope", ["pooled", "shared"])
def test_many_hypotheses_whose_predictions_are_pooled(make_trainer, scope):
    module = EpinetModule(NETWORK, optimizer=Factory("torch.optim.SGD", {"lr": 0.1}))
    scaling = TemperatureScaling(weights="last", scope=scope)
    trainer = make_trainer(callbacks=[scaling], max_epochs=6)
    trainer.fit(module, loader(), val_loader())
    logits = logits_of(module, VAL_X)
    assert len(logits) == 100
    assert_close(scaling.temperature, fit_ensemble_temperature(logits, VAL_Y, scope), 1e-4)
    whole = CategoricalPrediction.cat(trainer.predict(module, held_out()))
    inside, outside = (scaling.temperature, 1) if scope == "shared" else (1, scaling.temperature)
    mean = (logits_of(module, TEST_X).double() / inside).softmax(2).mean(0).log()
    assert_close(whole.log_probs, torch.log_softmax(mean / outside, 1))


def test_members_that_are_lightning_modules(make_trainer):
    module = EnsembleModule(UsersModule, num_members=2, seed=0)
    scaling = TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling], max_epochs=2)
    trainer.fit(module, loader(), val_loader())
    mean = logits_of(module, VAL_X).double().softmax(2).mean(0).log()
    assert_close(scaling.temperature, fit_temperature(mean, VAL_Y))
    (tested,) = trainer.test(module, held_out(), verbose=False)
    expected = torch.log_softmax(logits_of(module, TEST_X).double().softmax(2).mean(0).log() / scaling.temperature, 1)
    assert tested["ensemble/test_nll"] == pytest.approx(recomputed(expected)["test_nll"], rel=1e-5)


# ---------------------------------------------------------------------- it persists, and is never stale


def test_density_and_temperature_share_a_file_that_a_fresh_trainer_finds(make_trainer, tmp_path):
    module = deterministic()
    gmm, scaling = FitGMM(feature_transform="raw"), TemperatureScaling()
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
    trainer = make_trainer(callbacks=[gmm, scaling, keep], max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader(), val_loader())
    assert gmm.uq_ckpt_path == scaling.uq_ckpt_path
    assert set(fitted_states(gmm.uq_ckpt_path)) == {"FitGMM", "TemperatureScaling"}
    expected = None
    for path in (keep.best_model_path, gmm.uq_ckpt_path):
        fresh = [FitGMM(feature_transform="raw"), TemperatureScaling()]
        trainer = make_trainer(callbacks=fresh)
        parts = trainer.predict(deterministic(), held_out(), ckpt_path=path, weights_only=True)
        whole = CategoricalPrediction.cat(parts)
        assert torch.equal(fresh[1].temperature, scaling.temperature)
        expected = whole if expected is None else expected
        assert torch.equal(whole.probs, expected.probs)
        assert torch.equal(whole.log_density, expected.log_density)
    loaded = DeterministicModule.load_from_checkpoint(keep.best_model_path, network=NETWORK, weights_only=True)
    assert_close(expected.probs, (logits_of(loaded, TEST_X)[0] / scaling.temperature).softmax(1))
    assert_close(expected.log_density, -gmm.fit(loaded, loader()).score(loaded, held_out()))


@pytest.mark.parametrize("scope", ["pooled", "shared"])
def test_a_refit_in_test_does_not_see_its_own_result(make_trainer, scope):
    """The weights in memory are new, so all are fitted again while the module is already patched."""
    scaling = TemperatureScaling(weights="last", scope=scope)
    gmm = FitGMM(weights="last")
    make_trainer(callbacks=[gmm, scaling]).fit(ensemble(), loader(), val_loader())
    other = EnsembleModule(NETWORK, num_members=4, seed=7)
    with pytest.warns(UserWarning, match="fitted on other weights.*fitted again"):
        make_trainer(callbacks=[gmm, scaling]).test(other, held_out(), verbose=False)
    assert_close(scaling.temperature, fit_ensemble_temperature(logits_of(other, VAL_X), VAL_Y, scope))
    assert "forward" not in vars(other)


def test_without_state_or_loader_the_error_says_what_to_do(make_trainer):
    with pytest.raises(NotFittedError, match="no state that was fitted on the weights in memory"):
        make_trainer(callbacks=[TemperatureScaling()]).test(deterministic(), held_out(), verbose=False)
    with pytest.raises(NotFittedError, match="TemperatureScaling is not fitted"):
        _ = TemperatureScaling().temperature
    with pytest.raises(NotFittedError, match="VectorScaling is not fitted"):
        _ = VectorScaling().class_scaling


def test_a_state_fitted_under_other_settings_is_refused(make_trainer, tmp_path):
    """A pooled T and a shared one are both scalars: nothing else would tell them apart."""
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
    scaling = TemperatureScaling()
    trainer = make_trainer(callbacks=[scaling, keep], enable_checkpointing=True)
    trainer.fit(ensemble(), loader(), val_loader())
    match = "has scope='shared', but its state was fitted with scope='pooled'"
    with pytest.raises(InputError, match=match):
        TemperatureScaling(scope="shared").load_state_dict(scaling.state_dict())
    trainer = make_trainer(callbacks=[TemperatureScaling(scope="shared")])
    with pytest.raises(NotFittedError, match=match):
        trainer.test(ensemble(), held_out(), ckpt_path=keep.best_model_path, verbose=False, weights_only=True)
    with pytest.raises(InputError, match="has covariance='tied', but its state was fitted with covariance='full'"):
        FitGMM(covariance="tied").load_state_dict(FitGMM().fit(UsersModule(), loader()).state_dict())


def test_pickling_and_a_state_round_trip():
    module = trained(ensemble())
    for scaling in (TemperatureScaling(scope="member"), TemperatureScaling()):
        scaling.fit(module, val_loader())
        twin = pickle.loads(pickle.dumps(scaling))
        other = TemperatureScaling(scope=scaling.scope)
        other.load_state_dict(scaling.state_dict())
        assert torch.equal(twin.temperature, scaling.temperature)
        assert torch.equal(other.temperature, scaling.temperature)
        other.check_fitted(module)
        with torch.no_grad():
            next(module.parameters()).add_(0.1)
        with pytest.raises(NotFittedError, match="fitted on other weights"):
            twin.check_fitted(module)


def test_scores_of_others_see_no_pooled_temperature(make_trainer):
    module = deterministic()
    gmm, scaling = FitGMM(feature_transform="raw", weights="last"), TemperatureScaling(weights="last")
    make_trainer(callbacks=[gmm, scaling]).fit(module, loader(), val_loader())
    results = []
    for callbacks in ([gmm], [gmm, scaling]):
        detection = OODDetection({"far": loader(5 + TEST_X, TEST_Y)}, scores=["predictive_entropy", "log_density"])
        (tested,) = make_trainer(callbacks=[*callbacks, detection]).test(module, held_out(), verbose=False)
        results.append({k: v for k, v in tested.items() if k.startswith("ood")})
    assert results[0] == results[1]
    assert len(results[0]) == 8


# ---------------------------------------------------------------------- ranks

TWO_RANKS = """
import json, torch, warnings
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.isotonic import IsotonicScaling
from lightning_uq.callbacks.matrix_scaling import MatrixScaling
from lightning_uq.callbacks.vector_scaling import VectorScaling
torch.manual_seed(0)
x = torch.randn(61, 4).double()  # two ranks have other batches than one, so everything is in float64
y = torch.where(torch.rand(61) < 0.3, torch.randint(2, (61,)), (x[:, 0] > 0).long())
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    def forward(self, x):
        return 5 * self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        pass
    def test_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(x, y), batch_size=4)
few = DataLoader(TensorDataset(x[:1], y[:1]), batch_size=4)  # the second rank has none
make = lambda: [TemperatureScaling(weights="last"), TemperatureScaling(objective="ece", method="grid", weights="last", name="grid"),
                VectorScaling(weights="last"), TemperatureScaling(weights="last", dataloader=few, name="few"),
                MatrixScaling(weights="last"), IsotonicScaling(weights="last")]
def main():
    callbacks = make()
    module = Module()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=2, precision="64-true",
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=".", callbacks=callbacks)
    warnings.simplefilter("ignore")
    trainer.fit(module, loader, loader)
    mine = [c.state_dict()["tensors"] for c in callbacks]
    everyones = [None, None]
    torch.distributed.all_gather_object(everyones, mine)
    one = [c.fit(module, few if c.name == "few" else loader).state_dict()["tensors"] for c in make()]
    gaps = [max(float((a[k] - b[k]).abs().max()) for k in a) for theirs in everyones for a, b in zip(one, theirs)]
    if trainer.is_global_zero:
        json.dump({"gaps": gaps, "temperature": one[0]["temperature"].item()}, open(out, "w"))
if __name__ == "__main__":
    main()
"""


def test_two_ranks_give_what_one_gives(run_script):
    result = run_script(TWO_RANKS)
    assert len(result["gaps"]) == 12
    assert max(result["gaps"]) < 1e-9
    assert abs(result["temperature"] - 1) > 0.05


# ---------------------------------------------------------------------- what ends badly, and when


class Spy(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, *args):
        self.batches += 1

    def on_sanity_check_start(self, *args):
        self.batches += 1


@pytest.mark.parametrize("make", [TemperatureScaling, VectorScaling, MatrixScaling, IsotonicScaling])
@pytest.mark.parametrize(
    ("module", "loaders", "kwargs", "match"),
    [
        (UsersModule, [loader()], {}, "Scaling needs exactly one validation loader, but the Trainer has none"),
        (UsersModule, [loader(), [val_loader(), val_loader()]], {}, "but the Trainer has 2"),
        (UsersModule, [loader(), val_loader()], {"limit_val_batches": 0}, "but the Trainer has none"),
        (UsersModule, [loader(), DataLoader(VAL_X, batch_size=8)], {}, "must have targets, but a batch has none"),
        (
            UsersModule,
            [loader(), loader(VAL_X, VAL_X)],
            {},
            "does not fit Classification.*integer class labels, but they are torch.float32",
        ),
        (UsersModule, [loader(), loader(VAL_X[:0], VAL_Y[:0])], {}, "fitting data are empty"),
        (
            lambda: DeterministicModule(nn.Linear(4, 2), task="regression"),
            [loader(X, X[:, :1]), loader(VAL_X, VAL_X[:, :1])],
            {},
            r"Scaling calibrates probabilities, which Regression\(\) does not predict. Leave it out of the callbacks",
        ),
    ],
)
def test_what_would_fail_after_training_fails_before_it(make_trainer, make, module, loaders, kwargs, match):
    spy = Spy()
    with pytest.raises(InputError, match=match):
        make_trainer(callbacks=[make(), spy], **kwargs).fit(module(), *loaders)
    assert spy.batches == 0


@pytest.mark.parametrize(
    ("make", "targets", "match"),
    [
        (TemperatureScaling, VAL_X[:, :3], r"^TemperatureScaling calibrates probabilities, which Regression"),
        (VectorScaling, VAL_X[:, :3], r"^VectorScaling calibrates probabilities, which Regression"),
        (lambda: VectorScaling(task="multilabel"), (VAL_X[:, :3] > 0).float(), r"^VectorScaling scales classes"),
    ],
)
def test_without_a_trainer_the_error_names_the_callback_too(make, targets, match):
    with pytest.raises(InputError, match=match):
        make().fit(nn.Linear(4, 3), loader(VAL_X, targets))


@pytest.mark.parametrize("make", [TemperatureScaling, FitGMM])
def test_what_is_no_loader_is_told_before_training(make_trainer, make):
    module = UsersModule()
    with pytest.raises(InputError, match="`dataloader` must be a DataLoader.*wrap the data set in a DataLoader"):
        make_trainer(callbacks=[make(dataloader=TensorDataset(X, Y))]).fit(module, loader(), val_loader())
    assert module.training_batches == 0


def test_two_calibrations_of_one_prediction_are_refused(make_trainer):
    both = [TemperatureScaling(), VectorScaling()]
    with pytest.raises(
        InputError,
        match="can carry one calibration, but the Trainer has TemperatureScaling and VectorScaling. Keep one",
    ):
        make_trainer(callbacks=both).fit(deterministic(), loader(), val_loader())


def test_one_class_and_saturated_logits_give_a_finite_positive_temperature(make_trainer):
    with pytest.warns(UserWarning, match="every row is classified correctly"):
        one_class = TemperatureScaling().fit(Certain(), loader(VAL_X, torch.zeros_like(VAL_Y)))
    mostly = VAL_Y.clone()
    mostly[:30] = 0
    saturated = TemperatureScaling().fit(Certain(), loader(VAL_X, mostly))
    for scaling in (one_class, saturated):
        assert scaling.temperature > 0
        assert math.isfinite(scaling.temperature)
    # All logits are (1e4, 0, 0): the optimum makes the probability of class 0 its frequency.
    share = (mostly == 0).double().mean()
    expected = 1e4 / (2 * share / (1 - share)).log()
    assert_close(saturated.temperature / expected, torch.ones(()))


class Certain(nn.Module):
    def forward(self, x):
        return torch.tensor([1e4, 0.0, 0.0]).expand(len(x), 3)


def test_nan_logits_are_named_and_nothing_is_half_fitted():
    scaling = TemperatureScaling()
    with pytest.raises(InputError, match="NaN"):
        scaling.fit(nn.Linear(4, 3), loader(VAL_X * math.nan, VAL_Y))
    assert not scaling.fitted


def test_an_exception_leaves_nothing_fitted_and_nothing_patched(make_trainer):
    class Broken(DeterministicModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            raise RuntimeError("the user's own")

    module = Broken(NETWORK)
    scaling = TemperatureScaling(weights="last", scope="shared")
    trainer = make_trainer(callbacks=[scaling])
    trainer.fit(module, loader(), val_loader())
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer.test(module, held_out(), verbose=False)
    assert not {"forward", "prediction"} & set(vars(module))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TemperatureScaling(objective="accuracy"), "`objective`"),
        (lambda: TemperatureScaling(method="lbfgs"), "`method`"),
        (lambda: TemperatureScaling(scope="both"), "`scope`"),
        (lambda: TemperatureScaling(weights="first"), "`weights`"),
        (lambda: VectorScaling(predict_fn=3), "`predict_fn`"),
    ],
)
def test_wrong_arguments_are_named(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_the_states_file_is_plain(make_trainer, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
    scaling = TemperatureScaling()
    make_trainer(callbacks=[scaling, keep], enable_checkpointing=True).fit(UsersModule(), loader(), val_loader())
    assert Path(scaling.uq_ckpt_path).name == Path(keep.best_model_path).stem + "-uq.ckpt"
    content = torch.load(scaling.uq_ckpt_path, weights_only=True)
    written_by = content["lightning_uq_written_by"]
    assert written_by["class_path"].endswith("test_temperature.UsersModule")
    assert written_by["is_ours"] is False
    assert content["callbacks"]["TemperatureScaling"]["settings"]["scope"] == "pooled"

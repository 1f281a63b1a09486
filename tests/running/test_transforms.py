"""What is attached to a module's predictions: in which order, for how long, on which weights, and in which copies."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks import (
    FitGMM,
    FitKNN,
    IsotonicScaling,
    MatrixScaling,
    OODDetection,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.modules.evidential import EvidentialModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.running import transforms, weights

NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [6]})
SGD = Factory("torch.optim.SGD", {"lr": 0.5})
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=GENERATOR)
Y = ((X[:, 0] > 0) ^ (torch.rand(60, generator=GENERATOR) < 0.2)).long()


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def trained(module):
    """After a few steps, without a Trainer, so that it has a finite temperature."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X).mean(0), Y).backward()
        optimizer.step()
    return module


def deterministic() -> DeterministicModule:
    torch.manual_seed(0)
    return trained(DeterministicModule(NETWORK, optimizer=SGD))


def fitted(callback=None, module=None):
    module = (module or deterministic()).eval()
    return module, (callback or TemperatureScaling()).fit(module, loader())


def assert_same(one: Prediction, other: Prediction) -> None:
    assert type(one) is type(other)
    numbers, others = one.to_dict(), other.to_dict()
    assert numbers.keys() == others.keys()
    for name, value in numbers.items():
        torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- predict is what the Trainer gives

CALLBACKS = {
    "gmm": lambda **kwargs: [FitGMM(**kwargs)],
    "pooled": lambda **kwargs: [TemperatureScaling(**kwargs)],
    "shared": lambda **kwargs: [TemperatureScaling(scope="shared", **kwargs)],
    "member": lambda **kwargs: [TemperatureScaling(scope="member", **kwargs)],
    "vector": lambda **kwargs: [VectorScaling(**kwargs)],
    "matrix": lambda **kwargs: [MatrixScaling(**kwargs)],
    "isotonic": lambda **kwargs: [IsotonicScaling(**kwargs)],
    "both": lambda **kwargs: [TemperatureScaling(scope="shared", **kwargs), FitGMM(**kwargs), FitKNN(k=3, **kwargs)],
}
MODULES = {
    "deterministic": deterministic,
    "ensemble": lambda: EnsembleModule(NETWORK, num_members=3, seed=0, optimizer=SGD),
    "loop": lambda: EnsembleModule(NETWORK, num_members=2, seed=0, optimizer=SGD, execution="loop"),
    "dropout": lambda: DropoutModule(
        nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2)), optimizer=SGD, num_eval_samples=8
    ),
    "epinet": lambda: EpinetModule(NETWORK, optimizer=SGD, num_eval_samples=40),
    "evidential": lambda: EvidentialModule(NETWORK, optimizer=SGD),
}


@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class", "ignore:.*no finite positive temperature")
@pytest.mark.parametrize("which", CALLBACKS)
@pytest.mark.parametrize("kind", ["deterministic", "ensemble", "dropout"])
def test_predict_equals_the_trainers(make_trainer, kind, which):
    module, callbacks = MODULES[kind](), CALLBACKS[which](weights="last")
    trainer = make_trainer(callbacks=callbacks, max_epochs=2)
    trainer.fit(module, loader(), loader())
    module.eval()
    after_fit = module.predict(X)
    from_trainer = Prediction.cat(trainer.predict(module, loader()))
    assert_same(after_fit, from_trainer)
    assert_same(module.predict(X), from_trainer)
    module.prediction_transforms.clear()
    plain, changed = module.predict(X).to_dict(), from_trainer.to_dict()
    assert "log_density" in changed.keys() - plain.keys() or not torch.equal(plain["probs"], changed["probs"])


@pytest.mark.parametrize(("kind", "which"), [("loop", "both"), ("epinet", "pooled"), ("evidential", "pooled")])
def test_predict_equals_the_trainers_for_other_methods(make_trainer, kind, which):
    test_predict_equals_the_trainers(make_trainer, kind, which)


@pytest.mark.parametrize("which", ["gmm", "shared", "pooled"])
def test_without_a_trainer_predict_carries_the_fit_too(make_trainer, which):
    (callback,) = CALLBACKS[which]()
    module, _ = fitted(callback)
    assert_same(module.predict(X), Prediction.cat(make_trainer(callbacks=[callback]).predict(module, loader())))
    plain = deterministic().eval().predict(X)
    changed = module.predict(X)
    assert torch.equal(changed.logits, plain.logits) == (which != "shared")
    assert torch.equal(changed.probs, plain.probs) == (which == "gmm")


def test_raw_outputs_and_losses_stay_raw(make_trainer):
    module = deterministic().eval()
    plain = module(X)
    (raw,) = make_trainer().test(module, loader(), verbose=False)
    TemperatureScaling(scope="shared").fit(module, loader())
    (tested,) = make_trainer().test(module, loader(), verbose=False)
    assert torch.equal(module(X), plain)
    assert tested["test_loss"] == raw["test_loss"]
    assert tested["test_nll"] != raw["test_nll"]  # the metrics see the prediction that the module gives


# ---------------------------------------------------------------------- for how long


def test_a_handle_takes_it_off():
    module, scaling = fitted()
    plain = deterministic().eval().predict(X).probs
    assert not torch.equal(module.predict(X).probs, plain)
    scaling.handle.remove()
    assert torch.equal(module.predict(X).probs, plain)
    scaling.handle.remove()  # a second time does nothing


def test_a_trainer_that_has_the_callback_attaches_it_again(make_trainer):
    module, scaling = fitted()
    scaling.handle.remove()
    make_trainer().test(module, loader(), verbose=False)
    assert len(module.prediction_transforms) == 0
    make_trainer(callbacks=[scaling]).test(module, loader(), verbose=False)
    assert len(module.prediction_transforms) == 1


def test_a_second_fit_takes_the_place_of_the_first():
    module, scaling = fitted(TemperatureScaling(scope="shared"))
    first = module.predict(X).logits
    scaling.fit(module, loader())  # on the raw logits, not on those that it tempers itself
    assert torch.equal(module.predict(X).logits, first)
    assert len(module.prediction_transforms) == 1


def test_a_failed_fit_leaves_nothing_attached():
    module, scaling = fitted()
    with pytest.raises(InputError, match="must have targets"):
        scaling.fit(module, [X])
    assert len(module.prediction_transforms) == 0


def test_a_training_takes_all_off(make_trainer):
    module, _ = fitted()
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(len(pl_module.prediction_transforms))

    make_trainer(callbacks=[Look()]).fit(module.train(), loader(), loader())
    assert set(seen) == {0}


def test_one_callback_on_two_modules_leaves_each_its_own():
    first, second = deterministic().eval(), deterministic().eval()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    scaling = TemperatureScaling().fit(first, loader())
    before = scaling.temperature
    scaling.fit(second, loader())
    assert first.predict(X).temperature == before.float()
    assert second.predict(X).temperature == scaling.temperature.float() != before.float()


# ---------------------------------------------------------------------- order


def test_the_last_in_the_trainers_order_wins(make_trainer):
    module = deterministic()
    callbacks = [
        FitGMM(feature_transform="raw", weights="last"),
        FitGMM(feature_transform="raw", weights="last", name="tied", covariance="tied"),
    ]
    trainer = make_trainer(callbacks=callbacks)
    trainer.fit(module, loader(), loader())
    module.eval()
    tied = -callbacks[1].score(module, loader())
    for _ in range(2):
        torch.testing.assert_close(module.predict(X).log_density, tied)
        trainer.predict(module, loader())
    callbacks[1].handle.remove()
    callbacks[0].attach_to(module)
    torch.testing.assert_close(module.predict(X).log_density, -callbacks[0].score(module, loader()))


def test_a_prediction_carries_one_calibration():
    module, _ = fitted(TemperatureScaling(scope="shared"))
    pooled = TemperatureScaling(name="pooled").fit(module, loader())
    assert torch.equal(module.predict(X).logits, deterministic().eval().predict(X).logits)
    assert module.predict(X).temperature == pooled.temperature.float()


# ---------------------------------------------------------------------- on which weights


def test_other_weights_are_an_error_that_says_what_to_do(make_trainer):
    module, scaling = fitted()
    with torch.no_grad():
        next(module.parameters()).add_(0.1)
    match = r"TemperatureScaling was fitted on other weights than this module's\. Load .*`module.prediction_transforms.clear"
    with pytest.raises(NotFittedError, match=match):
        module.predict(X)
    with pytest.raises(NotFittedError, match=match):
        make_trainer().test(module, loader(), verbose=False)
    with pytest.raises(NotFittedError, match="no state that was fitted on the weights in memory"):
        make_trainer(callbacks=[scaling]).test(module, loader(), verbose=False)
    module.prediction_transforms.clear()
    assert module.predict(X).probs.shape == (60, 2)


def test_a_batchnorm_in_training_mode():
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    module, _ = fitted(module=trained(DeterministicModule(network)))
    expected = module.eval().predict(X).probs
    module.train()
    assert torch.equal(module.predict(X).probs, expected)  # `predict` evaluates
    assert torch.equal(module.predict(X).probs, expected)
    module(X)  # while a forward pass in training mode moves the statistics
    with pytest.raises(NotFittedError, match="fitted on other weights"):
        module.predict(X)


def test_best_weights_are_asked_for_until_they_are_loaded(make_trainer, tmp_path):
    module, scaling = deterministic(), TemperatureScaling()
    keep = ModelCheckpoint(tmp_path / "c", monitor="val_loss", mode="max")  # the first epoch's, not the last
    make_trainer(callbacks=[scaling, keep], max_epochs=3, enable_checkpointing=True).fit(module, loader(), loader())
    module.eval()
    with pytest.raises(NotFittedError, match="Load the weights of the fit .*-uq.ckpt"):
        module.predict(X)
    state = torch.load(scaling.uq_ckpt_path, weights_only=True)["state_dict"]
    module.load_state_dict(state)
    assert module.predict(X).temperature == scaling.temperature.float()
    with pytest.warns(UserWarning, match="holds what TemperatureScaling fitted"):
        alone = DeterministicModule.load_from_checkpoint(scaling.uq_ckpt_path, network=NETWORK).eval()
    assert len(alone.prediction_transforms) == 0  # they are no part of a module's checkpoint
    fresh = TemperatureScaling()
    fresh.load_state_dict(torch.load(scaling.uq_ckpt_path, weights_only=True)["callbacks"]["TemperatureScaling"])
    fresh.attach_to(alone)
    assert_same(alone.predict(X), module.predict(X))


def test_an_average_that_is_swapped_in_is_noticed(make_trainer):
    module, scaling = deterministic(), TemperatureScaling(weights="last")
    ema = EMAWeightAveraging(decay=0.5)
    trainer = make_trainer(callbacks=[ema, scaling], max_epochs=2)
    trainer.fit(module, loader(), loader())
    module.eval()
    module.predict(X)
    ema._average_model.module.network.network.requires_grad_(False).apply(
        lambda layer: layer.weight.data.add_(1) if hasattr(layer, "weight") else None
    )
    ema._swap_models(module)
    with pytest.raises(NotFittedError, match="other weights"):
        module.predict(X)
    ema._swap_models(module)
    module.predict(X)


@pytest.mark.parametrize(
    "move", [lambda m: m.bfloat16().float(), lambda m: m.double(), lambda m: m.to("cpu")], ids=range(3)
)
def test_a_cast_is_no_change(move):
    module = deterministic()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # so that the way back is exact
    module, scaling = fitted(module=module)
    module = move(module)
    x = X.to(next(module.parameters()).dtype)
    assert module.predict(x).temperature == scaling.temperature.to(module.predict(x).temperature)


# ---------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("which", ["gmm", "shared", "vector"])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class")
def test_a_copy_carries_what_its_original_does(make_copy, which):
    (callback,) = CALLBACKS[which](unpack_batch=lambda batch: tuple(batch))  # a lambda stays with the callback
    module, _ = fitted(callback, trained(EnsembleModule(NETWORK, num_members=2, seed=0)))
    module.predict(X)
    twin = make_copy(module)
    assert_same(twin.predict(X), module.predict(X))
    with torch.no_grad():
        next(twin.parameters()).add_(0.1)
    with pytest.raises(NotFittedError):
        twin.predict(X)
    module.predict(X)
    callback.handle.remove()
    assert len(twin.prediction_transforms) == 1


def test_checkpoints_stay_plain_and_the_callback_can_be_pickled(make_trainer, tmp_path):
    module, gmm = deterministic(), FitGMM(weights="last")
    trainer = make_trainer(callbacks=[gmm])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not any("transform" in name for name in [*content, *content["state_dict"], *content["hyper_parameters"]])
    twin = pickle.loads(pickle.dumps(gmm))
    assert twin.handle is None
    module.prediction_transforms.clear()
    twin.attach_to(module)
    assert "log_density" in module.eval().predict(X).to_dict()


# ---------------------------------------------------------------------- a temperature inside the members


class Clipped(DeterministicModule):
    """Its prediction's logits are not its raw outputs."""

    def prediction(self, output):
        return CategoricalPrediction(3 * output.tanh())


@pytest.mark.parametrize("scope", ["shared", "member"])
def test_the_fitted_logits_are_those_that_are_tempered(make_trainer, scope):
    torch.manual_seed(0)
    module = Clipped(NETWORK, optimizer=SGD)
    scaling = TemperatureScaling(weights="last", scope=scope)
    trainer = make_trainer(callbacks=[scaling], max_epochs=5)
    trainer.fit(module, loader(), loader())
    module.eval()
    logits = 3 * module(X)[0].tanh() / scaling.temperature.reshape(())
    torch.testing.assert_close(module.predict(X).logits[0], logits.float())
    nll = nn.functional.cross_entropy(logits, Y).item()
    (tested,) = trainer.test(module, loader(), verbose=False)
    assert tested["test_nll"] == pytest.approx(nll, rel=1e-5)
    with torch.no_grad():  # and so it is the best temperature of these
        near = [nn.functional.cross_entropy(logits * factor, Y).item() for factor in (0.97, 1.03)]
    assert nll < min(near)


def test_scores_read_members_with_their_temperature(make_trainer):
    module, scaling = fitted(TemperatureScaling(scope="shared"))
    detection = OODDetection(scores=["energy"])
    tempered = detection.score(module, loader())["energy"]
    torch.testing.assert_close(tempered, module.predict(X).score("energy"))
    scaling.handle.remove()
    assert not torch.equal(detection.score(module, loader())["energy"], tempered)


def test_a_predict_fn_of_our_module_is_refused():
    scaling = TemperatureScaling(predict_fn=lambda model, x: 2 * model(x))
    with pytest.raises(InputError, match="Leave argument `predict_fn` out"):
        scaling.fit(deterministic(), loader())


def test_transforms_of_a_module_share_one_look_at_its_weights(monkeypatch):
    """Each look reads weights, and on a GPU waits for the device."""
    module, _ = fitted()
    fitted(FitGMM(), module)
    looks = []
    look = transforms.weights_mark
    monkeypatch.setattr(transforms, "weights_mark", lambda module: looks.append(module) or look(module))
    monkeypatch.setattr(weights, "weights_mark", lambda module: looks.append(module) or look(module))
    assert len(module.prediction_transforms) == 2
    module.predict(X)
    assert looks == [module]
    module.prediction_transforms.apply(module, module.prediction(module(X)))
    assert looks == [module, module]

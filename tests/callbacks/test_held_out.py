"""What callbacks on held-out predictions share: their order, the calibrations they were fitted to, the weights, and a module's predictions."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_uq import (
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    EnsembleModule,
    EpinetModule,
    FitGMM,
    FitLaplace,
    IsotonicScaling,
    MatrixScaling,
    OODAlarm,
    OODDetection,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.callbacks import PredictionWriter, read_predictions
from lightning_uq.errors import InputError, NotFiniteError, NotFittedError, UQError
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks import Regression, Segmentation
from tests.callbacks.conformal import labelled, pairs
from tests.contract import cases

pytestmark = pytest.mark.filterwarnings("ignore:.*no finite positive temperature", "ignore:.*fewer than 20 per class")

TRAIN, VAL, TEST = (cases.loader("classification", n, seed) for n, seed in ((40, 0), (61, 1), (27, 2)))
NUMBERS = [cases.loader("regression", n, seed) for n, seed in ((40, 0), (61, 1), (27, 2))]
X = TEST.dataset.tensors[0]


def deterministic(**kwargs):
    return DeterministicModule(cases.network, optimizer=cases.OPTIMIZERS["classification"], **kwargs)


def ensemble():
    return EnsembleModule(cases.network, num_members=3, seed=0, optimizer=cases.OPTIMIZERS["classification"])


def foreign(kind):
    """The callback with `attach`, and a module of somebody who has never heard of this package."""
    if kind == "sets":
        return partial_attach(ConformalSets, "classification"), cases.UsersModule(), (TRAIN, VAL, TEST)
    return partial_attach(ConformalIntervals, Regression(head="mean")), cases.UsersRegressor(), NUMBERS


def partial_attach(cls, task):
    return lambda **kwargs: cls(attach=True, task=task, **kwargs)


def joined(parts):
    return type(parts[0]).cat(parts)


def carried(prediction):
    """The tensors that a conformal callback adds."""
    names = ("prediction_set", "conformal_lower", "conformal_upper")
    return {name: t for name, t in prediction.to_dict().items() if name in names}


# ---------------------------------------------------------------------- which predictions are fitted


@pytest.mark.filterwarnings("ignore:ConformalSets and IsotonicScaling are fitted to the same rows")
@pytest.mark.parametrize("make", [TemperatureScaling, VectorScaling, MatrixScaling, IsotonicScaling])
def test_sets_are_of_calibrated_probabilities(make_trainer, make):
    module, scaling, conformal = deterministic(), make(), ConformalSets(method="aps")
    trainer = make_trainer(callbacks=[scaling, conformal], max_epochs=4)
    trainer.fit(module, TRAIN, VAL)
    x, y = VAL.dataset.tensors
    raw = module.prediction(module(x))
    direct = ConformalSets(method="aps").fit_predictions(scaling.calibrate(raw), y)
    torch.testing.assert_close(conformal.threshold, direct.threshold, rtol=1e-5, atol=1e-6)
    alone = ConformalSets(method="aps").fit_predictions(raw, y)
    assert abs(float(conformal.threshold - alone.threshold)) > 1e-3  # else nothing was shown
    prediction = joined(trainer.predict(module, TEST))
    assert torch.equal(prediction.prediction_set, conformal.sets(prediction))
    assert torch.equal(module.predict(X).prediction_set, prediction.prediction_set)


def test_sets_on_the_rows_of_isotonic_curves_are_warned_of(make_trainer):
    """The curves know their own rows: there the sets need fewer classes than on others."""
    prediction, target = labelled(4000, num_classes=20, spread=1.5)
    own, other, new = slice(300), slice(300, 1300), slice(1300, None)
    curves = IsotonicScaling().fit_logits(prediction.logits[0, own], target[own])
    covered = []
    for rows in (own, other):
        conformal = ConformalSets().fit_predictions(curves.calibrate(prediction[rows]), target[rows])
        sets = conformal.sets(curves.calibrate(prediction[new]))
        covered.append(float(sets.gather(1, target[new].unsqueeze(1)).double().mean()))
    assert covered[0] < 0.85
    assert covered[1] > 0.87
    apart = cases.loader("classification", 50, 3)
    with pytest.warns(UserWarning, match="ConformalSets and IsotonicScaling are fitted to the same rows"):
        make_trainer(callbacks=[IsotonicScaling(), ConformalSets()]).fit(deterministic(), TRAIN, VAL)
    for callbacks in (
        [IsotonicScaling(dataloader=apart), ConformalSets()],
        [IsotonicScaling(), ConformalSets(dataloader=apart)],
        [TemperatureScaling(), ConformalSets()],
    ):
        make_trainer(callbacks=callbacks).fit(deterministic(), TRAIN, VAL)


@pytest.mark.parametrize("make", [deterministic, cases.UsersModule])
def test_a_calibration_behind_the_sets_is_refused_before_the_training(make_trainer, make):
    trainer = make_trainer(callbacks=[ConformalSets(), TemperatureScaling()])
    with pytest.raises(
        InputError, match="ConformalSets stands before TemperatureScaling in the Trainer's callbacks.*Swap them"
    ):
        trainer.fit(make(), TRAIN, VAL)


@pytest.mark.parametrize("scope", ["pooled", "shared", "member"])
def test_after_another_calibration_the_sets_refuse(scope):
    """A temperature inside the members leaves no trace in the probabilities; the prediction remembers it."""
    module, (x, y) = ensemble(), VAL.dataset.tensors
    TemperatureScaling(scope=scope).fit(module, VAL)
    conformal = ConformalSets().fit(module, VAL)
    prediction = module.predict(X)
    assert prediction.prediction_set.shape == (len(X), 3)
    with torch.no_grad():
        truth = module.predict(x).probs.log_softmax(1).argmax(1)  # labels that the network knows: another temperature
    TemperatureScaling(scope=scope).fit(module, pairs(x, torch.where(torch.arange(len(x)) % 9 == 0, y, truth)))
    with pytest.raises(
        InputError, match="ConformalSets was fitted to predictions with a .*temperature.* Fit ConformalSets again"
    ):
        module.predict(X)
    module.prediction_transforms.detach("TemperatureScaling")
    with pytest.raises(InputError, match="but this one has no (member )?temperature"):
        module.predict(X)
    conformal.fit(module, VAL)
    assert module.predict(X).calibrations == {}


def test_predictions_in_memory_must_be_calibrated_as_those_that_were_fitted():
    prediction, target = labelled(60, num_classes=3)
    scaling = TemperatureScaling().fit_logits(prediction.logits[0], target)
    conformal = ConformalSets().fit_predictions(scaling.calibrate(prediction), target)
    assert conformal.sets(scaling.calibrate(prediction)).shape == (60, 3)
    assert conformal.sets(scaling.calibrate(prediction).to(torch.bfloat16)).shape == (
        60,
        3,
    )  # T is rounded, not another
    with pytest.raises(InputError, match="with a temperature of .*, but this one has no temperature"):
        conformal.sets(prediction)
    plain = ConformalSets().fit_predictions(prediction, target)
    with pytest.raises(InputError, match="with no temperature, but this one has a temperature of"):
        plain.sets(scaling.calibrate(prediction))


def test_a_trainer_that_has_the_sets_alone(make_trainer):
    """A module of ours carries its temperature on; without it, the sets are not of its probabilities."""
    module, conformal = deterministic(), ConformalSets()
    make_trainer(callbacks=[TemperatureScaling(), conformal]).fit(module, TRAIN, VAL)
    expected = module.predict(X).prediction_set
    other = make_trainer(callbacks=[conformal])
    assert torch.equal(joined(other.predict(module, TEST)).prediction_set, expected)
    (tested,) = other.test(module, TEST, verbose=False)
    assert tested["uq/test_set_size"] == pytest.approx(float(expected.sum(1).double().mean()))
    assert torch.equal(joined(make_trainer().predict(module, TEST)).prediction_set, expected)  # nor any callback
    module.prediction_transforms.detach("TemperatureScaling")
    with pytest.raises(InputError, match="but this one has no temperature"):
        other.predict(module, TEST)


@pytest.mark.parametrize("attach", [False, True])
def test_on_a_users_module_the_temperature_counts_that_its_predictions_carry(make_trainer, attach):
    """Without `attach` nothing changes its predictions; the temperature then belongs to no set that does."""
    scaling = TemperatureScaling(attach=attach, task="classification")
    conformal = ConformalSets(attach=True, task="classification")
    module, trainer = cases.UsersModule(), make_trainer(callbacks=[scaling, conformal], max_epochs=4)
    trainer.fit(module, TRAIN, VAL)
    prediction = joined(trainer.predict(module, TEST))
    assert ("temperature" in prediction.calibrations) == attach == conformal.carried().has_calibration
    assert torch.equal(conformal.sets(prediction), prediction.prediction_set)


@pytest.mark.parametrize(("attach", "is_told"), [((True, True), False), ((False, True), True), ((False, False), False)])
def test_a_calibration_that_predictions_lack_is_told(make_trainer, caplog, attach, is_told):
    callbacks = [
        cls(attach=a, task="classification") for cls, a in zip((TemperatureScaling, ConformalSets), attach, strict=True)
    ]
    with caplog.at_level("INFO"):
        make_trainer(callbacks=callbacks).fit(cases.UsersModule(), TRAIN, VAL)
        make_trainer(callbacks=[TemperatureScaling(), ConformalSets(attach=True)]).fit(deterministic(), TRAIN, VAL)
    told = [
        r.message
        for r in caplog.records
        if "TemperatureScaling before it does not, so its changes are left out" in r.message
    ]
    assert len(told) == is_told


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_validation_data_that_are_the_training_data_are_told(make_trainer, caplog, kind):
    build, module, (train, val, _) = foreign(kind)
    for loaders, is_told in (((train, val), False), ((train, DataLoader(train.dataset, batch_size=8)), True)):
        with caplog.at_level("INFO"):
            make_trainer(callbacks=[build()]).fit(module, *loaders)
        told = [r.message for r in caplog.records if "a validation loader that reads the training data" in r.message]
        assert len(told) == is_told


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_a_prediction_without_a_trainer(make_trainer, kind):
    build, module, (train, val, test) = foreign(kind)
    conformal, x = build().fit(module, val), test.dataset.tensors[0]
    direct = conformal.change(conformal.logits.task(module).predict(module(x).detach().unsqueeze(0)))
    for batch in (x, list(test.dataset.tensors)):
        for name, tensor in carried(conformal.predict(module, batch)).items():
            torch.testing.assert_close(tensor, carried(direct)[name])
    x = x.clone()
    x[1] = torch.nan
    with pytest.raises(NotFiniteError, match="1 of 27 rows hold NaN"):
        conformal.predict(module, x)
    with pytest.raises(NotFittedError, match="ConformalSets is not fitted|ConformalIntervals is not fitted"):
        build().predict(module, x)
    with pytest.raises(NotFittedError, match="was fitted on other weights"):
        conformal.predict(type(module)(), test.dataset.tensors[0])


@pytest.mark.parametrize("scope", ["pooled", "shared", "member"])
def test_a_prediction_without_a_trainer_of_our_module_is_its_own(scope):
    module = ensemble()
    TemperatureScaling(scope=scope).fit(module, VAL)
    conformal = ConformalSets().fit(module, VAL)
    own, found = module.predict(X), conformal.predict(module, X)
    torch.testing.assert_close(found.probs, own.probs)
    assert torch.equal(found.prediction_set, own.prediction_set)
    conformal.handle.remove()
    assert torch.equal(conformal.predict(module, X).prediction_set, own.prediction_set)


def test_densities_and_detection_beside_it(make_trainer):
    for module, options in ((deterministic(), {}), (cases.UsersModule(), {"attach": True, "task": "classification"})):
        conformal = ConformalSets(**options)
        others = [
            FitGMM(**options),
            OODDetection({"far": cases.far_loader()}, **({"task": "classification"} if options else {})),
        ]
        trainer = make_trainer(callbacks=[others[0], conformal, others[1]])
        trainer.fit(module, TRAIN, VAL)
        (tested,) = trainer.test(module, TEST, verbose=False)
        assert {"uq/test_coverage", "uq/test_set_size", "ood_auroc/far/density"} <= tested.keys()
        prediction = joined(trainer.predict(module, TEST))
        assert prediction.log_density.shape == (len(X),)
        assert torch.equal(prediction.prediction_set, conformal.sets(prediction))


# ---------------------------------------------------------------------- a user's module


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_an_unmodified_module_from_training_to_files(make_trainer, tmp_path, kind):
    build, module, (train, val, test) = foreign(kind)
    conformal, writer = build(), PredictionWriter(tmp_path / "p", format="csv", interval=None)
    trainer = make_trainer(callbacks=[conformal, writer], max_epochs=2)
    trainer.fit(module, train, val)
    assert conformal.fitted_numbers.keys() == {"set_threshold" if kind == "sets" else "interval_margin"}
    for name, number in conformal.fitted_numbers.items():
        assert trainer.callback_metrics[f"uq/{name}"].item() == pytest.approx(number)
    x, y = test.dataset.tensors
    prediction = conformal.change(conformal.logits.prediction(module, module(x).detach()[None]))
    (tested,) = trainer.test(module, test, verbose=False)
    if kind == "sets":
        expected = {
            "coverage": prediction.prediction_set.gather(1, y[:, None]).double().mean(),
            "set_size": prediction.set_size.double().mean(),
        }
    else:
        inside = (prediction.conformal_lower <= y) & (y <= prediction.conformal_upper)
        width = prediction.conformal_upper - prediction.conformal_lower
        expected = {"coverage": inside.double().mean(), "interval_width": width.double().mean()}
    for name, value in expected.items():
        assert tested[f"uq/test_{name}"] == pytest.approx(float(value), rel=1e-5)
    found = joined(trainer.predict(module, test))
    written = read_predictions(tmp_path / "p")
    for name, tensor in carried(prediction).items():
        torch.testing.assert_close(carried(found)[name], tensor, rtol=1e-5, atol=1e-5)
        column = torch.from_numpy(written[f"{name}_1"])
        assert (column.dtype == torch.bool) == (kind == "sets")
        torch.testing.assert_close(column.to(tensor.dtype), carried(found)[name][:, 1])
    assert torch.equal(
        torch.cat(make_trainer().predict(module, test)), torch.cat([module(p[0]) for p in test]).detach()
    )


def test_the_task_of_a_users_regressor_is_seen_in_its_data(make_trainer):
    conformal = ConformalIntervals()
    make_trainer(callbacks=[conformal]).fit(cases.UsersRegressor(), *NUMBERS[:2])
    assert conformal.margin.shape == (2,)
    with pytest.raises(
        InputError, match=r"which Classification\(\) does not .* or pass `task`, such as `Regression\(head='mean'\)`"
    ):
        make_trainer(callbacks=[ConformalIntervals()]).fit(cases.UsersModule(), TRAIN, VAL)
    with pytest.raises(InputError, match="ConformalSets makes sets of classes, but Regression"):
        make_trainer(callbacks=[ConformalSets()]).fit(cases.UsersRegressor(), *NUMBERS[:2])


def test_groups_and_density_ratios_are_read_of_the_input(make_trainer):
    def groups(x):
        return (x[:, 0] > 1).long()

    def ratio(x):
        return x[:, 0].exp()

    for kwargs, name, function in (
        ({"groups": groups}, "groups", groups),
        ({"density_ratio": ratio}, "weights", ratio),
    ):
        build, module, (train, val, test) = foreign("intervals")
        conformal = build(alpha=0.3, **kwargs)
        trainer = make_trainer(callbacks=[conformal])
        trainer.fit(module, train, val)
        assert conformal.fitted_numbers == {}
        found = joined(trainer.predict(module, test))
        x = test.dataset.tensors[0]
        lower, upper = conformal.intervals(found, **{name: function(x)})
        torch.testing.assert_close(found.conformal_lower, lower)
        plain = build(alpha=0.3).fit(module, val)
        assert not torch.allclose(upper - lower, (2 * plain.margin).float())  # else nothing was shown
        own = DeterministicModule(module.net, task=Regression(head="mean"))
        ConformalIntervals(alpha=0.3, **kwargs).fit(own, val)
        torch.testing.assert_close(own.predict(x).conformal_lower, lower, rtol=1e-5, atol=1e-5)
    sets = ConformalSets(density_ratio=ratio).fit(module := deterministic(), VAL)
    assert torch.equal(module.predict(X).prediction_set, sets.sets(module.predict(X), weights=ratio(X)))


@pytest.mark.parametrize("link", ["samples", "probit"])
def test_sets_behind_a_posterior_are_not_made_without_it(link):
    module, (x, y) = deterministic(), VAL.dataset.tensors
    laplace = FitLaplace(select="marginal_likelihood", link=link).fit(module, TRAIN)
    with_posterior = laplace.predict(module, x)
    conformal = ConformalSets().fit_predictions(with_posterior, y)
    assert conformal.sets(with_posterior).shape == with_posterior.probs.shape
    laplace.handle.remove()
    with pytest.raises(
        InputError, match="fitted to predictions with a prior precision.*, but this one has no prior precision"
    ):
        conformal.sets(module.predict(x))


def test_intervals_behind_a_posterior_are_not_made_without_it(make_trainer):
    task = Regression(head="mean_variance")
    module = DeterministicModule(lambda: nn.Linear(4, 4), task=task)
    laplace, conformal = FitLaplace(), ConformalIntervals(method="normalized")
    make_trainer(callbacks=[laplace, conformal]).fit(module, *NUMBERS[:2])
    assert module.predict(NUMBERS[2].dataset.tensors[0]).conformal_lower.shape == (27, 2)
    laplace.handle.remove()
    with pytest.raises(InputError, match="but this one has no prior precision"):
        module.predict(NUMBERS[2].dataset.tensors[0])


def test_a_predict_fn_on_a_module_of_ours_is_refused():
    for conformal in (ConformalSets(predict_fn=lambda model, x: model(x)),):
        with pytest.raises(InputError, match="`predict_fn` would bypass"):
            conformal.fit(deterministic(), VAL)


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_fitting_data_that_is_not_finite_or_has_no_targets(kind):
    build, module, (_, val, _) = foreign(kind)
    x, y = (part.clone() for part in val.dataset.tensors)
    x[-1] = torch.nan
    with pytest.raises(InputError, match="fitting data must have finite outputs, but those of 1 of 13 rows hold NaN"):
        build(nonfinite="inf").fit(module, pairs(x, y))
    with pytest.raises(InputError, match="fitting data must have targets, but a batch has none"):
        build().fit(module, DataLoader(val.dataset.tensors[0], 8))
    with pytest.raises(InputError, match="fitting data are empty"):
        build().fit(module, pairs(x[:0], y[:0]))
    with pytest.warns(UserWarning, match="alpha=0.1 needs 9 rows"):
        one = build().fit(module, pairs(*(part[:1] for part in val.dataset.tensors)))
    assert one.fitted


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_an_input_that_is_not_finite_in_a_users_module(make_trainer, kind):
    build, module, (train, val, test) = foreign(kind)
    trainer = make_trainer(callbacks=[build(nonfinite="inf")])
    trainer.fit(module, train, val)
    x, y = (part.clone() for part in test.dataset.tensors)
    x[5] = torch.nan
    prediction = joined(trainer.predict(module, pairs(x, y)))
    if kind == "sets":
        assert bool(prediction.prediction_set[5].all())
        assert not bool(prediction.prediction_set.all())
    else:
        assert bool((prediction.conformal_upper[5] == torch.inf).all())
        assert bool(prediction.conformal_upper[6].isfinite().all())


def test_a_test_that_cannot_be_scored_only_goes_without_the_metrics(make_trainer):
    class Silent(cases.UsersModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("seen", 1.0)

    module, conformal = Silent(), ConformalSets()
    trainer = make_trainer(callbacks=[conformal])
    trainer.fit(module, TRAIN, VAL)
    assert trainer.test(module, DataLoader(X, 8), verbose=False) == [{"seen": 1.0}]
    (first, second) = trainer.test(module, [TEST, DataLoader(X, 8)], verbose=False)
    assert "uq/test_coverage/dataloader_idx_0" in first
    assert not any("coverage" in name for name in second if name.endswith("1"))


# ---------------------------------------------------------------------- weights, files, precision


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_best_weights_a_new_process_and_stale_weights(make_trainer, tmp_path, kind):
    build, module, (train, val, test) = foreign(kind)
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max")  # the first epoch's
    conformal = build()
    trainer = make_trainer(callbacks=[conformal, keep], enable_checkpointing=True, max_epochs=3)
    trainer.fit(module, train, val)
    best = type(module).load_from_checkpoint(keep.best_model_path, weights_only=True)
    direct = build().fit(best, val)
    torch.testing.assert_close(conformal.state["scores"].sort(0).values, direct.state["scores"].sort(0).values)
    fresh = build()
    found = make_trainer(callbacks=[fresh]).predict(
        type(module)(), test, ckpt_path=conformal.uq_ckpt_path, weights_only=True
    )
    again = make_trainer(callbacks=[build()]).predict(
        type(module)(), test, ckpt_path=keep.best_model_path, weights_only=True
    )
    for name, tensor in carried(joined(found)).items():
        assert torch.equal(tensor, carried(joined(again))[name])
    assert torch.equal(fresh.state["scores"], conformal.state["scores"])
    stale = build()
    stale.load_state_dict(conformal.state_dict())
    with pytest.raises(NotFittedError, match="has no state that was fitted on the weights in memory"):
        make_trainer(callbacks=[stale]).predict(type(module)(), test)
    other = build(method="aps") if kind == "sets" else build(simultaneous=True)
    with pytest.raises(UQError, match="method|simultaneous"):
        make_trainer(callbacks=[other]).predict(type(module)(), test, ckpt_path=keep.best_model_path, weights_only=True)


def test_weights_that_change_take_the_sets_away():
    module = deterministic()
    ConformalSets().fit(module, VAL)
    with torch.no_grad():
        next(module.parameters()).add_(1.0)
    with pytest.raises(NotFittedError, match="ConformalSets was fitted on other weights than this module's"):
        module.predict(X)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(make_trainer, precision):
    for module, conformal, (train, val, test) in (
        (deterministic(), ConformalSets(method="aps", randomized=True), (TRAIN, VAL, TEST)),
        (
            DeterministicModule(cases.gaussian_network, task="regression", optimizer=cases.OPTIMIZERS["regression"]),
            ConformalIntervals(method="normalized"),
            NUMBERS,
        ),
    ):
        trainer = make_trainer(callbacks=[conformal], precision=precision)
        trainer.fit(module, train, val)
        assert conformal.state["scores"].dtype == torch.float64
        (tested,) = trainer.test(module, val, verbose=False)
        assert tested["uq/test_coverage"] >= 0.9  # of the fitted rows themselves
        dtypes = {t.dtype for t in carried(joined(trainer.predict(module, test))).values()}
        assert dtypes == {torch.bool if train is TRAIN else torch.float64 if precision == "64-true" else torch.float32}


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_a_copy_and_a_pickle_are_fitted_too(kind):
    own = deterministic() if kind == "sets" else DeterministicModule(cases.mean_network, task=Regression(head="mean"))
    conformal = (ConformalSets() if kind == "sets" else ConformalIntervals()).fit(
        own, VAL if kind == "sets" else NUMBERS[1]
    )
    expected = carried(own.predict(X))
    assert expected
    for module in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        for name, tensor in carried(module.predict(X)).items():
            assert torch.equal(tensor, expected[name])
    again = pickle.loads(pickle.dumps(conformal))
    assert torch.equal(again.state["scores"], conformal.state["scores"])
    conformal.handle.remove()
    assert carried(own.predict(X)) == {}


def test_two_levels_by_name(make_trainer):
    wide, narrow = ConformalSets(alpha=0.05, name="wide"), ConformalSets(alpha=0.4, name="narrow")
    module, trainer = cases.UsersModule(), make_trainer(callbacks=[wide, narrow])
    trainer.fit(module, TRAIN, VAL)
    assert {"uq/wide/set_threshold", "uq/narrow/set_threshold"} <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(module, TEST, verbose=False)
    assert tested["uq/wide/test_coverage"] > tested["uq/narrow/test_coverage"]


def test_a_second_training_fits_anew(make_trainer):
    module, scaling, conformal = deterministic(), TemperatureScaling(), ConformalSets()
    trainer = make_trainer(callbacks=[scaling, conformal])
    trainer.fit(module, TRAIN, VAL)
    first = conformal.threshold
    make_trainer(callbacks=[scaling, conformal]).fit(module, TRAIN, VAL)
    assert not torch.equal(conformal.threshold, first)
    alone = ConformalSets()
    make_trainer(callbacks=[alone]).fit(module, TRAIN, VAL)  # the temperature of the weights before does not stay
    assert not alone.carried().has_calibration
    assert module.predict(X).calibrations == {}


# ---------------------------------------------------------------------- predictions


def test_what_a_prediction_carries_goes_with_its_rows():
    prediction, target = labelled(12, num_classes=3)
    sets = ConformalSets(alpha=0.4).fit_predictions(prediction, target).change(prediction)
    sets = sets.replace(answered=torch.arange(12) % 2 == 0)
    assert torch.equal(sets[2:5].prediction_set, sets.prediction_set[2:5])
    assert torch.equal(type(sets).cat([sets[:5], sets[5:]]).prediction_set, sets.prediction_set)
    moved = sets.to(torch.bfloat16)
    assert (moved.prediction_set.dtype, moved.answered.dtype, moved.logits.dtype) == (
        torch.bool,
        torch.bool,
        torch.bfloat16,
    )
    assert torch.equal(moved.prediction_set, sets.prediction_set)
    assert torch.equal(sets.pool().prediction_set, sets.prediction_set)
    assert torch.equal(pickle.loads(pickle.dumps(sets)).answered, sets.answered)
    assert {"prediction_set", "answered", "set_size"} <= sets.to_dict().keys()
    without = sets.replace(prediction_set=None, answered=None)
    assert not {"prediction_set", "answered", "set_size"} & without.to_dict().keys()
    with pytest.raises(NotFittedError, match="carries no `prediction_set`: no set was fitted"):
        _ = without.set_size
    with pytest.raises(InputError, match="All or none"):
        type(sets).cat([sets, without])
    with pytest.raises(InputError, match="`prediction_set` must have as many rows"):
        sets.replace(prediction_set=torch.ones(3, 3, dtype=torch.bool))


def test_maps_as_rows_and_back():
    maps = CategoricalPrediction(torch.randn(1, 2, 3, 4, 5))
    maps = maps.replace(prediction_set=torch.rand(2, 3, 4, 5) < 0.5, answered=torch.rand(2, 4, 5) < 0.5)
    rows = maps.as_rows()
    assert torch.equal(rows.prediction_set.reshape(2, 4, 5, 3), maps.prediction_set.movedim(1, -1))
    assert torch.equal(rows.answered.reshape(2, 4, 5), maps.answered)
    assert maps.set_size.shape == (2, 4, 5)


# ---------------------------------------------------------------------- ranks

RANKS = """
import json, warnings
import torch
from lightning.pytorch import Trainer
from tests.callbacks.test_held_out import on_ranks
warnings.simplefilter("ignore")
found = on_ranks(lambda **kwargs: Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, precision="64-true",
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **kwargs))
if found.pop("is_first"):
    json.dump(found, open(out, "w"))
"""


def groups_of(x):
    return (x[:, 0] > 1).long()


class OnOneRank(IterableDataset):
    """All rows on rank 0, none on rank 1."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return iter([] if rank else list(self.data))


def on_ranks(make_trainer):
    """What is fitted and tested on given weights, for several callbacks: on one process, or on this rank of several."""
    torch.manual_seed(0)
    maps = DeterministicModule(cases.map_network, task=Segmentation(ignore_index=2))
    numbers = DeterministicModule(cases.mean_network, task=Regression(head="mean"))
    classes = DeterministicModule(cases.network)
    val = {name: cases.dataset(name, 61, 1) for name in ("classification", "regression", "segmentation")}
    runs = {
        "by class": (classes, ConformalSets(by_class=True, alpha=0.3), "classification", val["classification"]),
        "randomized": (classes, ConformalSets(method="aps", randomized=True), "classification", val["classification"]),
        "groups": (numbers, ConformalIntervals(groups=groups_of, alpha=0.3), "regression", val["regression"]),
        "a sample of pixels": (maps, ConformalSets(max_rows=70), "segmentation", val["segmentation"]),
        "an idle rank": (classes, ConformalSets(), "classification", OnOneRank(val["classification"])),
    }
    found = {}
    for name, (module, conformal, kind, data) in runs.items():
        conformal.dataloader = DataLoader(data, batch_size=8)
        module = module.double()
        trainer = make_trainer(callbacks=[conformal])
        (tested,) = trainer.test(module, cases.loader(kind, 27, 2), verbose=False)  # fitted at its first batch
        scores = conformal.state["scores"].flatten().sort().values  # pixels come in another order
        found[name] = {
            "scores": scores.tolist(),
            "groups": conformal.state.get("groups", torch.zeros(0)).tolist(),
            "tested": {metric: value for metric, value in tested.items() if metric.startswith("uq/")},
        }
    return {**found, "is_first": trainer.is_global_zero}


def test_two_ranks_fit_and_test_as_one_does(run_script, make_trainer):
    two = run_script(RANKS)
    one = on_ranks(lambda **kwargs: make_trainer(precision="64-true", **kwargs))
    for name, expected in one.items():
        if name == "is_first":
            continue
        assert two[name]["scores"] == pytest.approx(expected["scores"], rel=1e-9, abs=1e-9), name
        assert two[name]["groups"] == expected["groups"], name
        assert two[name]["tested"] == pytest.approx(expected["tested"], rel=1e-6), name


def test_a_test_makes_its_thresholds_once(make_trainer, monkeypatch):
    module, conformal = cases.UsersModule(), ConformalSets()
    trainer = make_trainer(callbacks=[conformal])
    trainer.fit(module, TRAIN, VAL)
    calls, make = [], conformal.transform
    monkeypatch.setattr(conformal, "transform", lambda: (calls.append(1), make())[1])
    trainer.test(module, TEST, verbose=False)
    assert len(calls) == 1  # of four batches


def test_thresholds_of_a_prediction_without_gradients_serve_one_with_gradients(make_trainer):
    """The Trainer predicts in inference mode, whose tensors no backward pass may save."""
    module = DeterministicModule(cases.gaussian_network, task="regression", optimizer=cases.OPTIMIZERS["regression"])
    conformal = ConformalIntervals(method="normalized")
    trainer = make_trainer(callbacks=[conformal])
    trainer.fit(module, *NUMBERS[:2])
    before = joined(trainer.predict(module, NUMBERS[2]))
    torch.testing.assert_close(module.predict(X).conformal_upper, before.conformal_upper)
    lower, upper = conformal.intervals(module.prediction(module(X)))
    torch.testing.assert_close(upper, before.conformal_upper)
    (upper - lower).sum().backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in module.parameters() if p.grad is not None)


def test_the_last_of_two_callbacks_of_a_kind_is_the_one_that_a_users_predictions_carry(make_trainer, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_uq.callbacks.foreign.report_guess", lambda text, about: told.append(text))
    options = {"attach": True, "task": "classification"}
    wide, narrow = ConformalSets(alpha=0.1, name="wide", **options), ConformalSets(alpha=0.5, name="narrow", **options)
    trainer = make_trainer(callbacks=[wide, narrow], max_epochs=2)
    module = cases.UsersModule()
    trainer.fit(module, TRAIN, VAL)
    prediction = CategoricalPrediction.cat(trainer.predict(module, TEST))
    assert torch.equal(prediction.prediction_set, narrow.sets(prediction))
    assert told == [
        "Predictions of UsersModule carry only one set, that of the last of several callbacks with `attach=True`."
    ]


@pytest.mark.parametrize("attach", [False, True])
def test_after_a_training_predict_reads_what_was_fitted_before(make_trainer, attach):
    """Also on a module that carries nothing itself."""
    given = {"attach": True, "task": "classification"} if attach else {}
    gmm, temperature, sets = (
        FitGMM(feature_transform="raw", **given),
        TemperatureScaling(**given),
        ConformalSets(**given),
    )
    module, trainer = cases.UsersModule(), make_trainer(callbacks=[gmm, temperature, sets], max_epochs=1)
    trainer.fit(module, TRAIN, VAL)
    prediction = sets.predict(module, X)
    assert prediction.temperature == temperature.temperature.float()
    assert prediction.has("ood_score")
    if attach:
        expected = joined(trainer.predict(module, TEST))
        assert torch.equal(expected.prediction_set, prediction.prediction_set)
        torch.testing.assert_close(expected.ood_score, prediction.ood_score)


@pytest.mark.parametrize("make", [ConformalSets, lambda: OODAlarm(score="mutual_information")])
def test_another_number_of_hypotheses_is_refused(make):
    """Scores of 3 samples have another distribution than those of 30."""
    module = EpinetModule(cases.network, num_eval_samples=30)
    fitted = make().fit(module, VAL)
    module.predict(X)
    module.num_eval_samples = 3
    with pytest.raises(InputError, match="was fitted to predictions with 30 hypotheses, but this one has 3"):
        module.predict(X)
    assert fitted.fit(module, VAL).fitted
    module.predict(X)
